//! The configuration of the original layout: `d_model`, `n_layer`, `ssm_cfg`, ...

use elapid_models::MambaConfig;
use serde_json::{Map, Value};

use super::config::Keys;
use crate::Result;

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
    })
}
