//! GGUF: llama.cpp's file format, read (versions 2 and 3) and written (3).
//!
//! [`GgufFile`] checks any such file and shows its metadata and tensors. A Mamba's arrives through
//! [`crate::ModelSource`] like every other format: tensors keep their encoding and stay in the memory map, except for
//! A_log, which is the logarithm of what the file has ([`a_log`]). [`save_gguf`] writes one as a [`Plan`] says.

mod a_log;
mod config;
mod contents;
mod cursor;
mod element;
mod names;
mod plan;
mod read;
mod save;
mod value;
mod vocabulary;
mod write;

pub(crate) use contents::read_contents;
pub use element::ElementType;
pub use names::{MAMBA, MAMBA2, from_hugging_face, to_hugging_face};
pub use plan::{Plan, PlannedTensor, WeightTypes};
pub use read::{GgufFile, MAGIC, TensorInfo};
pub use save::save_gguf;
pub use value::{Array, Value};
pub use vocabulary::vocabulary_of;
pub use write::{Planned, write_gguf};
