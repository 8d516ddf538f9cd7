//! What can go wrong with a GPU, and what to do about it.

/// `Result` with [`GpuError`].
pub type Result<T, E = GpuError> = std::result::Result<T, E>;

/// What can go wrong with a GPU.
#[derive(Debug, Clone, thiserror::Error)]
pub enum GpuError {
    /// A library that is looked for at run time is not there.
    #[error("{library} was not found: {remedy}")]
    Missing {
        /// The library.
        library: &'static str,
        /// How to get it.
        remedy: &'static str,
    },
    /// A library is there but too old.
    #[error("{library} lacks {symbol}: it is too old, expected CUDA 12 or later")]
    TooOld {
        /// The library.
        library: &'static str,
        /// The function that it lacks.
        symbol: &'static str,
    },
    /// There is no such card.
    #[error("cuda:{ordinal} does not exist: {count} NVIDIA GPUs were found")]
    NoSuchCard {
        /// The number asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The driver refused a call.
    #[error("{device}: {call} failed: {message}")]
    Call {
        /// The device.
        device: String,
        /// What was asked of it.
        call: &'static str,
        /// The driver's name for what went wrong.
        message: String,
    },
    /// The card is too old for bf16.
    #[error(
        "{device} ({name}, compute capability {}.{}) has no bf16, expected 8.0 or newer: use f32", capability.0, capability.1
    )]
    NoBf16 {
        /// The device.
        device: String,
        /// The card's name.
        name: String,
        /// Its compute capability.
        capability: (i32, i32),
    },
    /// The card's memory is full.
    #[error(
        "{device}: {asked} bytes asked for, {free} of {total} free: lower the batch, the sequence length or the model's size"
    )]
    OutOfMemory {
        /// The device.
        device: String,
        /// Bytes asked for.
        asked: usize,
        /// Bytes free.
        free: usize,
        /// Bytes in all.
        total: usize,
    },
    /// A kernel does not compile.
    #[error("kernels of {source_name} do not compile for {target}:\n{log}")]
    Compile {
        /// The text.
        source_name: &'static str,
        /// The card or compiler.
        target: String,
        /// What the compiler says.
        log: String,
    },
    /// A module has no such kernel, or its arguments have another size.
    #[error("kernel {kernel} of {source_name}: {message}")]
    Kernel {
        /// The kernel.
        kernel: String,
        /// The text it was looked for in.
        source_name: &'static str,
        /// What is wrong.
        message: String,
    },
    /// The cache of compiled kernels cannot be used.
    #[error("compiled kernels cannot be kept in {path}: {message}")]
    Cache {
        /// The folder or file.
        path: String,
        /// What the system says.
        message: String,
    },
}
