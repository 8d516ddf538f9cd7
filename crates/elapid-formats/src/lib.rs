//! Files: model folders, recurrent-state files and training checkpoints.
//!
//! Whatever is read here comes from outside: it is validated before it is believed, errors name the file
//! and the tensor with what was expected and what was found, and nothing is allocated beyond a small
//! multiple of the file's size. Whatever is written appears whole or not at all ([`atomic`]).

pub mod atomic;
pub mod checkpoint;
pub mod convert;
mod error;
mod fingerprint;
pub mod gguf;
pub mod hf;
pub mod hub;
mod json;
mod model_source;
mod npz;
mod outgoing;
pub mod pytorch;
pub mod state_file;
mod strided;
pub mod tensor_file;
mod texts;
pub mod tokenizer;
mod zip;

pub use error::{Error, Result, TensorProblem};
pub use fingerprint::{Fingerprint, state_hash};
pub use model_source::{
    Bytes, Format, Layout, ModelSource, PYTORCH_FILE, PYTORCH_INDEX_FILE, StoredTensor, Weights,
    holds_weights, load_model, load_weights,
};
pub use state_file::{
    StateFile, load_continuation, load_continuation_checked, load_state, save_continuation,
    save_state,
};
pub use tensor_file::{TensorFile, save_tensors};
pub use texts::Texts;
pub use tokenizer::{Tokenizer, is_guarded};
