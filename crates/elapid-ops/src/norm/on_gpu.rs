//! The normalisations of tensors on a GPU.

use elapid_tensor::cuda::Gpu;
use elapid_tensor::{DType, Error, Result, Tensor, bf16};

use super::cpu::Kind;
use super::cuda::{self, Norm};
use super::{Gradients, OP};
use crate::gpu::{rows, slice_of, with_gpu_element};

/// y and residual_out of rows without gaps.
pub(super) fn forward(
    gpu: &Gpu,
    kind: Kind,
    x: &Tensor,
    (weight, bias): (&Option<Tensor>, &Option<Tensor>),
    residual: &Option<Tensor>,
) -> Result<(Tensor, Option<Tensor>)> {
    let norm = Norm { weight: slice_of(weight)?, bias: slice_of(bias)?, ..plain(kind, x) };
    let residual = residual.as_ref().map(rows).transpose()?;
    with_gpu_element!(OP, x, T => {
        let (y, sum) = cuda::forward::<T, T>(gpu, &norm, x.dim(0), rows(x)?, residual)?;
        let sum = sum.map(|sum| Tensor::from_device(sum, x.shape())).transpose()?;
        Ok((Tensor::from_device(y, x.shape())?, sum))
    })
}

/// y alone, of type `dtype`, from what was normalised.
pub(super) fn again(
    gpu: &Gpu,
    kind: Kind,
    r: &Tensor,
    (weight, bias): (&Option<Tensor>, &Option<Tensor>),
    dtype: DType,
) -> Result<Tensor> {
    let norm = Norm { weight: slice_of(weight)?, bias: slice_of(bias)?, ..plain(kind, r) };
    with_gpu_element!(OP, r, R => match dtype {
        DType::F32 => {
            Tensor::from_device(cuda::forward::<f32, R>(gpu, &norm, r.dim(0), rows(r)?, None)?.0, r.shape())
        }
        DType::BF16 => {
            Tensor::from_device(cuda::forward::<bf16, R>(gpu, &norm, r.dim(0), rows(r)?, None)?.0, r.shape())
        }
        other => Err(Error::argument(OP, format!("y in {other}, expected f32 or bf16"))),
    })
}

/// Gradients, given what was normalised.
pub(super) fn backward(
    gpu: &Gpu,
    kind: Kind,
    r: &Tensor,
    weight: &Option<Tensor>,
    dy: &Tensor,
    dsum: &Option<Tensor>,
) -> Result<Gradients> {
    let norm = Norm { weight: slice_of(weight)?, ..plain(kind, r) };
    let dsum = dsum.as_ref().map(rows).transpose()?;
    with_gpu_element!(OP, dy, T => with_gpu_element!(OP, r, R => {
        let found = cuda::backward::<T, R>(gpu, &norm, r.dim(0), rows(r)?, rows(dy)?, dsum)?;
        let width = [norm.width];
        Ok(Gradients {
            x: Some(Tensor::from_device(found.x, r.shape())?),
            residual: Some(Tensor::from_device(found.residual, r.shape())?),
            weight: Some(Tensor::from_device(found.weight, width)?),
            bias: Some(Tensor::from_device(found.bias, width)?),
        })
    }))
}

fn plain<'a>(kind: Kind, x: &Tensor) -> Norm<'a> {
    Norm {
        width: x.dim(1),
        center: kind.center,
        eps: f64::from(kind.eps),
        weight: None,
        bias: None,
    }
}
