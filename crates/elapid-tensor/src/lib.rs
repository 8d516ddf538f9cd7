//! Tensors, memory, counter-based random numbers, ragged batches and reverse-mode autograd.
//!
//! The layer is small on purpose: only what linear-time sequence models need. A [`Tensor`] is an
//! immutable, possibly strided view of shared storage; operations live in `elapid-ops` and join the
//! graph through [`autograd::record`]. [`Sequences`] describes ragged batches.

pub mod autograd;
pub mod cuda;
mod device;
mod dtype;
mod error;
mod gpu_tensor;
pub mod memory;
pub mod rng;
mod sequences;
mod shape;
mod tensor;
mod views;

pub use device::Device;
pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use half::{bf16, f16};
pub use memory::Buffer;
pub use sequences::{KeptKey, Sequence, Sequences};
pub use shape::{MAX_RANK, Shape};
pub use tensor::{RowView, Tensor};
