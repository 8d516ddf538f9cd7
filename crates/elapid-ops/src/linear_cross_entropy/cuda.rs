//! Softmax cross-entropy of logits on a GPU, the gradient in their place.

use elapid_tensor::cuda::{
    DeviceBuffer, DeviceSlice, Gpu, KernelArguments, Launch, Result, Source,
};

use crate::gpu::{GpuElement, array, wrong};

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

/// Losses `[rows]` of logits `[rows, V]` by targets (below `real_vocab`, the number of classes that take part, or
/// -100: ignored, with loss 0). The logits become `factor (softmax - 1[target])`, 0 in ignored rows and for the
/// classes that take no part. The loss of any other target is NaN.
///
/// # Errors
/// If a buffer does not fit, `real_vocab` is 0 or above `vocab`, or the GPU fails.
pub fn in_place<T: GpuElement>(
    gpu: &Gpu,
    logits: &mut DeviceBuffer<T>,
    targets: DeviceSlice<'_, i64>,
    (vocab, real_vocab): (usize, usize),
    factor: f64,
) -> Result<DeviceBuffer<f32>> {
    if real_vocab == 0 || real_vocab > vocab {
        return Err(wrong(OP, format!("{real_vocab} classes of {vocab}")));
    }
    let rows = targets.len();
    let losses = gpu.scratch::<f32>(rows)?;
    let row_bytes = (real_vocab * size_of::<T>() + 16).next_multiple_of(16);
    let cached = row_bytes <= CACHE;
    let address = array(OP, "logits", &*logits, rows * vocab)?;
    let arguments = Arguments {
        logits: address,
        logits_stride: vocab as i64,
        targets: targets.address(),
        losses: losses.address(),
        log_sum_exp: 0,
        gradient: address,
        gradient_stride: vocab as i64,
        scale: 0,
        factor,
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
    let module = gpu.module(&SOURCE, &[("LOGIT", T::CUDA), ("ELEMENT", T::CUDA)])?;
    // SAFETY: the extents were checked, and the kernel looks up no target that is not below `real_vocab`.
    unsafe { gpu.launch(&module.kernel("cross_entropy")?, launch, &arguments)? };
    Ok(losses)
}
