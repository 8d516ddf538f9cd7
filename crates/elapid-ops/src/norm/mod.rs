//! RMSNorm and LayerNorm over the last axis, fused with the addition of the residual stream.
//!
//! `residual_out = x + residual` and `y = norm(residual_out)` come out of one pass, as a pre-norm block wants
//! them (Mamba, figure 3). Statistics are f32; a row's bits do not depend on other rows. Backward keeps
//! `residual_out` alone and makes the statistics again.

mod cpu;
pub mod cuda;
pub mod reference;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_cuda;

use elapid_tensor::autograd::{Backward, Saved, record};
use elapid_tensor::{DType, Device, Result, Tensor};

use cpu::{Affine, Kind};

/// (y, residual_out), both [T, C] in f32: `residual_out = x + residual`, `y = rms(residual_out) · weight`
/// with `rms(r) = r / sqrt(mean(r²) + eps)`.
///
/// Without a residual, `residual_out` is `x` itself. Gradients flow to x, weight and residual, through
/// both results.
///
/// # Errors
/// If x is not [T, C], the others do not fit, or a type is not f32.
pub fn rms_norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    residual: Option<&Tensor>,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    norm("rms_norm", Kind { center: false, eps }, x, weight, None, residual)
}

/// (y, residual_out), both [T, C] in f32: `residual_out = x + residual`,
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

fn norm(
    op: &'static str,
    kind: Kind,
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
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
        tensor.expect_dtype(op, name, DType::F32)?;
        if tensor.device() != Device::Cpu {
            return Err(tensor.unsupported(op));
        }
    }
    let weights = weight.map(|weight| weight.detach().contiguous()).transpose()?;
    let biases = bias.map(|bias| bias.detach().contiguous()).transpose()?;
    let affine = Affine {
        weight: weights.as_ref().map(Tensor::data).transpose()?,
        bias: biases.as_ref().map(Tensor::data).transpose()?,
    };
    let x_rows = with_whole_rows(x)?;
    let residual_rows = residual.map(with_whole_rows).transpose()?;
    let (y, sum) = cpu::forward(
        kind,
        x_rows.row_view()?,
        residual_rows.as_ref().map(Tensor::row_view).transpose()?,
        affine,
    );
    let sum = sum.map(|sum| Tensor::from_buffer(sum, [t, c])).transpose()?;

    let mut inputs = vec![x];
    inputs.extend(weight);
    inputs.extend(bias);
    inputs.extend(residual);
    let mut outputs = vec![Tensor::from_buffer(y, [t, c])?];
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
    let (dr, mut dweight, mut dbias): (_, Option<Tensor>, Option<Tensor>);
    (dweight, dbias) = (None, None);
    match context.take_grad(0) {
        // Only residual_out was used: its gradient passes through.
        None => dr = dsum,
        Some(dy) => {
            let r = with_whole_rows(&r.get()?)?;
            let (t, c) = (r.dim(0), r.dim(1));
            let weight = weight.map(|weight| weight.get()?.contiguous()).transpose()?;
            let dy = with_whole_rows(&dy)?;
            let dsum = dsum.as_ref().map(with_whole_rows).transpose()?;
            let found = cpu::backward(
                kind,
                r.row_view()?,
                weight.as_ref().map(Tensor::data).transpose()?,
                dy.row_view()?,
                dsum.as_ref().map(Tensor::row_view).transpose()?,
            );
            dr = Some(Tensor::from_buffer(found.0, [t, c])?);
            dweight = Some(Tensor::from_buffer(found.1, [c])?);
            dbias = Some(Tensor::from_buffer(found.2, [c])?);
        }
    }
    let mut grads = vec![dr.clone()];
    if weight.is_some() {
        grads.push(dweight);
    }
    if has_bias {
        grads.push(dbias);
    }
    if has_residual {
        grads.push(dr);
    }
    Ok(grads)
}

/// The values of a tensor whose rows have no gaps, without a place in the graph.
fn with_whole_rows(tensor: &Tensor) -> Result<Tensor> {
    let tensor = tensor.detach();
    if tensor.has_whole_rows() { Ok(tensor) } else { tensor.contiguous() }
}
