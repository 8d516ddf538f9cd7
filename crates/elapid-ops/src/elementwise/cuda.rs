//! The elementwise functions on a GPU: what `cuda.cu` is given.

use elapid_tensor::cuda::{Gpu, KernelArguments, Launch, Source};
use elapid_tensor::{MAX_RANK, Result, Shape, Tensor};

use super::walk::Walk;
use crate::gpu::{kernel_type, linear_blocks, scratch_tensor};

static SOURCE: Source = Source { name: "elementwise", text: include_str!("cuda.cu"), headers: &[] };

const THREADS: usize = 256;

/// The functions, in the order of their numbers in `cuda.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(i64)]
pub(super) enum Function {
    Identity,
    Neg,
    Scale,
    Exp,
    NegExp,
    Sigmoid,
    Silu,
    Softplus,
    Add,
    Sub,
    Mul,
    SigmoidGrad,
    SiluGrad,
    SoftplusGrad,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Arguments {
    x: u64,
    y: u64,
    out: u64,
    extents: [i64; MAX_RANK],
    x_strides: [i64; MAX_RANK],
    y_strides: [i64; MAX_RANK],
    rank: i64,
    rows: i64,
    function: i64,
    factor: f64,
}
// SAFETY: the layout of `Arguments` in cuda.cu.
unsafe impl KernelArguments for Arguments {}

/// The function of every element of `x`, or of every pair of elements of `x` and `y`, read as if they had `shape`,
/// which they must broadcast to; `factor` is that of [`Function::Scale`]. The result has the type of the last operand.
pub(super) fn apply(
    gpu: &Gpu,
    op: &'static str,
    (function, factor): (Function, f64),
    x: &Tensor,
    y: Option<&Tensor>,
    shape: Shape,
) -> Result<Tensor> {
    let last = y.unwrap_or(x);
    last.expect_device(op, "the last operand", x.device())?;
    let types = (kernel_type(op, x)?, kernel_type(op, last)?);
    let out = scratch_tensor(gpu, op, last.dtype(), shape)?;
    if shape.elements() == 0 {
        return Ok(out);
    }
    let walk = Walk::new(&shape, [x, last]);
    let wide = |values: [usize; MAX_RANK]| values.map(|value| value as i64);
    let rows = shape.elements() / walk.shape[0];
    let arguments = Arguments {
        x: x.device_address()?,
        y: y.map_or(Ok(0), Tensor::device_address)?,
        out: out.device_address()?,
        extents: wide(walk.shape),
        x_strides: wide(walk.strides[0]),
        y_strides: wide(walk.strides[1]),
        rank: walk.rank as i64,
        rows: rows as i64,
        function: function as i64,
        factor,
    };
    let macros = [("FIRST", types.0), ("SECOND", types.1), ("RESULT", types.1)];
    let kernel = gpu.module(&SOURCE, &macros)?.kernel("elementwise")?;
    let blocks = linear_blocks(gpu, (rows * walk.shape[0].div_ceil(4)).div_ceil(THREADS));
    // SAFETY: the walk's extents and strides stay within the operands, as their own do; the result was made for them.
    unsafe { gpu.launch(&kernel, Launch::linear(blocks, THREADS as u32), &arguments)? };
    Ok(out)
}
