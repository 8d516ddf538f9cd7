//! Files of named tensors in the safetensors layout: eight bytes of header length, a JSON header, the data.
//!
//! Reading maps the file into memory and validates the whole header before any tensor is looked at.
//! Writing streams one tensor after the other, converting as it goes, and gives the same bytes for the same
//! content.

mod header;
mod read;
mod write;

pub use read::TensorFile;
pub(crate) use read::open_regular;
pub use write::save_tensors;
pub(crate) use write::{Entry, Metadata, tensor_bytes, write_tensors};
