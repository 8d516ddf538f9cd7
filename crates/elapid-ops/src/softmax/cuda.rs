//! Softmax and its logarithm on a GPU: what `cuda.cu` is given.

use elapid_tensor::cuda::{Gpu, Kernel, KernelArguments, Launch, Source};
use elapid_tensor::{DType, Result, Tensor};

use super::Rows;
use crate::gpu::{kernel_type, linear_blocks, scratch_tensor};

static SOURCE: Source = Source { name: "softmax", text: include_str!("cuda.cu"), headers: &[] };

#[repr(C)]
#[derive(Clone, Copy)]
struct ForwardArguments {
    x: u64,
    y: u64,
    rows: i64,
    width: i64,
}
// SAFETY: the layout of `ForwardArguments` in cuda.cu.
unsafe impl KernelArguments for ForwardArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct BackwardArguments {
    y: u64,
    dy: u64,
    dx: u64,
    rows: i64,
    width: i64,
}
// SAFETY: the layout of `BackwardArguments` in cuda.cu.
unsafe impl KernelArguments for BackwardArguments {}

fn kernel(gpu: &Gpu, kind: &Rows, x: &Tensor, gradient: &Tensor, name: &str) -> Result<Kernel> {
    let macros = [
        ("ELEMENT", kernel_type(kind.op, x)?),
        ("GRADIENT", kernel_type(kind.op, gradient)?),
        ("LOGARITHM", if kind.logarithm { "1" } else { "0" }),
    ];
    Ok(gpu.module(&SOURCE, &macros)?.kernel(name)?)
}

/// A block a row, of as many threads as the width and the types decide: they are part of the order of additions.
fn launch(gpu: &Gpu, rows: usize, width: usize, types: [DType; 2]) -> Launch {
    let pack = if types.iter().all(|dtype| dtype.size() == 2) { 8 } else { 4 };
    let threads = width.div_ceil(pack).next_multiple_of(32).min(1024);
    Launch::linear(linear_blocks(gpu, rows), threads as u32)
}

/// The function of each row of a tensor without gaps and with elements.
pub(super) fn forward(gpu: &Gpu, kind: &Rows, x: &Tensor, width: usize) -> Result<Tensor> {
    let kernel = kernel(gpu, kind, x, x, "softmax_forward")?;
    let y = scratch_tensor(gpu, kind.op, x.dtype(), x.shape())?;
    let rows = x.elements() / width;
    let arguments = ForwardArguments {
        x: x.device_address()?,
        y: y.device_address()?,
        rows: rows as i64,
        width: width as i64,
    };
    // SAFETY: both tensors have so many rows of that width.
    unsafe { gpu.launch(&kernel, launch(gpu, rows, width, [x.dtype(); 2]), &arguments)? };
    Ok(y)
}

/// Its gradient in the type of `dy`, from the result `y`; both without gaps.
pub(super) fn backward(
    gpu: &Gpu,
    kind: &Rows,
    y: &Tensor,
    dy: &Tensor,
    width: usize,
) -> Result<Tensor> {
    dy.expect_device(kind.op, "the gradient", y.device())?;
    let kernel = kernel(gpu, kind, y, dy, "softmax_backward")?;
    let dx = scratch_tensor(gpu, kind.op, dy.dtype(), dy.shape())?;
    let rows = y.elements() / width;
    let arguments = BackwardArguments {
        y: y.device_address()?,
        dy: dy.device_address()?,
        dx: dx.device_address()?,
        rows: rows as i64,
        width: width as i64,
    };
    // SAFETY: all three tensors have so many rows of that width.
    unsafe { gpu.launch(&kernel, launch(gpu, rows, width, [y.dtype(), dy.dtype()]), &arguments)? };
    Ok(dx)
}
