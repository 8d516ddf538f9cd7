//! NVIDIA GPUs, without a CUDA toolkit at build time, and the same kernels on the host.
//!
//! Kernels are CUDA C++ texts ([`Source`]) embedded in the program. On a card they are compiled by NVRTC for that
//! card at first use and kept on disk by content; the driver, NVRTC and cuBLASLt are looked for when they are
//! needed ([`libraries`]). [`Gpu::emulated`] compiles the same texts with the host's C++ compiler over a thin
//! emulation of blocks, threads, barriers and warps, so that launch code and kernels run, and are checked
//! against their references, on machines without a card.
//!
//! A [`Gpu`] has one stream: launches, copies and the reuse of memory are ordered by the order of calls.

mod blas;
mod blas_card;
mod blas_host;
#[cfg(test)]
mod blas_tests;
mod cache;
mod card;
pub(crate) mod copy;
mod error;
mod gpu;
mod graph;
mod host;
mod invariance;
pub mod libraries;
mod memory;
mod profile;
mod shared;
mod source;
#[cfg(test)]
mod tests;

pub use blas::{Matrix, Product};
pub use card::Card;
pub use error::{GpuError, Result};
pub use gpu::{Event, Gpu, GpuId, Kernel, Launch, Module};
pub use graph::Graph;
pub use invariance::{batch_invariant, few_rows, invariant_rows, is_batch_invariant};
pub(crate) use memory::DeviceBlock;
pub use memory::{DeviceBuffer, DeviceSlice, Usage};
pub use profile::Profiled;
pub use shared::SharedBuffer;
pub use source::{KernelArguments, Source};
