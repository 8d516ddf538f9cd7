//! Elapid trains, runs and studies linear-time sequence models: Mamba (arXiv 2312.00752) first, then its
//! family. This crate is the command line and the facade over the crates that do the work:
//!
//! | module | crate | owns |
//! |---|---|---|
//! | [`tensor`] | `elapid-tensor` | tensors, ragged batches, random numbers, autograd |
//! | [`ops`] | `elapid-ops` | operations: reference, fast version and gradient of each |
//! | [`models`] | `elapid-models` | mixers, blocks, language models, their state |
//! | [`formats`] | `elapid-formats` | model folders, state files, checkpoints |
//! | [`data`] | `elapid-data` | bytes and synthetic tasks, packing, prefetch |
//! | [`train`] | `elapid-train` | the training loop |
//! | [`infer`] | `elapid-infer` | sampling and generation |
//! | [`eval`] | `elapid-eval` | perplexity, divergence from another model |
//!
//! Generating from a model:
//!
//! ```
//! use std::ops::ControlFlow;
//!
//! use elapid::{LanguageModel, MambaConfig, ModelRunner, Options, Request, Sampling, generate};
//!
//! // A byte-level model with random weights; `elapid::formats::hf::load_model` reads a trained one.
//! let model = LanguageModel::new(&MambaConfig::bytes(32, 2), 0)?;
//! let request = Request { prompt: b"The snake ".map(u32::from).to_vec(), ..Request::default() };
//! let options = Options {
//!     sampling: Sampling { temperature: 0.8, seed: 1, ..Sampling::default() },
//!     max_tokens: 16,
//!     ..Options::default()
//! };
//! let generation = generate(&mut ModelRunner::new(&model), &[request], &options, &mut |event| {
//!     print!("{}", event.text);
//!     ControlFlow::Continue(())
//! })?;
//! let generated = &generation.sequences[0];
//! assert_eq!(generated.tokens.len(), 16);
//! // The state has read the prompt and all new tokens but the last.
//! assert_eq!(generated.state.positions, [10 + 15]);
//! # Ok::<(), elapid::infer::Error>(())
//! ```

pub use elapid_data as data;
pub use elapid_eval as eval;
pub use elapid_formats as formats;
pub use elapid_infer as infer;
pub use elapid_models as models;
pub use elapid_ops as ops;
pub use elapid_tensor as tensor;
pub use elapid_train as train;

pub use elapid_infer::{Generation, ModelRunner, Options, Request, Runner, Sampling, generate};
pub use elapid_models::{Context, LanguageModel, MambaConfig, State};
pub use elapid_tensor::{Device, Sequences, Tensor};
