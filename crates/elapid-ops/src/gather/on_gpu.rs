//! Chosen rows of tensors on a GPU, by the kernels of the embedding: row numbers take the part of token ids.

use elapid_tensor::autograd::{Backward, record_one};
use elapid_tensor::cuda::Gpu;
use elapid_tensor::{Device, Error, Result, Tensor};

use crate::embedding::cuda::{TokenIds, backward, take};
use crate::gpu::{by_rows, rows, with_gpu_element};

/// `out[k] = x[numbers[k]]`, f32 or bf16; x has two axes, and every number is a row.
pub(super) fn select_rows(
    gpu: &Gpu,
    op: &'static str,
    x: &Tensor,
    numbers: &[usize],
) -> Result<Tensor> {
    let (count, width) = (x.dim(0), x.dim(1));
    let ids: Option<Vec<u32>> = numbers.iter().map(|&row| u32::try_from(row).ok()).collect();
    let ids = ids.ok_or_else(|| {
        Error::argument(op, format!("x has {count} rows, expected at most 2^32 on a GPU"))
    })?;
    let ids = TokenIds::upload(gpu, &ids, count)?;
    let values = by_rows(x)?;
    let out = with_gpu_element!(op, x, T => {
        let taken = take::<T, T>(gpu, rows(&values)?, &ids, width)?;
        Tensor::from_device(taken, [ids.len(), width])
    })?;
    let gpu = gpu.clone();
    Ok(record_one(op, &[x], out, || {
        move |context: &mut Backward| {
            let Some(dy) = context.take_grad(0) else { return Ok(vec![None]) };
            dy.expect_device(op, "the gradient", Device::Cuda(gpu.id()))?;
            let dy = by_rows(&dy)?;
            let sums = with_gpu_element!(op, dy, T => {
                Ok(backward::<T>(&gpu, &ids, rows(&dy)?, width)?)
            })?;
            Ok(vec![Some(Tensor::from_device(sums, [count, width])?.cast(dy.dtype())?)])
        }
    }))
}
