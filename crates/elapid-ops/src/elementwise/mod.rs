//! Elementwise arithmetic and activations, with broadcasting as in numpy.
//!
//! Inputs are f32 (or f64) views of any strides; results are contiguous. The gradient of a repeated operand is
//! summed over the axes along which it was repeated. Fused operations do the heavy work of the models; these
//! are for what remains: residual sums, gates, `A = -exp(A_log)`, small heads.

mod cpu;
mod reference;
#[cfg(test)]
mod tests;
mod walk;

use elapid_tensor::autograd::{Backward, Saved, record_one};
use elapid_tensor::{Result, Shape, Tensor};

pub use walk::broadcast_shape;

use crate::reduce::sum_to_shape;

/// The shape of `a op b`, after checks of both types.
fn common_shape(op: &'static str, a: &Tensor, b: &Tensor) -> Result<Shape> {
    b.expect_dtype(op, "b", a.dtype())?;
    broadcast_shape(&a.shape(), &b.shape()).ok_or_else(|| {
        b.shape_error(op, "b", format!("a shape that broadcasts with a of shape {}", a.shape()))
    })
}

/// `a + b`.
///
/// # Errors
/// If the shapes do not broadcast, the types differ, or the type is not f32 or f64.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let out = cpu::zip("add", cpu::Add, a, b, common_shape("add", a, b)?)?;
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
    let out = cpu::zip("sub", cpu::Sub, a, b, common_shape("sub", a, b)?)?;
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
    let out = cpu::zip("mul", cpu::Mul, a, b, shape)?;
    Ok(record_one("mul", &[a, b], out, || {
        let (a, b) = (Saved::new(a), Saved::new(b));
        move |context: &mut Backward| {
            let Some(grad) = context.take_grad(0) else { return Ok(vec![None, None]) };
            let (a, b) = (a.get()?, b.get()?);
            let product_for = |other: &Tensor, own: &Tensor| {
                sum_to_shape(&cpu::zip("mul", cpu::Mul, &grad, other, shape)?, own.shape())
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
/// If the type is not f32 or f64.
pub fn neg(x: &Tensor) -> Result<Tensor> {
    let out = cpu::map("neg", cpu::Neg, x, x.shape())?;
    Ok(record_one("neg", &[x], out, || {
        |context: &mut Backward| Ok(vec![context.take_grad(0).map(|grad| neg(&grad)).transpose()?])
    }))
}

/// `factor x`.
///
/// # Errors
/// If the type is not f32 or f64.
pub fn scale(x: &Tensor, factor: f64) -> Result<Tensor> {
    let out = cpu::map("scale", cpu::Scale(factor), x, x.shape())?;
    Ok(record_one("scale", &[x], out, || {
        move |context: &mut Backward| {
            Ok(vec![context.take_grad(0).map(|grad| scale(&grad, factor)).transpose()?])
        }
    }))
}

/// `x` repeated to `shape`, copied.
///
/// # Errors
/// If `x` does not broadcast to `shape`, or the type is not f32 or f64.
pub fn broadcast_to(x: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    if broadcast_shape(&x.shape(), &shape) != Some(shape) {
        return Err(x.shape_error("broadcast_to", "x", format!("a shape that repeats to {shape}")));
    }
    let out = cpu::map("broadcast_to", cpu::Identity, x, shape)?;
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
            Ok(vec![Some(cpu::zip(name, op, &kept, &grad, kept.shape())?)])
        }
    })
}

/// `e^x`.
///
/// # Errors
/// If the type is not f32 or f64.
pub fn exp(x: &Tensor) -> Result<Tensor> {
    let out = cpu::map("exp", cpu::Exp, x, x.shape())?;
    Ok(record_unary("exp", cpu::Mul, x, out, true))
}

/// `-e^x`: the diagonal `A` from `A_log` (Mamba, section 3.6 and appendix A: real, negative).
///
/// # Errors
/// If the type is not f32 or f64.
pub fn neg_exp(x: &Tensor) -> Result<Tensor> {
    let out = cpu::map("neg_exp", cpu::NegExp, x, x.shape())?;
    Ok(record_unary("neg_exp", cpu::Mul, x, out, true))
}

/// `1 / (1 + e^-x)`.
///
/// # Errors
/// If the type is not f32 or f64.
pub fn sigmoid(x: &Tensor) -> Result<Tensor> {
    let out = cpu::map("sigmoid", cpu::Sigmoid, x, x.shape())?;
    Ok(record_unary("sigmoid", cpu::SigmoidGrad, x, out, true))
}

/// `x sigmoid(x)`, also called swish.
///
/// # Errors
/// If the type is not f32 or f64.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    let out = cpu::map("silu", cpu::Silu, x, x.shape())?;
    Ok(record_unary("silu", cpu::SiluGrad, x, out, false))
}

/// `ln(1 + e^x)`, and `x` itself above 20.
///
/// # Errors
/// If the type is not f32 or f64.
pub fn softplus(x: &Tensor) -> Result<Tensor> {
    let out = cpu::map("softplus", cpu::Softplus, x, x.shape())?;
    Ok(record_unary("softplus", cpu::SoftplusGrad, x, out, false))
}
