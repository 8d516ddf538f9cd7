//! The configuration of a Mamba in a GGUF file's metadata.
//!
//! Sizes stand under llama.cpp's keys. What these cannot say is told by the tensors that are there (biases, LayerNorm,
//! a head of its own), or stands in [`CONFIG_KEY`]: the text of a Hugging Face `config.json` with the initial values and
//! the number of real tokens, which other programs ignore. Where both speak, llama.cpp's keys and the tensors count.

use elapid_models::{MambaConfig, NormKind};
use elapid_tensor::DType;

use super::names::MAMBA;
use super::read::GgufFile;
use super::value::Value;
use crate::hf::{config_from_json, config_to_json};
use crate::{Error, Result};

/// The configuration's text.
pub(super) const CONFIG_KEY: &str = "elapid.config";

/// Mamba has no limit to its context; this is what llama.cpp's converter says.
const CONTEXT: u32 = 1 << 20;

/// Reads the configuration.
///
/// # Errors
/// If a key is missing or of another type, or the values make no sense.
pub(super) fn read_config(file: &GgufFile) -> Result<MambaConfig> {
    let size = |key: &str| -> Result<usize> {
        let key = format!("{MAMBA}.{key}");
        let expected = "a positive whole number";
        file.value(&key, expected, |value| {
            value.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|&size| size > 0)
        })?
        .ok_or_else(|| file.error(&key, expected, "no such key"))
    };
    let base = match file.text(CONFIG_KEY)? {
        None => MambaConfig { pad_vocab_size_multiple: 1, ..MambaConfig::default() },
        Some(text) => {
            let parsed: serde_json::Value = serde_json::from_str(text)
                .map_err(|error| file.error(CONFIG_KEY, "JSON", error))?;
            let object = parsed
                .as_object()
                .ok_or_else(|| file.error(CONFIG_KEY, "a JSON object", "other JSON"))?;
            config_from_json(file.path(), object)?
        }
    };
    let has = |name: &str| file.tensors().iter().any(|tensor| tensor.name == name);
    let d_model = size("embedding_length")?;
    let inner = size("ssm.inner_size")?;
    if !inner.is_multiple_of(d_model) {
        let expected = format!("a multiple of {MAMBA}.embedding_length = {d_model}");
        return Err(file.error("mamba.ssm.inner_size", &expected, inner));
    }
    let norm = if has("output_norm.bias") { NormKind::Layer } else { NormKind::Rms };
    let epsilon =
        |name: &str| file.value(&format!("{MAMBA}.attention.{name}"), "a number", Value::as_f64);
    let (rms, layer) = (epsilon("layer_norm_rms_epsilon")?, epsilon("layer_norm_epsilon")?);
    let norm_eps = if norm == NormKind::Layer { layer.or(rms) } else { rms.or(layer) };
    let norm_eps = norm_eps.unwrap_or(base.norm_eps);
    // llama.cpp has one eps for all norms; ours is more exact where it is there.
    let normed = file.value(&format!("{MAMBA}.ssm.dt_b_c_rms"), "true or false", Value::as_bool)?;
    let mixer_rms_eps = normed.unwrap_or(false).then(|| base.mixer_rms_eps.unwrap_or(norm_eps));
    let rows = file
        .tensors()
        .iter()
        .find(|tensor| tensor.name == "token_embd.weight")
        .and_then(|tensor| tensor.shape.first().copied())
        .ok_or_else(|| Error::format(file.path(), "has no tensor \"token_embd.weight\""))?;
    let (vocab_size, pad_vocab_size_multiple) = if base.padded_vocab_size() == rows {
        (base.vocab_size, base.pad_vocab_size_multiple)
    } else {
        (rows, 1)
    };
    let config = MambaConfig {
        d_model,
        n_layer: size("block_count")?,
        vocab_size,
        d_state: size("ssm.state_size")?,
        d_conv: size("ssm.conv_kernel")?,
        expand: inner / d_model,
        dt_rank: Some(size("ssm.time_step_rank")?),
        conv_bias: has("blk.0.ssm_conv1d.bias"),
        bias: has("blk.0.ssm_in.bias"),
        norm,
        norm_eps,
        mixer_rms_eps,
        pad_vocab_size_multiple,
        tie_embeddings: !has("output.weight"),
        ..base
    };
    config.validate().map_err(|error| Error::format(file.path(), error.to_string()))?;
    Ok(config)
}

/// The metadata of a configuration.
pub(super) fn config_metadata(config: &MambaConfig) -> Vec<(String, Value)> {
    let size = |value: usize| Value::U32(u32::try_from(value).unwrap_or(u32::MAX));
    let epsilon = match config.norm {
        NormKind::Rms => "attention.layer_norm_rms_epsilon",
        NormKind::Layer => "attention.layer_norm_epsilon",
    };
    let keys = [
        ("context_length", Value::U32(CONTEXT)),
        ("embedding_length", size(config.d_model)),
        // Mamba has neither, but readers of other architectures' keys expect them.
        ("feed_forward_length", Value::U32(0)),
        ("attention.head_count", Value::U32(0)),
        ("block_count", size(config.n_layer)),
        ("vocab_size", size(config.padded_vocab_size())),
        ("ssm.conv_kernel", size(config.d_conv)),
        ("ssm.inner_size", size(config.d_inner())),
        ("ssm.state_size", size(config.d_state)),
        ("ssm.time_step_rank", size(config.dt_rank())),
        ("ssm.dt_b_c_rms", Value::Bool(config.mixer_rms_eps.is_some())),
        (epsilon, Value::F32(config.norm_eps as f32)),
    ];
    let text = config_to_json(config, DType::F32).to_string();
    let own = (CONFIG_KEY.to_owned(), Value::Text(text));
    keys.into_iter().map(|(key, value)| (format!("{MAMBA}.{key}"), value)).chain([own]).collect()
}
