//! Copies between layouts and element types on a GPU, and sums in place.

use super::error::{GpuError, Result};
use super::gpu::{Gpu, Launch};
use super::source::{KernelArguments, Source};
use crate::{DType, MAX_RANK, Shape};

static COPY: Source = Source { name: "copy", text: include_str!("copy.cu"), headers: &[] };
static ADD: Source = Source { name: "add", text: include_str!("add.cu"), headers: &[] };

const THREADS: u32 = 256;

/// Elements in device memory: where the first is, and how the others lie.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) address: u64,
    pub(crate) dtype: DType,
    pub(crate) shape: Shape,
    pub(crate) strides: Shape,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RowsArguments {
    from: u64,
    to: u64,
    from_stride: i64,
    to_stride: i64,
    rows: i64,
    width: i64,
}
// SAFETY: the layout of `RowsArguments` in copy.cu.
unsafe impl KernelArguments for RowsArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct StridedArguments {
    from: u64,
    to: u64,
    elements: i64,
    shape: [i64; MAX_RANK],
    from_strides: [i64; MAX_RANK],
    to_strides: [i64; MAX_RANK],
}
// SAFETY: the layout of `StridedArguments` in copy.cu.
unsafe impl KernelArguments for StridedArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct AddArguments {
    sum: u64,
    term: u64,
    elements: i64,
}
// SAFETY: the layout of `AddArguments` in add.cu.
unsafe impl KernelArguments for AddArguments {}

/// One axis of a copy: extent, and the steps on either side.
#[derive(Clone, Copy, PartialEq)]
struct Axis {
    extent: i64,
    from: i64,
    to: i64,
}

/// The axes that are left when neighbours that lie end to end on both sides are taken as one.
fn merged(shape: &Shape, from: &Shape, to: &Shape) -> Vec<Axis> {
    let mut axes: Vec<Axis> = Vec::with_capacity(MAX_RANK);
    for axis in (0..shape.len()).filter(|&axis| shape[axis] != 1) {
        let own = Axis { extent: shape[axis] as i64, from: from[axis] as i64, to: to[axis] as i64 };
        match axes.last_mut() {
            Some(outer)
                if outer.from == own.from * own.extent && outer.to == own.to * own.extent =>
            {
                *outer = Axis { extent: outer.extent * own.extent, ..own };
            }
            _ => axes.push(own),
        }
    }
    axes
}

/// The types of a kernel's text that a copy from one element type to another uses.
fn names(from: DType, to: DType) -> Result<(&'static str, &'static str)> {
    match (from, to) {
        (DType::F32, DType::BF16) => Ok(("float", "bf16")),
        (DType::BF16, DType::F32) => Ok(("bf16", "float")),
        (from, to) if from == to => {
            let bits = match from.size() {
                1 => "uint8_t",
                2 => "uint16_t",
                4 => "uint32_t",
                _ => "uint64_t",
            };
            Ok((bits, bits))
        }
        (from, to) => Err(GpuError::Kernel {
            kernel: "copy".into(),
            source_name: "copy",
            message: format!("cannot turn {from} into {to}, expected f32 and bf16"),
        }),
    }
}

/// Blocks for so many threads' work, of which each thread takes some.
fn blocks(gpu: &Gpu, work: i64) -> u32 {
    let wanted = work.max(1).unsigned_abs().div_ceil(THREADS.into());
    wanted.min(16 * gpu.multiprocessors() as u64) as u32
}

/// Copies elements to the places of `to`, which has the same shape, with rounding to its type (f32 and bf16 become
/// each other).
///
/// # Safety
/// Both layouts must lie within memory of this GPU; `to` within memory that nobody else reads.
pub(crate) unsafe fn copy(gpu: &Gpu, from: &Layout, to: &Layout) -> Result<()> {
    let (from_name, to_name) = names(from.dtype, to.dtype)?;
    let elements = from.shape.elements() as i64;
    if elements == 0 {
        return Ok(());
    }
    let module = gpu.module(&COPY, &[("FROM", from_name), ("TO", to_name)])?;
    let axes = merged(&from.shape, &from.strides, &to.strides);
    let one = Axis { extent: 1, from: 1, to: 1 };
    let rows = match *axes {
        [] => Some((one, one)),
        [row] if row.from == 1 && row.to == 1 => Some((one, row)),
        [rows, row] if row.from == 1 && row.to == 1 => Some((rows, row)),
        _ => None,
    };
    if let Some((rows, row)) = rows {
        let arguments = RowsArguments {
            from: from.address,
            to: to.address,
            from_stride: rows.from,
            to_stride: rows.to,
            rows: rows.extent,
            width: row.extent,
        };
        let launch = Launch::linear(blocks(gpu, elements / 4), THREADS);
        // SAFETY: the caller's promise.
        return unsafe { gpu.launch(&module.kernel("copy_rows")?, launch, &arguments) };
    }
    let mut arguments = StridedArguments {
        from: from.address,
        to: to.address,
        elements,
        shape: [1; MAX_RANK],
        from_strides: [0; MAX_RANK],
        to_strides: [0; MAX_RANK],
    };
    let first = MAX_RANK - axes.len();
    for (i, axis) in axes.iter().enumerate() {
        arguments.shape[first + i] = axis.extent;
        arguments.from_strides[first + i] = axis.from;
        arguments.to_strides[first + i] = axis.to;
    }
    let launch = Launch::linear(blocks(gpu, elements), THREADS);
    // SAFETY: the caller's promise.
    unsafe { gpu.launch(&module.kernel("copy_strided")?, launch, &arguments) }
}

/// `sum += term` over elements without gaps, in f32, rounded to the type of the sum.
///
/// # Safety
/// Both must have that many elements in memory of this GPU, and nobody else may read the sum.
pub(crate) unsafe fn add(
    gpu: &Gpu,
    sum: (u64, DType),
    term: (u64, DType),
    elements: usize,
) -> Result<()> {
    let name = |dtype| match dtype {
        DType::F32 => Ok("float"),
        DType::BF16 => Ok("bf16"),
        other => Err(GpuError::Kernel {
            kernel: "add_in_place".into(),
            source_name: "add",
            message: format!("is for f32 and bf16, got {other}"),
        }),
    };
    let module = gpu.module(&ADD, &[("SUM", name(sum.1)?), ("TERM", name(term.1)?)])?;
    let arguments = AddArguments { sum: sum.0, term: term.0, elements: elements as i64 };
    let launch = Launch::linear(blocks(gpu, elements as i64 / 4), THREADS);
    // SAFETY: the caller's promise.
    unsafe { gpu.launch(&module.kernel("add_in_place")?, launch, &arguments) }
}
