//! The embedding of tensors on a GPU.

use std::sync::Arc;

use elapid_tensor::autograd::{Backward, record_one};
use elapid_tensor::cuda::Gpu;
use elapid_tensor::{DType, Error, Result, Tensor};

use super::cuda::{self, TokenIds};
use super::{Ids, OP};
use crate::gpu::{by_rows, rows, whole, with_gpu_element};

/// Rows of a table on a GPU.
pub(super) fn embedding(gpu: &Gpu, ids: Ids<'_>, weight: &Tensor) -> Result<Tensor> {
    weight.expect_rank(OP, "weight", 2, "[V, D]")?;
    weight.expect_dtype(OP, "weight", DType::F32)?;
    let (vocab, width) = (weight.dim(0), weight.dim(1));
    let ids = match ids {
        Ids::Prepared(ids) if ids.classes() == vocab => ids.clone(),
        Ids::Prepared(ids) => {
            let message = format!("the ids are for {} rows, weight has {vocab}", ids.classes());
            return Err(Error::argument(OP, message));
        }
        Ids::Values(ids) => {
            ids.expect_rank(OP, "ids", 1, "[T]")?;
            ids.expect_dtype(OP, "ids", DType::U32)?;
            Arc::new(TokenIds::upload(gpu, &ids.to_vec::<u32>()?, vocab)?)
        }
    };
    let table = whole(weight)?;
    let out = cuda::forward::<f32>(gpu, table.device_slice()?, &ids, width)?;
    let out = Tensor::from_device(out, [ids.len(), width])?;
    let gpu = gpu.clone();
    Ok(record_one(OP, &[weight], out, || {
        move |context: &mut Backward| {
            let Some(dy) = context.take_grad(0) else { return Ok(vec![None]) };
            let dy = by_rows(&dy)?;
            with_gpu_element!(OP, dy, T => {
                let dtable = cuda::backward::<T>(&gpu, &ids, rows(&dy)?, width)?;
                Ok(vec![Some(Tensor::from_device(dtable, [vocab, width])?)])
            })
        }
    }))
}
