//! Model folders: `config.json` and `model.safetensors` as transformers writes and opens them.
//!
//! Parameter names are those of the Hugging Face layout; the original layout's `backbone.embedding.weight`
//! and configuration are read too. Convolution taps are [E, 1, W] in files, [E, W] in the model. Weights
//! are f32, bf16 or f16 in files, f32 in the model; a tied head is left out when writing. Models with
//! LayerNorm (`"rms_norm": false`) use the same names, though transformers itself knows RMSNorm only.

mod config;
mod original;
mod save;

pub use config::{config_from_json, config_to_json, load_config, parse_config, read_config_object};
pub(crate) use original::config_to_original_json;
pub use save::save_model;
pub(crate) use save::write_model_files;

pub use crate::model_source::{load_model, load_weights};

/// The configuration's file name.
pub const CONFIG_FILE: &str = "config.json";
/// The weights' file name.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// The file name of the list of shards.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

pub(crate) const EMBEDDINGS: &str = "backbone.embeddings.weight";
/// The embedding's name in the original layout.
pub(crate) const ORIGINAL_EMBEDDINGS: &str = "backbone.embedding.weight";
/// The head's name.
pub const HEAD: &str = "lm_head.weight";
