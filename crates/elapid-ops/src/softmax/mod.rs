//! Softmax and its logarithm over the last axis.
//!
//! Each row is shifted by its maximum, so that no finite input overflows. A NaN or +inf makes its own row NaN.

pub(crate) mod cpu;
#[cfg(test)]
pub(crate) mod reference;
#[cfg(test)]
mod tests;

use elapid_tensor::autograd::{Backward, Saved, record_one};
use elapid_tensor::{Buffer, DType, Result, Tensor};

type Forward = fn(&[f32], &mut [f32], usize);

/// Records `forward`, whose gradient `backward` computes from `dy` over a copy of the result.
fn record_rows(
    op: &'static str,
    x: &Tensor,
    forward: Forward,
    backward: fn(&[f32], &mut [f32], usize),
) -> Result<Tensor> {
    x.expect_dtype(op, "x", DType::F32)?;
    let Some(&width) = x.shape().last() else {
        return Err(x.shape_error(op, "x", "at least one axis"));
    };
    let shape = x.shape();
    let values = x.detach().contiguous()?;
    let mut out = Buffer::<f32>::scratch(x.elements());
    if !out.is_empty() {
        forward(values.data()?, &mut out, width);
    }
    let out = Tensor::from_buffer(out, shape)?;
    let result = out.clone();
    Ok(record_one(op, &[x], out, || {
        let y = Saved::new(&result);
        move |context: &mut Backward| {
            let Some(dy) = context.take_grad(0) else { return Ok(vec![None]) };
            let (y, dy) = (y.get()?, dy.contiguous()?);
            let mut dx = Buffer::copy_of(y.data::<f32>()?);
            if !dx.is_empty() {
                backward(dy.data()?, &mut dx, width);
            }
            Ok(vec![Some(Tensor::from_buffer(dx, shape)?)])
        }
    }))
}

/// `e^x / Σ e^x` along the last axis; x f32.
///
/// # Errors
/// If the type is not f32 or there is no axis.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    record_rows("softmax", x, cpu::softmax, cpu::softmax_backward)
}

/// `x - ln Σ e^x` along the last axis; x f32.
///
/// # Errors
/// If the type is not f32 or there is no axis.
pub fn log_softmax(x: &Tensor) -> Result<Tensor> {
    record_rows("log_softmax", x, cpu::log_softmax, cpu::log_softmax_backward)
}
