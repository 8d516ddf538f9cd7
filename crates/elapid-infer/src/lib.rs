//! Sampling and streaming generation.
//!
//! [`generate`] runs any number of prompts at once on a [`Runner`], for a
//! [`LanguageModel`](elapid_models::LanguageModel) that is [`ModelRunner`]: a chunked prefill in constant memory, then decoding one token a sequence and step. The tokens of a
//! sequence depend on its prompt, state, id and the sampling options alone, never on the batch it is in.

pub mod cpu;
mod error;
mod forward;
mod generate;
mod gpu;
mod gpu_steps;
mod prefill;
mod runner;
mod sampler;
mod scheduler;
mod self_check;
mod text;

pub use cpu::{CpuEngine, Loading};
pub use error::{Error, Result};
pub use forward::{Piece, forward};
pub use generate::{Event, Finish, Generated, Generation, Options, Request, Timing, generate};
pub use gpu::{GpuEngine, SampledSteps, Start};
pub use runner::{Logits, ModelRunner, NextTokens, Reading, Receiver, Runner};
pub use sampler::{Sampler, Sampling};
pub use scheduler::{Handle, Limits, Scheduler, Update};
pub use self_check::{Checked, Rows, SelfCheck, Trace};
pub use text::{StopStrings, TextStream, Utf8Stream};
