//! The one error type of tensors and operations: what was expected, what was found, and where.

use crate::cuda::GpuError;
use crate::{DType, Device, Shape};

/// What can go wrong with tensors and operations.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// A tensor has the wrong shape for an operation.
    #[error("{op}: {tensor} has shape {got}, expected {expected}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The argument's name.
        tensor: String,
        /// What the operation needs, in shape letters and numbers.
        expected: String,
        /// What it was given.
        got: Shape,
    },
    /// A tensor has the wrong element type.
    #[error("{op}: {tensor} is {got}, expected {expected}")]
    DType {
        /// The operation.
        op: &'static str,
        /// The argument's name.
        tensor: String,
        /// The type that the operation needs.
        expected: DType,
        /// What it was given.
        got: DType,
    },
    /// A value other than a shape or type is out of range.
    #[error("{op}: {message}")]
    Argument {
        /// The operation.
        op: &'static str,
        /// What was expected and what was found.
        message: String,
    },
    /// The operation has no implementation there.
    #[error("{op} has no implementation for {dtype} on {device}")]
    Unsupported {
        /// The operation.
        op: &'static str,
        /// The device asked for.
        device: Device,
        /// The element type asked for.
        dtype: DType,
    },
    /// Tensors of one operation lie on different devices, or where the operation cannot reach them.
    #[error("{op}: {tensor} is on {got}, expected {expected}")]
    Device {
        /// The operation.
        op: &'static str,
        /// The argument's name.
        tensor: String,
        /// Where the operation runs.
        expected: Device,
        /// Where the tensor is.
        got: Device,
    },
    /// A GPU failed, is missing, or is full.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// A description of a ragged batch contradicts itself.
    #[error("sequences: {0}")]
    Sequences(String),
    /// The graph cannot be differentiated as asked.
    #[error("autograd: {0}")]
    Graph(String),
    /// Not a device's name.
    #[error("unknown device {0:?}, expected cpu, cuda, cuda:N or auto")]
    UnknownDevice(String),
    /// Not an element type's name.
    #[error("unknown element type {0:?}, expected one of f32, bf16, f16, f64, i64, i32, u32, u8")]
    UnknownDType(String),
}

impl Error {
    /// An [`Error::Argument`].
    pub fn argument(op: &'static str, message: impl Into<String>) -> Self {
        Error::Argument { op, message: message.into() }
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
