//! Softmax cross-entropy of logits on a GPU, the gradient in their place.

use elapid_tensor::cuda::{
    DeviceBuffer, DeviceSlice, Gpu, KernelArguments, Launch, Result, Source,
};

use crate::gpu::{GpuElement, array, optional, wrong};

const OP: &str = "linear_cross_entropy";

static SOURCE: Source = Source { name: OP, text: include_str!("cuda.cu"), headers: &[] };

/// Most bytes of a row that are kept in shared memory.
const CACHE: usize = 208 << 10;

#[repr(C)]
#[derive(Clone, Copy)]
struct Arguments {
    logits: u64,
    logits_stride: i64,
    targets: u64,
    losses: u64,
    log_sum_exp: u64,
    gradient: u64,
    gradient_stride: i64,
    scale: u64,
    factor: f64,
    rows: i64,
    vocab: i64,
    real_vocab: i64,
    cached: i64,
}
// SAFETY: the layout of `Arguments` in cuda.cu.
unsafe impl KernelArguments for Arguments {}

#[repr(C)]
#[derive(Clone, Copy)]
struct TotalArguments {
    losses: u64,
    scale: u64,
    total: u64,
    rows: i64,
}
// SAFETY: the layout of `TotalArguments` in cuda.cu.
unsafe impl KernelArguments for TotalArguments {}

/// What the rows of a chunk of logits are scored against.
#[derive(Debug, Clone, Copy)]
pub struct Scoring<'a> {
    /// Below `real_vocab`, or -100: ignored, with loss 0 and gradient 0. The loss of any other target is NaN. `[rows]`
    pub targets: DeviceSlice<'a, i64>,
    /// V.
    pub vocab: usize,
    /// Number of classes that take part.
    pub real_vocab: usize,
    /// The gradient is that of the losses' sum times this, one number; 1 without it.
    pub scale: Option<DeviceSlice<'a, f32>>,
}

/// Where the gradient of the logits goes.
#[derive(Debug)]
pub enum Gradient<'a, T> {
    /// Nowhere.
    None,
    /// In the place of the logits, which are of its type.
    InPlace,
    /// `[rows, V]`.
    Apart(&'a mut DeviceBuffer<T>),
}

/// Writes the losses of `rows` logits of type L to `losses` from row `first` on, and the gradient of type T.
///
/// # Errors
/// If a buffer does not fit, `real_vocab` is 0 or above V, or the GPU fails.
pub fn score<L: GpuElement, T: GpuElement>(
    gpu: &Gpu,
    logits: &mut DeviceBuffer<L>,
    scoring: &Scoring<'_>,
    gradient: Gradient<'_, T>,
    losses: &mut DeviceBuffer<f32>,
    first: usize,
) -> Result<()> {
    let Scoring { targets, vocab, real_vocab, scale } = *scoring;
    if real_vocab == 0 || real_vocab > vocab {
        return Err(wrong(OP, format!("{real_vocab} classes of {vocab}")));
    }
    let rows = targets.len();
    if first + rows > losses.len() || logits.len() < rows * vocab {
        let message = format!(
            "{rows} rows from {first} on, {} losses, {} logits of {vocab} classes",
            losses.len(),
            logits.len()
        );
        return Err(wrong(OP, message));
    }
    let gradient = match gradient {
        Gradient::None => 0,
        Gradient::InPlace if T::DTYPE == L::DTYPE => logits.address(),
        Gradient::InPlace => return Err(wrong(OP, "logits and gradient differ in type".into())),
        Gradient::Apart(buffer) if buffer.len() >= rows * vocab => buffer.address(),
        Gradient::Apart(buffer) => {
            return Err(wrong(OP, format!("gradient has {} elements", buffer.len())));
        }
    };
    let row_bytes = (real_vocab * size_of::<L>() + 16).next_multiple_of(16);
    let cached = row_bytes <= CACHE;
    let arguments = Arguments {
        logits: logits.address(),
        logits_stride: vocab as i64,
        targets: targets.address(),
        losses: losses.address() + (first * size_of::<f32>()) as u64,
        log_sum_exp: 0,
        gradient,
        gradient_stride: vocab as i64,
        scale: optional(OP, "scale", scale, 1)?,
        factor: 1.0,
        rows: rows as i64,
        vocab: vocab as i64,
        real_vocab: real_vocab as i64,
        cached: i64::from(cached),
    };
    // Two blocks a multiprocessor where a row leaves room for them.
    let threads = match real_vocab {
        0..=1024 => 128,
        _ if row_bytes <= CACHE / 2 => 512,
        _ => 1024,
    };
    let launch = Launch {
        shared: if cached { row_bytes as u32 } else { 0 },
        ..Launch::linear(rows as u32, threads)
    };
    let module = gpu.module(&SOURCE, &[("LOGIT", L::CUDA), ("ELEMENT", T::CUDA)])?;
    // SAFETY: the extents were checked, and the kernel looks up no target that is not below `real_vocab`.
    unsafe { gpu.launch(&module.kernel("cross_entropy")?, launch, &arguments) }
}

/// `scale Σ losses`, one number.
///
/// # Errors
/// If the GPU fails.
pub fn total(
    gpu: &Gpu,
    losses: &DeviceBuffer<f32>,
    scale: DeviceSlice<'_, f32>,
) -> Result<DeviceBuffer<f32>> {
    let total = gpu.scratch::<f32>(1)?;
    let arguments = TotalArguments {
        losses: losses.address(),
        scale: array(OP, "scale", scale, 1)?,
        total: total.address(),
        rows: losses.len() as i64,
    };
    let module = gpu.module(&SOURCE, &[("LOGIT", "float"), ("ELEMENT", "float")])?;
    let kernel = module.kernel("cross_entropy_total")?;
    // SAFETY: as many losses as are there, and one number each.
    unsafe { gpu.launch(&kernel, Launch::linear(1, 1024), &arguments)? };
    Ok(total)
}
