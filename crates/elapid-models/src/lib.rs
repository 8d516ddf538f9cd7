//! Sequence mixers, blocks and language models.
//!
//! A mixer is one function for sequences of any lengths, 0 and 1 included:
//! `forward(x, sequences, state) -> (y, state)`. Training, prefill and one-token decoding are that function.

mod block;
mod config;
mod context;
mod error;
mod initialize;
mod language_model;
pub mod mixers;
mod outline;
mod parameter;
mod state;

pub use block::{Block, Norm};
pub use config::{DtInit, MambaConfig, NormKind};
pub use context::{Context, Tap};
pub use error::{Error, Result};
pub use language_model::LanguageModel;
pub use outline::{ParameterOutline, parameter_outlines};
pub use parameter::{Kind, Linear, Parameter};
pub use state::{LayerState, State};
