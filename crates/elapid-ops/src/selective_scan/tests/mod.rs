//! Tests of the selective scan: the reference against golden values and finite differences, the CPU code against
//! both, and the properties that hold bit for bit.

mod case;
mod cuda;
mod cuda_general;
mod golden;
mod isolation;
mod reference;
mod tensors;

pub(super) use case::Case;
