//! Matrix products: `matmul` for 2-D and batched 3-D tensors, and `linear`, the projection `y = x Wᵀ + b`.
//!
//! Operands are views of any strides and are never copied; results are contiguous. Each element of a result
//! is summed in one fixed order (see `kernel.rs`) whatever the number of rows, their place in the batch, the
//! strides and the number of threads, so a token has the same bits alone and in a batch. `TUNING.md` has the
//! measurements behind this. On a GPU, products go through cuBLASLt: an operand of bf16 makes the other one bf16, too,
//! sums are f32, and the gradient of an f32 operand is f32.

mod block;
mod cpu;
mod kernel;
mod matvec;
mod on_gpu;
mod pack;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;
mod transpose;

pub use cpu::{Matrix, batched_gemm, gemm, gemm_add};
pub(crate) use transpose::transpose_block;

use crate::reduce::sum_to_shape;
use elapid_tensor::autograd::{Backward, Saved, record_one};
use elapid_tensor::{Buffer, DType, Device, Error, Result, Shape, Tensor};
use rayon::prelude::*;

/// `a b`: [M, K] x [K, N] -> [M, N], or [Z, M, K] x [Z, K, N] -> [Z, M, N], in f32; on a GPU in f32 or bf16, the
/// result of the type of `a`.
///
/// Gradients: `da = dc bᵀ`, `db = aᵀ dc`.
///
/// # Errors
/// If the ranks are not both 2 or both 3, the shapes do not fit, or a type or device is another.
pub fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (a_type, b_type) = (a.dtype(), b.dtype());
    let out = product("matmul", a, b, a_type)?;
    Ok(record_one("matmul", &[a, b], out, || {
        let (a, b) = (Saved::new(a), Saved::new(b));
        move |context: &mut Backward| {
            let Some(grad) = context.take_grad(0) else { return Ok(vec![None, None]) };
            let da = || product("matmul", &grad, &transposed(&b.get()?)?, a_type);
            let db = || product("matmul", &transposed(&a.get()?)?, &grad, b_type);
            let (da, db) = (wanted(context, 0, da)?, wanted(context, 1, db)?);
            Ok(vec![da, db])
        }
    }))
}

/// `y = x Wᵀ + b`: x [T, K], weight [N, K], bias [N] -> [T, N], in f32; on a GPU, x and y may be bf16.
///
/// Gradients: `dx = dy W`, `dW = dyᵀ x`, `db = Σ_t dy_t`.
///
/// # Errors
/// If the shapes do not fit, or a type or device is another.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let out = linear_forward("linear", x, weight, bias)?;
    let mut inputs = vec![x, weight];
    inputs.extend(bias);
    Ok(record_one("linear", &inputs, out, || linear_backward(x, weight, bias.map(Tensor::shape))))
}

/// [`linear`] without a place in the graph.
pub(crate) fn linear_forward(
    op: &'static str,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    x.expect_rank(op, "x", 2, "[T, K]")?;
    weight.expect_rank(op, "weight", 2, "[N, K]")?;
    let (n, k) = (weight.dim(0), x.dim(1));
    if weight.dim(1) != k {
        return Err(weight.shape_error(op, "weight", format!("[N, {k}]")));
    }
    let Some(bias) = bias else { return product(op, x, &transposed(weight)?, x.dtype()) };
    bias.expect_shape(op, "bias", &[n])?;
    let values = bias.detach().contiguous()?;
    match x.gpu() {
        Some(gpu) => {
            let to = on_gpu::To::New(x.dtype());
            on_gpu::product(gpu, op, x, &transposed(weight)?, Some(&values), to)
        }
        None => {
            let mut out = product(op, x, &transposed(weight)?, x.dtype())?;
            add_to_rows(out.data_mut::<f32>()?, values.data::<f32>()?);
            Ok(out)
        }
    }
}

/// What [`linear`] gives back to weight and bias (its shape), whose places among the inputs are given.
pub(crate) fn linear_gradients_of_parameters(
    context: &Backward,
    grad: &Tensor,
    x: impl FnOnce() -> Result<Tensor>,
    (weight, dtype): (usize, DType),
    bias: Option<(usize, Shape)>,
) -> Result<Vec<Option<Tensor>>> {
    let op = context.op();
    let mut grads =
        vec![wanted(context, weight, || product(op, &transposed(grad)?, &x()?, dtype))?];
    if let Some((place, shape)) = bias {
        grads.push(wanted(context, place, || sum_to_shape(grad, shape)?.cast(dtype))?);
    }
    Ok(grads)
}

fn linear_backward(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<Shape>,
) -> impl FnOnce(&mut Backward) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static {
    const OP: &str = "linear";
    let (x_type, weight_type) = (x.dtype(), weight.dtype());
    let (x, weight) = (Saved::new(x), Saved::new(weight));
    move |context| {
        let inputs = if bias.is_some() { 3 } else { 2 };
        let Some(grad) = context.take_grad(0) else { return Ok(vec![None; inputs]) };
        let dx = match grad.gpu() {
            Some(gpu) if context.needs(0) => {
                Some(on_gpu::gradient(gpu, context, 0, (&grad, &weight.get()?), x_type)?)
            }
            _ => wanted(context, 0, || product(OP, &grad, &weight.get()?, x_type))?,
        };
        let mut grads = vec![dx];
        let bias = bias.map(|shape| (2, shape));
        grads.extend(linear_gradients_of_parameters(
            context,
            &grad,
            || x.get(),
            (1, weight_type),
            bias,
        )?);
        Ok(grads)
    }
}

/// A gradient, made only if somebody wants it.
fn wanted(
    context: &Backward,
    input: usize,
    gradient: impl FnOnce() -> Result<Tensor>,
) -> Result<Option<Tensor>> {
    if context.needs(input) { gradient().map(Some) } else { Ok(None) }
}

/// The last two axes exchanged, without a place in the graph.
fn transposed(tensor: &Tensor) -> Result<Tensor> {
    let rank = tensor.rank();
    tensor.detach().transpose(rank.saturating_sub(2), rank.saturating_sub(1))
}

fn add_to_rows(rows: &mut [f32], bias: &[f32]) {
    const BLOCK: usize = 1 << 15;
    if bias.is_empty() {
        return;
    }
    let add = |rows: &mut [f32]| {
        for row in rows.chunks_mut(bias.len()) {
            for (value, bias) in row.iter_mut().zip(bias) {
                *value += bias;
            }
        }
    };
    let block = (BLOCK / bias.len()).max(1) * bias.len();
    if rows.len() <= block { add(rows) } else { rows.par_chunks_mut(block).for_each(add) }
}

/// The product without a place in the graph, of the type `out` (f32 on the host).
pub(crate) fn product(op: &'static str, a: &Tensor, b: &Tensor, out: DType) -> Result<Tensor> {
    if let Some(gpu) = a.gpu() {
        return on_gpu::product(gpu, op, a, b, None, on_gpu::To::New(out));
    }
    let rank = if a.rank() == 3 { 3 } else { 2 };
    a.expect_rank(op, "a", rank, "[M, K] or [Z, M, K]")?;
    b.expect_rank(op, "b", rank, if rank == 3 { "[Z, K, N]" } else { "[K, N]" })?;
    for (name, tensor) in [("a", a), ("b", b)] {
        tensor.expect_dtype(op, name, DType::F32)?;
        tensor.expect_device(op, name, Device::Cpu)?;
    }
    let (batch, first) = if rank == 3 { (a.dim(0), 1) } else { (1, 0) };
    let (m, k, n) = (a.dim(first), a.dim(first + 1), b.dim(first + 1));
    if b.dim(first) != k || (rank == 3 && b.dim(0) != batch) {
        let expected = if rank == 3 { format!("[{batch}, {k}, N]") } else { format!("[{k}, N]") };
        return Err(b.shape_error(op, "b", expected));
    }
    let mut out = Buffer::<f32>::scratch(batch * m * n);
    let whole = |tensor: &Tensor| if rank == 3 { tensor.strides()[0] } else { 0 };
    let fits =
        batched_gemm(&mut out, batch, (matrix(a, first)?, whole(a)), (matrix(b, first)?, whole(b)));
    if !fits {
        return Err(Error::argument(
            op,
            format!("a view reaches beyond its storage: {} x {}", a.shape(), b.shape()),
        ));
    }
    let shape = if rank == 3 { Shape::new(&[batch, m, n]) } else { Shape::new(&[m, n]) };
    Tensor::from_buffer(out, shape)
}

/// The matrix at the front of a tensor whose rows are axis `axis`.
fn matrix(tensor: &Tensor, axis: usize) -> Result<Matrix<'_>> {
    Ok(Matrix {
        data: tensor.strided_data::<f32>()?,
        rows: tensor.dim(axis),
        cols: tensor.dim(axis + 1),
        row_stride: tensor.strides()[axis],
        col_stride: tensor.strides()[axis + 1],
    })
}
