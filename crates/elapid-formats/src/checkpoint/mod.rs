//! Training checkpoints: folders `step-00001000` that transformers opens as models and that training goes
//! on from.
//!
//! | file | content |
//! |---|---|
//! | `config.json`, `model.safetensors` | the model, as any model folder ([`crate::hf`]), f32 |
//! | `optimizer.safetensors` | named tensors of the optimizer: `exp_avg.{parameter}`, ... |
//! | `state.safetensors` | recurrent state carried from window to window, if there is one |
//! | `config.toml` | the resolved configuration of the run |
//! | `training.json` | step, everything else that the trainer keeps, and checksums of all files |
//!
//! A checkpoint appears whole or not at all and is verified before it is believed. `best` beside the
//! checkpoints is a text file that holds the name of the best one.

mod contents;
mod manifest;
mod store;

pub use contents::{Checkpoint, Contents};
pub use store::{Latest, Store, resolve_model};

const MANIFEST_FILE: &str = "training.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const STATE_FILE: &str = "state.safetensors";
const RUN_CONFIG_FILE: &str = "config.toml";
