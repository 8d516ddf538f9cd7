//! RMSNorm and LayerNorm over the last axis, fused with the addition of the residual stream.
//!
//! `residual_out = x + residual` and `y = norm(residual_out)` come out of one pass, as a pre-norm block wants
//! them (Mamba, figure 3). Statistics are f32; a row's bits do not depend on other rows. Backward keeps
//! `residual_out` alone and makes the statistics again.

mod cpu;
pub mod cuda;
mod on_gpu;
pub mod reference;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_cuda;

use elapid_tensor::autograd::{Backward, Saved, no_grad, record};
use elapid_tensor::{DType, Result, Tensor};

use crate::gpu::by_rows;
use cpu::{Affine, Kind};

const OP: &str = "norm";

/// (y, residual_out), both [T, C]: `residual_out = x + residual`, `y = rms(residual_out) · weight`
/// with `rms(r) = r / sqrt(mean(r²) + eps)`.
///
/// All f32; on a GPU, x and y may be bf16. Without a residual, `residual_out` is `x` itself. Gradients flow to x, weight and residual, through
/// both results.
///
/// # Errors
/// If x is not [T, C], the others do not fit, a type is another, or the tensors lie on several devices.
pub fn rms_norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    residual: Option<&Tensor>,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    norm("rms_norm", Kind { center: false, eps }, x, weight, None, residual)
}

/// The recipe of a norm's y: what comes of [`rms_norm`] or, if `center`, [`layer_norm`] of x [T, C] without a residual,
/// on a GPU in `dtype`. It has no place in the graph.
///
/// # Errors
/// As [`rms_norm`].
pub fn norm_again(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    (center, eps): (bool, f32),
    dtype: DType,
) -> Result<Tensor> {
    let kind = Kind { center, eps };
    let Some(gpu) = x.gpu() else {
        return no_grad(|| norm(OP, kind, x, weight, bias, None))?.0.cast(dtype);
    };
    check(OP, x, weight, bias, None)?;
    let parameter = |tensor: Option<&Tensor>| tensor.map(|t| t.detach().contiguous()).transpose();
    on_gpu::again(gpu, kind, &by_rows(x)?, (&parameter(weight)?, &parameter(bias)?), dtype)
}

/// (y, residual_out), both [T, C], of types as in [`rms_norm`]: `residual_out = x + residual`,
/// `y = (r - mean(r)) / sqrt(var(r) + eps) · weight + bias` of `r = residual_out`.
///
/// # Errors
/// As [`rms_norm`].
pub fn layer_norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    norm("layer_norm", Kind { center: true, eps }, x, weight, bias, residual)
}

fn check(
    op: &'static str,
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
) -> Result<()> {
    x.expect_rank(op, "x", 2, "[T, C]")?;
    let (t, c) = (x.dim(0), x.dim(1));
    for (name, tensor, shape) in [
        ("x", Some(x), &[t, c][..]),
        ("weight", weight, &[c]),
        ("bias", bias, &[c]),
        ("residual", residual, &[t, c]),
    ] {
        let Some(tensor) = tensor else { continue };
        tensor.expect_shape(op, name, shape)?;
        tensor.expect_device(op, name, x.device())?;
        if name != "x" || x.gpu().is_none() {
            tensor.expect_dtype(op, name, DType::F32)?;
        }
    }
    Ok(())
}

fn norm(
    op: &'static str,
    kind: Kind,
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    check(op, x, weight, bias, residual)?;
    let (t, c) = (x.dim(0), x.dim(1));
    let weights = weight.map(|weight| weight.detach().contiguous()).transpose()?;
    let biases = bias.map(|bias| bias.detach().contiguous()).transpose()?;
    let x_rows = by_rows(x)?;
    let residual_rows = residual.map(by_rows).transpose()?;
    let (y, sum) = match x.gpu() {
        Some(gpu) => on_gpu::forward(gpu, kind, &x_rows, (&weights, &biases), &residual_rows)?,
        None => {
            let affine = Affine {
                weight: weights.as_ref().map(Tensor::data).transpose()?,
                bias: biases.as_ref().map(Tensor::data).transpose()?,
            };
            let residual = residual_rows.as_ref().map(Tensor::row_view).transpose()?;
            let (y, sum) = cpu::forward(kind, x_rows.row_view()?, residual, affine);
            let sum = sum.map(|sum| Tensor::from_buffer(sum, [t, c])).transpose()?;
            (Tensor::from_buffer(y, [t, c])?, sum)
        }
    };

    let mut inputs = vec![x];
    inputs.extend(weight);
    inputs.extend(bias);
    inputs.extend(residual);
    let mut outputs = vec![y];
    outputs.extend(sum.clone());
    let mut outputs = record(op, &inputs, outputs, || {
        let r = Saved::new(sum.as_ref().unwrap_or(x));
        let weight = weight.map(Saved::new);
        let has = (bias.is_some(), sum.is_some());
        move |context: &mut Backward| gradients(kind, &r, weight.as_ref(), has, context)
    });
    let residual_out = if sum.is_some() { outputs.swap_remove(1) } else { x.clone() };
    Ok((outputs.swap_remove(0), residual_out))
}

/// Gradients by x, weight, bias and residual, as far as there are such inputs.
fn gradients(
    kind: Kind,
    r: &Saved,
    weight: Option<&Saved>,
    (has_bias, has_residual): (bool, bool),
    context: &mut Backward,
) -> Result<Vec<Option<Tensor>>> {
    let dsum = context.take_grad(1);
    let found = match context.take_grad(0) {
        // Only residual_out was used: its gradient passes through.
        None => Gradients { x: dsum.clone(), residual: dsum, weight: None, bias: None },
        Some(dy) => {
            let r = by_rows(&r.get()?)?;
            let (t, c) = (r.dim(0), r.dim(1));
            let weight = weight.map(|weight| weight.get()?.contiguous()).transpose()?;
            let dy = by_rows(&dy)?;
            let dsum = dsum.as_ref().map(by_rows).transpose()?;
            match r.gpu() {
                Some(gpu) => on_gpu::backward(gpu, kind, &r, &weight, &dy, &dsum)?,
                None => {
                    let (dr, dweight, dbias) = cpu::backward(
                        kind,
                        r.row_view()?,
                        weight.as_ref().map(Tensor::data).transpose()?,
                        dy.row_view()?,
                        dsum.as_ref().map(Tensor::row_view).transpose()?,
                    );
                    let dr = Tensor::from_buffer(dr, [t, c])?;
                    Gradients {
                        x: Some(dr.clone()),
                        residual: Some(dr),
                        weight: Some(Tensor::from_buffer(dweight, [c])?),
                        bias: Some(Tensor::from_buffer(dbias, [c])?),
                    }
                }
            }
        }
    };
    let mut grads = vec![found.x];
    if weight.is_some() {
        grads.push(found.weight);
    }
    if has_bias {
        grads.push(found.bias);
    }
    if has_residual {
        grads.push(found.residual);
    }
    Ok(grads)
}

/// Gradients by the inputs.
struct Gradients {
    x: Option<Tensor>,
    residual: Option<Tensor>,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
}
