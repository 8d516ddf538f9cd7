//! Rows chosen by number: the last token of each prompt, the tokens that a router kept.

pub(crate) mod cpu;
mod on_gpu;
#[cfg(test)]
pub(crate) mod reference;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_cuda;

use elapid_tensor::autograd::{Backward, record_one};
use elapid_tensor::{DType, Error, Result, Tensor};

/// `out[k] = x[rows[k]]`: `[T, C]` and K numbers to `[K, C]`, f32 or f64, on a GPU f32 or bf16. A row may be
/// taken more than once or never; its gradient is the sum over its uses, in their order.
///
/// # Errors
/// If `x` has not two axes or another type, or a number is not below T.
pub fn select_rows(x: &Tensor, rows: &[usize]) -> Result<Tensor> {
    const OP: &str = "select_rows";
    x.expect_rank(OP, "x", 2, "[T, C]")?;
    let (count, width) = (x.dim(0), x.dim(1));
    if let Some((k, row)) = rows.iter().enumerate().find(|&(_, &row)| row >= count) {
        return Err(Error::argument(
            OP,
            format!("rows[{k}] is {row}, expected less than the {count} rows of x"),
        ));
    }
    if let Some(gpu) = x.gpu() {
        return on_gpu::select_rows(gpu, OP, x, rows);
    }
    let values = if x.strides()[1] == 1 { x.detach() } else { x.detach().contiguous()? };
    let shape = [rows.len(), width];
    let out = match x.dtype() {
        DType::F32 => Tensor::from_buffer(cpu::take_rows(values.row_view::<f32>()?, rows), shape)?,
        DType::F64 => Tensor::from_buffer(cpu::take_rows(values.row_view::<f64>()?, rows), shape)?,
        _ => return Err(x.unsupported(OP)),
    };
    Ok(record_one(OP, &[x], out, || {
        let rows = rows.to_vec();
        move |context: &mut Backward| {
            let Some(dy) = context.take_grad(0) else { return Ok(vec![None]) };
            let dy = dy.contiguous()?;
            let shape = [count, width];
            Ok(vec![Some(match dy.dtype() {
                DType::F64 => Tensor::from_buffer(
                    cpu::scatter_add(dy.data::<f64>()?, &rows, width, count),
                    shape,
                )?,
                _ => Tensor::from_buffer(
                    cpu::scatter_add(dy.data::<f32>()?, &rows, width, count),
                    shape,
                )?,
            })])
        }
    }))
}
