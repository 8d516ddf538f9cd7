//! Token embedding: rows of a table chosen by token id.
//!
//! The arithmetic is that of [`crate::gather`]: copies of rows forward, sums of rows backward. The gradient is
//! dense `[V, D]` and adds the tokens of an id in their order, whatever the number of threads.

pub mod cuda;
mod on_gpu;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_cuda;

use std::sync::Arc;

use elapid_tensor::autograd::{Backward, record_one};
use elapid_tensor::{DType, Error, Result, Tensor};

use crate::gather::cpu::{scatter_add, take_rows};

const OP: &str = "embedding";

/// Token ids, `[T]`.
#[derive(Debug, Clone, Copy)]
pub enum Ids<'a> {
    /// u32 on the host, wherever the table is.
    Values(&'a Tensor),
    /// Sorted in the memory of the table's GPU.
    Prepared(&'a Arc<cuda::TokenIds>),
}

impl Ids<'_> {
    /// T.
    pub fn tokens(&self) -> usize {
        match self {
            Ids::Values(ids) => ids.elements(),
            Ids::Prepared(ids) => ids.len(),
        }
    }
}

impl<'a> From<&'a Tensor> for Ids<'a> {
    fn from(ids: &'a Tensor) -> Self {
        Ids::Values(ids)
    }
}

/// `out[t] = weight[ids[t]]`: ids `[T]`, weight f32 `[V, D]`, result f32 `[T, D]` where the weight is.
///
/// # Errors
/// If a shape or type is another, or an id is not below V (the error names the token, the id and V).
pub fn embedding<'a>(ids: impl Into<Ids<'a>>, weight: &Tensor) -> Result<Tensor> {
    let ids = match (ids.into(), weight.gpu()) {
        (Ids::Values(ids), None) => ids,
        (ids, Some(gpu)) => return on_gpu::embedding(gpu, ids, weight),
        (Ids::Prepared(_), None) => {
            return Err(Error::argument(OP, "the ids are on a GPU, the table is on cpu"));
        }
    };
    ids.expect_rank(OP, "ids", 1, "[T]")?;
    ids.expect_dtype(OP, "ids", DType::U32)?;
    weight.expect_rank(OP, "weight", 2, "[V, D]")?;
    weight.expect_dtype(OP, "weight", DType::F32)?;
    let (vocab, width) = (weight.dim(0), weight.dim(1));
    let rows: Vec<usize> = ids.to_vec::<u32>()?.iter().map(|&id| id as usize).collect();
    if let Some((t, id)) = rows.iter().enumerate().find(|&(_, &id)| id >= vocab) {
        return Err(Error::argument(
            OP,
            format!("the id of token {t} is {id}, expected less than V = {vocab}"),
        ));
    }
    let table = weight.detach();
    let table = if weight.strides()[1] == 1 { table } else { table.contiguous()? };
    let out = Tensor::from_buffer(take_rows(table.row_view::<f32>()?, &rows), [rows.len(), width])?;
    Ok(record_one(OP, &[weight], out, || {
        move |context: &mut Backward| {
            let Some(dy) = context.take_grad(0) else { return Ok(vec![None]) };
            let dy = dy.contiguous()?;
            let dx = scatter_add(dy.data::<f32>()?, &rows, width, vocab);
            Ok(vec![Some(Tensor::from_buffer(dx, [vocab, width])?)])
        }
    }))
}
