//! The normalisations on a GPU: what `cuda.cu` is given and in what order.

use elapid_tensor::cuda::{
    DeviceBuffer, DeviceSlice, Gpu, KernelArguments, Launch, Module, Result, Source,
};

use crate::gpu::{GpuElement, Rows, array, optional, wrong};

const OP: &str = "norm";

static SOURCE: Source = Source { name: OP, text: include_str!("cuda.cu"), headers: &[] };

/// Rows of a block in backward: part of the order in which the parameters' gradients are summed.
const BACKWARD_ROWS: usize = 32;
/// Most threads of a block.
const THREADS: usize = 1024;

/// What is done with a row.
#[derive(Debug, Clone, Copy)]
pub struct Norm<'a> {
    /// C.
    pub width: usize,
    /// Subtract the mean (LayerNorm) or not (RMSNorm).
    pub center: bool,
    /// Added to the mean square or variance.
    pub eps: f64,
    /// `[C]`
    pub weight: Option<DeviceSlice<'a, f32>>,
    /// `[C]`
    pub bias: Option<DeviceSlice<'a, f32>>,
}

/// Gradients of a normalisation.
#[derive(Debug)]
pub struct Gradients<T> {
    /// By x, `[T, C]`, in its type.
    pub x: DeviceBuffer<T>,
    /// By the residual, `[T, C]`, the same numbers in f32.
    pub residual: DeviceBuffer<f32>,
    /// `[C]`
    pub weight: DeviceBuffer<f32>,
    /// `[C]`
    pub bias: DeviceBuffer<f32>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ForwardArguments {
    x: u64,
    x_stride: i64,
    residual: u64,
    residual_stride: i64,
    weight: u64,
    bias: u64,
    y: u64,
    y_stride: i64,
    residual_out: u64,
    residual_out_stride: i64,
    rows: i64,
    width: i64,
    eps: f64,
}
// SAFETY: the layout of `ForwardArguments` in cuda.cu.
unsafe impl KernelArguments for ForwardArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct BackwardArguments {
    r: u64,
    r_stride: i64,
    weight: u64,
    dy: u64,
    dy_stride: i64,
    dsum: u64,
    dsum_stride: i64,
    dr: u64,
    dr_stride: i64,
    dx: u64,
    dx_stride: i64,
    partial: u64,
    rows: i64,
    rows_per_block: i64,
    width: i64,
    eps: f64,
}
// SAFETY: the layout of `BackwardArguments` in cuda.cu.
unsafe impl KernelArguments for BackwardArguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct ReduceArguments {
    partial: u64,
    parts: i64,
    width: i64,
    dweight: u64,
    dbias: u64,
}
// SAFETY: the layout of `ReduceArguments` in cuda.cu.
unsafe impl KernelArguments for ReduceArguments {}

impl Norm<'_> {
    /// Threads of a block, whole warps, each with packs of four elements.
    fn threads(&self) -> usize {
        self.width.div_ceil(4).next_multiple_of(32).min(THREADS)
    }

    fn module<T: GpuElement, R: GpuElement>(&self, gpu: &Gpu) -> Result<Module> {
        if self.width == 0 {
            return Err(wrong(OP, "rows have no elements".into()));
        }
        let packs = self.width.div_ceil(4 * self.threads()).to_string();
        let threads = self.threads().to_string();
        let center = if self.center { "1" } else { "0" };
        let macros = [
            ("ELEMENT", T::CUDA),
            ("SAVED", R::CUDA),
            ("CENTER", center),
            ("PACKS", &packs),
            ("THREADS", &threads),
        ];
        gpu.module(&SOURCE, &macros)
    }
}

/// `y = norm(residual_out)` of type T and `residual_out = x + residual` in f32, both `[rows, C]`, of x of type X; without
/// a residual there is no sum.
///
/// # Errors
/// If a buffer does not fit, or the GPU fails.
pub fn forward<T: GpuElement, X: GpuElement>(
    gpu: &Gpu,
    norm: &Norm<'_>,
    rows: usize,
    x: Rows<'_, X>,
    residual: Option<Rows<'_, f32>>,
) -> Result<(DeviceBuffer<T>, Option<DeviceBuffer<f32>>)> {
    let module = norm.module::<T, X>(gpu)?;
    let width = norm.width;
    let y = gpu.scratch::<T>(rows * width)?;
    let sum = residual.map(|_| gpu.scratch::<f32>(rows * width)).transpose()?;
    let arguments = ForwardArguments {
        x: x.address(OP, rows, width)?,
        x_stride: x.stride(),
        residual: residual.map_or(Ok(0), |r| r.address(OP, rows, width))?,
        residual_stride: residual.map_or(0, |r| r.stride()),
        weight: optional(OP, "weight", norm.weight, width)?,
        bias: optional(OP, "bias", norm.bias, width)?,
        y: y.address(),
        y_stride: width as i64,
        residual_out: sum.as_ref().map_or(0, DeviceBuffer::address),
        residual_out_stride: width as i64,
        rows: rows as i64,
        width: width as i64,
        eps: norm.eps,
    };
    let blocks = rows.min(16 * gpu.multiprocessors());
    let launch = Launch::linear(blocks as u32, norm.threads() as u32);
    // SAFETY: the extents of all arrays were checked above.
    unsafe { gpu.launch(&module.kernel("norm_forward")?, launch, &arguments)? };
    Ok((y, sum))
}

/// Gradients, given those of y and of residual_out (if that was used), and `r`, what was normalised: residual_out,
/// or x where there was no residual.
///
/// # Errors
/// As [`forward`].
pub fn backward<T: GpuElement, R: GpuElement>(
    gpu: &Gpu,
    norm: &Norm<'_>,
    rows: usize,
    r: Rows<'_, R>,
    dy: Rows<'_, T>,
    dsum: Option<Rows<'_, f32>>,
) -> Result<Gradients<T>> {
    let module = norm.module::<T, R>(gpu)?;
    let width = norm.width;
    let found = Gradients {
        x: gpu.scratch(rows * width)?,
        residual: gpu.scratch(rows * width)?,
        weight: gpu.scratch(width)?,
        bias: gpu.scratch(width)?,
    };
    let parts = rows.div_ceil(BACKWARD_ROWS);
    let partial = gpu.scratch::<f32>(parts * 2 * width)?;
    let arguments = BackwardArguments {
        r: r.address(OP, rows, width)?,
        r_stride: r.stride(),
        weight: optional(OP, "weight", norm.weight, width)?,
        dy: dy.address(OP, rows, width)?,
        dy_stride: dy.stride(),
        dsum: dsum.map_or(Ok(0), |dsum| dsum.address(OP, rows, width))?,
        dsum_stride: dsum.map_or(0, |dsum| dsum.stride()),
        dr: found.residual.address(),
        dr_stride: width as i64,
        dx: found.x.address(),
        dx_stride: width as i64,
        partial: partial.address(),
        rows: rows as i64,
        rows_per_block: BACKWARD_ROWS as i64,
        width: width as i64,
        eps: norm.eps,
    };
    let reduce = ReduceArguments {
        partial: array(OP, "partial", &partial, parts * 2 * width)?,
        parts: parts as i64,
        width: width as i64,
        dweight: found.weight.address(),
        dbias: found.bias.address(),
    };
    // SAFETY: the extents of all arrays were checked above.
    unsafe {
        let launch = Launch::linear(parts as u32, norm.threads() as u32);
        gpu.launch(&module.kernel("norm_backward")?, launch, &arguments)?;
        let launch = Launch::linear((2 * width).div_ceil(32) as u32, 1024);
        gpu.launch(&module.kernel("norm_parameters")?, launch, &reduce)?;
    }
    Ok(found)
}
