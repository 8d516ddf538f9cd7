//! The configuration of the original layout: `d_model`, `n_layer`, `ssm_cfg`, ...

use std::path::Path;

use elapid_models::{DtInit, MambaConfig, NormKind};
use serde_json::{Map, Value, json};

use super::config::Keys;
use crate::{Error, Result};

pub(super) fn from_original(keys: &Keys<'_>) -> Result<MambaConfig> {
    let base = MambaConfig::default();
    let unsupported = ["d_intermediate", "attn_layer_idx"].into_iter().find(|key| {
        keys.get(key).is_some_and(|value| match value {
            Value::Array(items) => !items.is_empty(),
            number => number.as_f64() != Some(0.0),
        })
    });
    if let Some(key) = unsupported {
        let found = keys.get(key).map(Value::to_string).unwrap_or_default();
        return Err(keys.error(key, "none: Mamba blocks only", &found));
    }
    let empty = Map::new();
    let ssm = match keys.get("ssm_cfg") {
        None => &empty,
        Some(Value::Object(object)) => object,
        Some(other) => return Err(keys.error("ssm_cfg", "an object", &other.to_string())),
    };
    let ssm = Keys { path: keys.path, object: ssm, prefix: "ssm_cfg." };
    let layer = ssm.text("layer", "Mamba1")?;
    if layer != "Mamba1" {
        return Err(ssm.error("layer", "\"Mamba1\"", &format!("{layer:?}")));
    }
    Ok(MambaConfig {
        d_model: keys.size("d_model", base.d_model)?,
        n_layer: keys.size("n_layer", base.n_layer)?,
        vocab_size: keys.size("vocab_size", base.vocab_size)?,
        d_state: ssm.size("d_state", base.d_state)?,
        d_conv: ssm.size("d_conv", base.d_conv)?,
        expand: ssm.size("expand", base.expand)?,
        dt_rank: ssm.rank("dt_rank")?,
        dt_min: ssm.real("dt_min", base.dt_min)?,
        dt_max: ssm.real("dt_max", base.dt_max)?,
        dt_init: ssm.dt_init("dt_init")?,
        dt_scale: ssm.real("dt_scale", base.dt_scale)?,
        dt_init_floor: ssm.real("dt_init_floor", base.dt_init_floor)?,
        // An argument of the original code, not part of its configuration.
        embedding_std: base.embedding_std,
        conv_bias: ssm.flag("conv_bias", base.conv_bias)?,
        bias: ssm.flag("bias", base.bias)?,
        norm: keys.norm()?,
        norm_eps: keys.real("norm_epsilon", base.norm_eps)?,
        residual_in_fp32: keys.flag("residual_in_fp32", base.residual_in_fp32)?,
        pad_vocab_size_multiple: keys
            .size("pad_vocab_size_multiple", base.pad_vocab_size_multiple)?,
        tie_embeddings: keys.flag("tie_embeddings", base.tie_embeddings)?,
        mixer_rms_eps: None,
    })
}

/// The configuration as the original code reads it; keys that have its defaults are left out where it has no
/// name for them at the top. `folder` is for errors.
///
/// # Errors
/// If the layout cannot say what the model is.
pub(crate) fn config_to_original_json(config: &MambaConfig, folder: &Path) -> Result<Value> {
    if let Some(eps) = config.mixer_rms_eps {
        let message = format!(
            "the original layout has no norms of Δ, B and C (mixer_rms_eps = {eps:e}); write another format, such as pytorch_model.bin in the Hugging Face layout"
        );
        return Err(Error::format(folder, message));
    }
    let base = MambaConfig::default();
    let mut ssm = Map::new();
    let mut put = |key: &str, differs: bool, value: Value| {
        if differs {
            ssm.insert(key.into(), value);
        }
    };
    put("d_state", config.d_state != base.d_state, json!(config.d_state));
    put("d_conv", config.d_conv != base.d_conv, json!(config.d_conv));
    put("expand", config.expand != base.expand, json!(config.expand));
    let usual_rank = config.d_model.div_ceil(16);
    put("dt_rank", config.dt_rank() != usual_rank, json!(config.dt_rank()));
    put("dt_min", config.dt_min != base.dt_min, json!(config.dt_min));
    put("dt_max", config.dt_max != base.dt_max, json!(config.dt_max));
    put("dt_init", config.dt_init == DtInit::Constant, json!("constant"));
    put("dt_scale", config.dt_scale != base.dt_scale, json!(config.dt_scale));
    put("dt_init_floor", config.dt_init_floor != base.dt_init_floor, json!(config.dt_init_floor));
    put("conv_bias", config.conv_bias != base.conv_bias, json!(config.conv_bias));
    put("bias", config.bias != base.bias, json!(config.bias));
    let mut value = json!({
        "d_model": config.d_model,
        "n_layer": config.n_layer,
        "vocab_size": config.vocab_size,
        "ssm_cfg": ssm,
        "rms_norm": config.norm == NormKind::Rms,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": true,
        "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
        "tie_embeddings": config.tie_embeddings,
    });
    if config.norm_eps != base.norm_eps {
        value["norm_epsilon"] = json!(config.norm_eps);
    }
    Ok(value)
}
