//! Kernel texts and what they are given.

/// What every kernel text may include as `prelude.cuh`.
pub(super) const PRELUDE: &str = include_str!("prelude.cuh");
/// What the prelude includes on the host.
pub(super) const EMULATION: &str = include_str!("emulation.h");

/// A CUDA C++ text with kernels, embedded in the program.
#[derive(Debug)]
pub struct Source {
    /// Its name in messages and in the cache.
    pub name: &'static str,
    /// The text, which includes `prelude.cuh`.
    pub text: &'static str,
    /// Further texts that it includes, by name.
    pub headers: &'static [(&'static str, &'static str)],
}

/// The one struct that a kernel takes.
///
/// # Safety
/// The type must be `repr(C)`, have the layout of the kernel's struct, and hold in its pointers addresses of device
/// memory that the kernel may use as it does.
pub unsafe trait KernelArguments: Copy + Send + Sync + 'static {}
