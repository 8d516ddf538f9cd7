//! Sums and maxima on a GPU: how a sum is cut, and what `cuda.cu` is given.

use elapid_tensor::cuda::{DeviceBuffer, Gpu, KernelArguments, Launch, Module, Source};
use elapid_tensor::{DType, Device, Result, Shape, Tensor};

use crate::gpu::{kernel_type, linear_blocks, scratch_tensor};

static SOURCE: Source = Source { name: "reduce", text: include_str!("cuda.cu"), headers: &[] };

/// Threads of a block, all of which share a long row.
const THREADS: usize = 256;
/// Most threads of a warp that share a row.
const WARP: usize = 32;
/// Rows up to this many elements are left to some threads of a warp.
const SHORT: usize = 1024;
/// Packs of a long row that a thread adds for one part.
const PACKS: usize = 8;
/// Rows that a thread adds for one part of a column.
const ROWS: usize = 16;

#[repr(C)]
#[derive(Clone, Copy)]
struct SumArguments {
    x: u64,
    partial: u64,
    out: u64,
    outer: i64,
    count: i64,
    inner: i64,
    parts: i64,
    each: i64,
    lanes: i64,
    factor: f64,
}
// SAFETY: the layout of `SumArguments` in cuda.cu.
unsafe impl KernelArguments for SumArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct MaxArguments {
    x: u64,
    values: u64,
    places: u64,
    outer: i64,
    count: i64,
    inner: i64,
}
// SAFETY: the layout of `MaxArguments` in cuda.cu.
unsafe impl KernelArguments for MaxArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct PlaceArguments {
    dy: u64,
    places: u64,
    dx: u64,
    outer: i64,
    count: i64,
    inner: i64,
}
// SAFETY: the layout of `PlaceArguments` in cuda.cu.
unsafe impl KernelArguments for PlaceArguments {}

fn module(gpu: &Gpu, element: &str, result: &str) -> Result<Module> {
    Ok(gpu.module(&SOURCE, &[("ELEMENT", element), ("RESULT", result)])?)
}

/// Threads that share a row of columns, with `pack` columns each.
fn column_lanes(inner: usize, pack: usize) -> usize {
    inner.div_ceil(pack).next_power_of_two().min(WARP)
}

/// How a sum of `count` elements, `inner` apart, is cut; what decides the order of additions.
struct Cut {
    /// Threads that share a row.
    lanes: usize,
    /// Summands of a part.
    each: usize,
    parts: usize,
}

impl Cut {
    fn new(count: usize, inner: usize, pack: usize) -> Self {
        let (lanes, each) = if inner > 1 {
            let lanes = column_lanes(inner, pack);
            (lanes, ROWS * THREADS / lanes)
        } else if count <= SHORT {
            (count.div_ceil(pack).next_power_of_two().min(WARP), SHORT)
        } else {
            (THREADS, THREADS * pack * PACKS)
        };
        Self { lanes, each, parts: count.div_ceil(each).max(1) }
    }
}

/// `factor Σ x` over the middle extent of a tensor without gaps, rounded to `dtype`.
pub(super) fn sum(
    gpu: &Gpu,
    op: &'static str,
    x: &Tensor,
    [outer, count, inner]: [usize; 3],
    factor: f64,
    dtype: DType,
    out: Shape,
) -> Result<Tensor> {
    let out = scratch_tensor(gpu, op, dtype, out)?;
    let module = module(gpu, kernel_type(op, x)?, kernel_type(op, &out)?)?;
    let pack = 16 / x.dtype().size();
    let cut = Cut::new(count, inner, pack);
    let partial = match cut.parts {
        1 => None,
        parts => Some(gpu.scratch::<f32>(outer * parts * inner)?),
    };
    let mut arguments = SumArguments {
        x: x.device_address()?,
        partial: partial.as_ref().map_or(0, DeviceBuffer::address),
        out: out.device_address()?,
        outer: outer as i64,
        count: count as i64,
        inner: inner as i64,
        parts: cut.parts as i64,
        each: cut.each as i64,
        lanes: cut.lanes as i64,
        factor,
    };
    let pieces = outer * cut.parts;
    let (kernel, blocks) = match inner {
        1 => ("reduce_rows", pieces.div_ceil(THREADS / cut.lanes)),
        _ => ("reduce_columns", pieces * inner.div_ceil(cut.lanes * pack)),
    };
    let launch = |blocks| Launch::linear(linear_blocks(gpu, blocks), THREADS as u32);
    // SAFETY: the caller's extents are those of x; the workspace and the result were made for them.
    unsafe { gpu.launch(&module.kernel(kernel)?, launch(blocks), &arguments)? };
    if partial.is_some() {
        let lanes = column_lanes(inner, 4);
        arguments.lanes = lanes as i64;
        let blocks = outer * inner.div_ceil(lanes * 4);
        // SAFETY: as above.
        unsafe { gpu.launch(&module.kernel("reduce_parts")?, launch(blocks), &arguments)? };
    }
    Ok(out)
}

/// The largest values along the middle extent of a tensor without gaps, and where they stand first.
pub(super) fn max(
    gpu: &Gpu,
    op: &'static str,
    x: &Tensor,
    [outer, count, inner]: [usize; 3],
    out: Shape,
) -> Result<(Tensor, DeviceBuffer<i64>)> {
    let values = scratch_tensor(gpu, op, x.dtype(), out)?;
    let places = gpu.scratch::<i64>(outer * inner)?;
    let element = kernel_type(op, x)?;
    let arguments = MaxArguments {
        x: x.device_address()?,
        values: values.device_address()?,
        places: places.address(),
        outer: outer as i64,
        count: count as i64,
        inner: inner as i64,
    };
    let (kernel, blocks, threads) = match inner {
        1 if count <= SHORT => ("max_rows", outer, WARP),
        1 => ("max_rows", outer, THREADS),
        _ => ("max_columns", (outer * inner).div_ceil(THREADS), THREADS),
    };
    let kernel = module(gpu, element, element)?.kernel(kernel)?;
    let launch = Launch::linear(linear_blocks(gpu, blocks), threads as u32);
    // SAFETY: the caller's extents are those of x; the results were made for them.
    unsafe { gpu.launch(&kernel, launch, &arguments)? };
    Ok((values, places))
}

/// Zeros of `shape` but for `dy`, a tensor without gaps, at the places that [`max`] found.
pub(super) fn max_backward(
    places: &DeviceBuffer<i64>,
    op: &'static str,
    dy: &Tensor,
    [outer, count, inner]: [usize; 3],
    shape: Shape,
) -> Result<Tensor> {
    let gpu = places.gpu();
    dy.expect_device(op, "the gradient", Device::Cuda(gpu.id()))?;
    let dx = Tensor::zeros_on(dy.device(), dy.dtype(), shape)?;
    let element = kernel_type(op, dy)?;
    let arguments = PlaceArguments {
        dy: dy.device_address()?,
        places: places.address(),
        dx: dx.device_address()?,
        outer: outer as i64,
        count: count as i64,
        inner: inner as i64,
    };
    let kernel = module(gpu, element, element)?.kernel("max_backward")?;
    let blocks = linear_blocks(gpu, (outer * inner).div_ceil(THREADS));
    // SAFETY: every place is below count, and dx was made for these extents.
    unsafe { gpu.launch(&kernel, Launch::linear(blocks, THREADS as u32), &arguments)? };
    Ok(dx)
}
