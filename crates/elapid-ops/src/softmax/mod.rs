//! Softmax and its logarithm over the last axis, of f32, on a GPU also of bf16.
//!
//! Each row is shifted by its maximum, so that no finite input overflows. A NaN or +inf makes its own row NaN.

pub(crate) mod cpu;
mod cuda;
#[cfg(test)]
pub(crate) mod reference;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_cuda;

use elapid_tensor::autograd::{Backward, Saved, record_one};
use elapid_tensor::{Buffer, DType, Result, Tensor};

/// One of the two functions.
#[derive(Clone, Copy)]
struct Rows {
    op: &'static str,
    logarithm: bool,
    /// Rows of x, those of the result, and their width.
    forward: fn(&[f32], &mut [f32], usize),
    /// Rows of dy, the result's that those of dx overwrite, and their width.
    backward: fn(&[f32], &mut [f32], usize),
}

impl Rows {
    /// Of rows without gaps.
    fn forward(&self, x: &Tensor, width: usize) -> Result<Tensor> {
        if x.elements() == 0 {
            return Tensor::zeros_on(x.device(), x.dtype(), x.shape());
        }
        if let Some(gpu) = x.gpu() {
            return cuda::forward(gpu, self, x, width);
        }
        let mut y = Buffer::<f32>::scratch(x.elements());
        (self.forward)(x.data()?, &mut y, width);
        Tensor::from_buffer(y, x.shape())
    }

    /// The gradient by x, from the result and its gradient, both without gaps.
    fn backward(&self, y: &Tensor, dy: &Tensor, width: usize) -> Result<Tensor> {
        if y.elements() == 0 {
            return Tensor::zeros_on(y.device(), dy.dtype(), y.shape());
        }
        if let Some(gpu) = y.gpu() {
            return cuda::backward(gpu, self, y, dy, width);
        }
        let mut dx = Buffer::copy_of(y.data::<f32>()?);
        (self.backward)(dy.data()?, &mut dx, width);
        Tensor::from_buffer(dx, y.shape())
    }

    fn record(self, x: &Tensor) -> Result<Tensor> {
        if x.gpu().is_none() {
            x.expect_dtype(self.op, "x", DType::F32)?;
        }
        let Some(&width) = x.shape().last() else {
            return Err(x.shape_error(self.op, "x", "at least one axis"));
        };
        let y = self.forward(&x.detach().contiguous()?, width)?;
        let result = y.clone();
        Ok(record_one(self.op, &[x], y, || {
            let y = Saved::new(&result);
            move |context: &mut Backward| {
                let Some(dy) = context.take_grad(0) else { return Ok(vec![None]) };
                Ok(vec![Some(self.backward(&y.get()?, &dy.contiguous()?, width)?)])
            }
        }))
    }
}

/// `e^x / Σ e^x` along the last axis; x f32, on a GPU also bf16.
///
/// # Errors
/// If the type is another or there is no axis.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    let (forward, backward) = (cpu::softmax, cpu::softmax_backward);
    Rows { op: "softmax", logarithm: false, forward, backward }.record(x)
}

/// `x - ln Σ e^x` along the last axis; x f32, on a GPU also bf16.
///
/// # Errors
/// If the type is another or there is no axis.
pub fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let (forward, backward) = (cpu::log_softmax, cpu::log_softmax_backward);
    Rows { op: "log_softmax", logarithm: true, forward, backward }.record(x)
}
