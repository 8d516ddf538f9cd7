//! Elementwise arithmetic and activations, with broadcasting as in numpy.
//!
//! Inputs are views of any strides, f32 or f64 on the host, f32 or bf16 on a GPU; results are contiguous. The
//! gradient of a repeated operand is summed over the axes along which it was repeated. Fused operations do the
//! heavy work of the models; these are for what remains: residual sums, gates, `A = -exp(A_log)`, small heads.

mod cpu;
mod cuda;
mod reference;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_cuda;
mod walk;

use elapid_tensor::autograd::{Backward, Saved, record_one};
use elapid_tensor::{Result, Shape, Tensor};

pub use walk::broadcast_shape;

use crate::reduce::sum_to_shape;

/// `op` of every element of `x`, read as if it had `shape`, which it must broadcast to.
fn map<Op: cpu::Unary>(name: &'static str, op: Op, x: &Tensor, shape: Shape) -> Result<Tensor> {
    match x.gpu() {
        Some(gpu) => cuda::apply(gpu, name, op.on_gpu(), x, None, shape),
        None => cpu::map(name, op, x, shape),
    }
}

/// `op` of every pair of elements; both broadcast to `shape`. The result has the type of `y`, which on the host is
/// also that of `x`.
fn zip<Op: cpu::Binary>(
    name: &'static str,
    op: Op,
    x: &Tensor,
    y: &Tensor,
    shape: Shape,
) -> Result<Tensor> {
    match x.gpu() {
        Some(gpu) => cuda::apply(gpu, name, (op.on_gpu(), 1.0), x, Some(y), shape),
        None => cpu::zip(name, op, x, y, shape),
    }
}

/// The shape of `a op b`, after checks of both devices and types.
fn common_shape(op: &'static str, a: &Tensor, b: &Tensor) -> Result<Shape> {
    b.expect_device(op, "b", a.device())?;
    b.expect_dtype(op, "b", a.dtype())?;
    broadcast_shape(&a.shape(), &b.shape()).ok_or_else(|| {
        b.shape_error(op, "b", format!("a shape that broadcasts with a of shape {}", a.shape()))
    })
}

/// `a + b`.
///
/// # Errors
/// If the shapes do not broadcast, the devices or types differ, or the device lacks the type.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let out = zip("add", cpu::Add, a, b, common_shape("add", a, b)?)?;
    let (a_shape, b_shape) = (a.shape(), b.shape());
    Ok(record_one("add", &[a, b], out, || {
        move |context: &mut Backward| {
            let Some(grad) = context.take_grad(0) else { return Ok(vec![None, None]) };
            let da = wanted(context, 0, || sum_to_shape(&grad, a_shape))?;
            let db = wanted(context, 1, || sum_to_shape(&grad, b_shape))?;
            Ok(vec![da, db])
        }
    }))
}

/// `a - b`.
///
/// # Errors
/// As [`add`].
pub fn sub(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let out = zip("sub", cpu::Sub, a, b, common_shape("sub", a, b)?)?;
    let (a_shape, b_shape) = (a.shape(), b.shape());
    Ok(record_one("sub", &[a, b], out, || {
        move |context: &mut Backward| {
            let Some(grad) = context.take_grad(0) else { return Ok(vec![None, None]) };
            let da = wanted(context, 0, || sum_to_shape(&grad, a_shape))?;
            let db = wanted(context, 1, || neg(&sum_to_shape(&grad, b_shape)?))?;
            Ok(vec![da, db])
        }
    }))
}

/// `a b`, element by element.
///
/// # Errors
/// As [`add`].
pub fn mul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let shape = common_shape("mul", a, b)?;
    let out = zip("mul", cpu::Mul, a, b, shape)?;
    Ok(record_one("mul", &[a, b], out, || {
        let (a, b) = (Saved::new(a), Saved::new(b));
        move |context: &mut Backward| {
            let Some(grad) = context.take_grad(0) else { return Ok(vec![None, None]) };
            let (a, b) = (a.get()?, b.get()?);
            let product_for = |other: &Tensor, own: &Tensor| {
                sum_to_shape(&zip("mul", cpu::Mul, other, &grad, shape)?, own.shape())
            };
            let da = wanted(context, 0, || product_for(&b, &a))?;
            let db = wanted(context, 1, || product_for(&a, &b))?;
            Ok(vec![da, db])
        }
    }))
}

/// A gradient, made only if somebody wants it.
fn wanted(
    context: &Backward,
    input: usize,
    gradient: impl FnOnce() -> Result<Tensor>,
) -> Result<Option<Tensor>> {
    if context.needs(input) { gradient().map(Some) } else { Ok(None) }
}

/// `-x`.
///
/// # Errors
/// If the device lacks the type.
pub fn neg(x: &Tensor) -> Result<Tensor> {
    let out = map("neg", cpu::Neg, x, x.shape())?;
    Ok(record_one("neg", &[x], out, || {
        |context: &mut Backward| Ok(vec![context.take_grad(0).map(|grad| neg(&grad)).transpose()?])
    }))
}

/// `factor x`.
///
/// # Errors
/// If the device lacks the type.
pub fn scale(x: &Tensor, factor: f64) -> Result<Tensor> {
    let out = map("scale", cpu::Scale(factor), x, x.shape())?;
    Ok(record_one("scale", &[x], out, || {
        move |context: &mut Backward| {
            Ok(vec![context.take_grad(0).map(|grad| scale(&grad, factor)).transpose()?])
        }
    }))
}

/// `x` repeated to `shape`, copied.
///
/// # Errors
/// If `x` does not broadcast to `shape`, or the device lacks the type.
pub fn broadcast_to(x: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    if broadcast_shape(&x.shape(), &shape) != Some(shape) {
        return Err(x.shape_error("broadcast_to", "x", format!("a shape that repeats to {shape}")));
    }
    let out = map("broadcast_to", cpu::Identity, x, shape)?;
    let from = x.shape();
    Ok(record_one("broadcast_to", &[x], out, || {
        move |context: &mut Backward| {
            Ok(vec![context.take_grad(0).map(|grad| sum_to_shape(&grad, from)).transpose()?])
        }
    }))
}

/// Records a function of one value whose gradient is `op(kept, dy)`.
fn record_unary<Op: cpu::Binary + Send + 'static>(
    name: &'static str,
    op: Op,
    x: &Tensor,
    out: Tensor,
    keeps_output: bool,
) -> Tensor {
    let values = out.clone();
    record_one(name, &[x], out, || {
        let kept = Saved::new(if keeps_output { &values } else { x });
        move |context: &mut Backward| {
            let Some(grad) = context.take_grad(0) else { return Ok(vec![None]) };
            let kept = kept.get()?;
            Ok(vec![Some(zip(name, op, &kept, &grad, kept.shape())?)])
        }
    })
}

/// `e^x`.
///
/// # Errors
/// If the device lacks the type.
pub fn exp(x: &Tensor) -> Result<Tensor> {
    let out = map("exp", cpu::Exp, x, x.shape())?;
    Ok(record_unary("exp", cpu::Mul, x, out, true))
}

/// `-e^x`: the diagonal `A` from `A_log` (Mamba, section 3.6 and appendix A: real, negative).
///
/// # Errors
/// If the device lacks the type.
pub fn neg_exp(x: &Tensor) -> Result<Tensor> {
    let out = map("neg_exp", cpu::NegExp, x, x.shape())?;
    Ok(record_unary("neg_exp", cpu::Mul, x, out, true))
}

/// `1 / (1 + e^-x)`.
///
/// # Errors
/// If the device lacks the type.
pub fn sigmoid(x: &Tensor) -> Result<Tensor> {
    let out = map("sigmoid", cpu::Sigmoid, x, x.shape())?;
    Ok(record_unary("sigmoid", cpu::SigmoidGrad, x, out, true))
}

/// `x sigmoid(x)`, also called swish.
///
/// # Errors
/// If the device lacks the type.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    let out = map("silu", cpu::Silu, x, x.shape())?;
    Ok(record_unary("silu", cpu::SiluGrad, x, out, false))
}

/// `ln(1 + e^x)`, and `x` itself above 20.
///
/// # Errors
/// If the device lacks the type.
pub fn softplus(x: &Tensor) -> Result<Tensor> {
    let out = map("softplus", cpu::Softplus, x, x.shape())?;
    Ok(record_unary("softplus", cpu::SoftplusGrad, x, out, false))
}
