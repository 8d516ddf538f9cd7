//! What the kernels of a decode step are given: the layouts of the structs of the same names in the CUDA sources, which say
//! what each field is. Addresses are in the memory of the GPU; 0 is none.

use elapid_tensor::cuda::KernelArguments;

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub weights: u64,
    pub x: u64,
    pub row_tiles: i64,
    pub first_tiles: i64,
    pub blocks: i64,
    pub columns: i64,
    pub squares: u64,
    pub factors: u64,
    pub square_count: i64,
    pub width: f32,
    pub eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct InputArguments {
    pub product: Product,
    pub bias: u64,
    pub taps: u64,
    pub tap_bias: u64,
    pub tail: u64,
    pub slots: u64,
    pub u: u64,
    pub gate: u64,
    pub channels: i64,
    pub channel_blocks: i64,
}
// SAFETY: the layout of `InputArguments` in input.cuh.
unsafe impl KernelArguments for InputArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RowsArguments {
    pub product: Product,
    pub out: u64,
    pub rows: i64,
    pub stride: i64,
    pub best: u64,
}
// SAFETY: the layout of `RowsArguments` in project.cu.
unsafe impl KernelArguments for RowsArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct OutputArguments {
    pub product: Product,
    pub bias: u64,
    pub residual: u64,
    pub norm: u64,
    pub x: u64,
    pub squares: u64,
    pub rows: i64,
    pub row_blocks: i64,
}
// SAFETY: the layout of `OutputArguments` in project.cu.
unsafe impl KernelArguments for OutputArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct PartArguments {
    pub product: Product,
    pub parts: u64,
}
// SAFETY: the layout of `PartArguments` in project.cu.
unsafe impl KernelArguments for PartArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ScanArguments {
    pub selection: u64,
    pub delta: u64,
    pub delta_bias: u64,
    pub a: u64,
    pub d: u64,
    pub state: u64,
    pub slots: u64,
    pub u: u64,
    pub gate: u64,
    pub y: u64,
    pub channels: i64,
    pub channel_blocks: i64,
    pub columns: i64,
    pub groups: i64,
    pub eps: f32,
}
// SAFETY: the layout of `ScanArguments` in scan.cuh.
unsafe impl KernelArguments for ScanArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Normed {
    pub norm: u64,
    pub norm_bias: u64,
    pub x: u64,
    pub squares: u64,
    pub factors: u64,
    pub width: i64,
    pub blocks: i64,
    pub eps: f32,
    pub centred: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct EmbedArguments {
    pub table: u64,
    pub ids: u64,
    pub residual: u64,
    pub to: Normed,
    pub columns: i64,
    pub classes: i64,
}
// SAFETY: the layout of `EmbedArguments` in rows.cu.
unsafe impl KernelArguments for EmbedArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct NormArguments {
    pub residual: u64,
    pub to: Normed,
    pub columns: i64,
}
// SAFETY: the layout of `NormArguments` in rows.cu.
unsafe impl KernelArguments for NormArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct JoinArguments {
    pub parts: u64,
    pub pairs: i64,
    pub row_tiles: i64,
    pub bias: u64,
    pub residual: u64,
    pub to: Normed,
    pub columns: i64,
}
// SAFETY: the layout of `JoinArguments` in rows.cu.
unsafe impl KernelArguments for JoinArguments {}
