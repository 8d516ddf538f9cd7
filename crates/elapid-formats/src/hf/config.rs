//! `config.json` to and from [`MambaConfig`]. Keys that the computation does not depend on are ignored;
//! missing keys take the defaults that transformers gives them.

use std::path::Path;

use elapid_models::{DtInit, MambaConfig, NormKind};
use elapid_tensor::DType;
use serde_json::{Map, Value, json};

use crate::{Error, Result, json as special};

const MODEL_TYPES: &str = "\"mamba\" or \"falcon_mamba\"";

/// Reads the configuration of a model folder.
///
/// # Errors
/// If the file is missing or no JSON object, or describes a model that is not a Mamba.
pub fn load_config(folder: &Path) -> Result<MambaConfig> {
    let path = folder.join(super::CONFIG_FILE);
    config_from_json(&path, &special::read_object(&path)?)
}

/// The keys of a configuration file, of whatever model. A number that JSON does not know (`Infinity`, `NaN`) is an object
/// with the one key `__float__`.
///
/// # Errors
/// If the file is missing or no JSON object.
pub fn read_config_object(path: &Path) -> Result<Map<String, Value>> {
    special::read_object(path)
}

/// Reads a configuration from the text of its file; `path` is for errors.
///
/// # Errors
/// As [`load_config`].
pub fn parse_config(path: &Path, text: &[u8]) -> Result<MambaConfig> {
    config_from_json(path, &special::parse_object(path, text)?)
}

/// A configuration in the Hugging Face layout, or in the original one, which has `d_model` and no
/// `model_type`. `path` is for errors.
///
/// # Errors
/// [`Error::Config`] that names the key.
pub fn config_from_json(path: &Path, object: &Map<String, Value>) -> Result<MambaConfig> {
    let keys = Keys { path, object, prefix: "" };
    let config = match keys.text("model_type", "")? {
        "mamba" => from_hugging_face(&keys)?,
        "falcon_mamba" => {
            let mixer_rms_eps = Some(keys.real("mixer_rms_eps", 1e-6)?);
            MambaConfig { mixer_rms_eps, ..from_hugging_face(&keys)? }
        }
        "" if object.contains_key("d_model") => super::original::from_original(&keys)?,
        "" => return Err(keys.error("model_type", MODEL_TYPES, "no such key")),
        other => return Err(keys.error("model_type", MODEL_TYPES, &format!("{other:?}"))),
    };
    config.validate().map_err(|error| Error::format(path, error.to_string()))?;
    Ok(config)
}

fn from_hugging_face(keys: &Keys<'_>) -> Result<MambaConfig> {
    let rows = keys.size("vocab_size", 50280)?;
    // Own keys: transformers only knows the padded number of rows.
    let real = keys.size("real_vocab_size", rows)?;
    let pad_vocab_size_multiple = keys.size("pad_vocab_size_multiple", 1)?;
    let (vocab_size, pad_vocab_size_multiple) =
        if real.checked_next_multiple_of(pad_vocab_size_multiple) == Some(rows) {
            (real, pad_vocab_size_multiple)
        } else if keys.object.contains_key("real_vocab_size") {
            let expected = format!("a number that rounds up to {rows} = vocab_size");
            return Err(keys.error("real_vocab_size", &expected, &real.to_string()));
        } else {
            (rows, 1)
        };
    let activation = keys.text("hidden_act", "silu")?;
    if !matches!(activation, "silu" | "swish") {
        return Err(keys.error("hidden_act", "\"silu\"", &format!("{activation:?}")));
    }
    let d_model = keys.size("hidden_size", 768)?;
    let expand = keys.size("expand", 2)?;
    let inner = expand.saturating_mul(d_model);
    let found = keys.size("intermediate_size", inner)?;
    if found != inner {
        let expected = format!("expand x hidden_size = {inner}");
        return Err(keys.error("intermediate_size", &expected, &found.to_string()));
    }
    Ok(MambaConfig {
        d_model,
        n_layer: keys.size("num_hidden_layers", 32)?,
        vocab_size,
        d_state: keys.size("state_size", 16)?,
        d_conv: keys.size("conv_kernel", 4)?,
        expand,
        dt_rank: keys.rank("time_step_rank")?,
        dt_min: keys.real("time_step_min", 1e-3)?,
        dt_max: keys.real("time_step_max", 0.1)?,
        dt_init: keys.dt_init("time_step_init_scheme")?,
        dt_scale: keys.real("time_step_scale", 1.0)?,
        dt_init_floor: keys.real("time_step_floor", 1e-4)?,
        embedding_std: keys.real("initializer_range", 0.1)?,
        conv_bias: keys.flag("use_conv_bias", true)?,
        bias: keys.flag("use_bias", true)?,
        norm: keys.norm()?,
        norm_eps: keys.real("layer_norm_epsilon", 1e-5)?,
        residual_in_fp32: keys.flag("residual_in_fp32", true)?,
        pad_vocab_size_multiple,
        tie_embeddings: keys.flag("tie_word_embeddings", true)?,
        mixer_rms_eps: None,
    })
}

/// The configuration as transformers reads it, for weights stored as `dtype`. Bytes and most other
/// vocabularies here have no special tokens, hence no ids for them.
pub fn config_to_json(config: &MambaConfig, dtype: DType) -> Value {
    let dtype = match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    };
    let dt_init = match config.dt_init {
        DtInit::Random => "random",
        DtInit::Constant => "constant",
    };
    let mut value = json!({
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "dtype": dtype,
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "vocab_size": config.padded_vocab_size(),
        "real_vocab_size": config.vocab_size,
        "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
        "state_size": config.d_state,
        "conv_kernel": config.d_conv,
        "expand": config.expand,
        "intermediate_size": config.d_inner(),
        "time_step_rank": config.dt_rank(),
        "time_step_min": config.dt_min,
        "time_step_max": config.dt_max,
        "time_step_init_scheme": dt_init,
        "time_step_scale": config.dt_scale,
        "time_step_floor": config.dt_init_floor,
        "use_conv_bias": config.conv_bias,
        "use_bias": config.bias,
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": config.residual_in_fp32,
        // transformers divides the out_proj of a model that it loads by sqrt(layers) if this is true.
        "rescale_prenorm_residual": false,
        "initializer_range": config.embedding_std,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": true,
        "bos_token_id": null,
        "eos_token_id": null,
        "pad_token_id": null,
    });
    if config.norm == NormKind::Layer {
        value["rms_norm"] = json!(false);
    }
    if let Some(eps) = config.mixer_rms_eps {
        value["model_type"] = json!("falcon_mamba");
        value["architectures"] = json!(["FalconMambaForCausalLM"]);
        value["mixer_rms_eps"] = json!(eps);
    }
    value
}

/// Typed access to the keys of an object; a missing key and `null` mean the default.
pub(super) struct Keys<'a> {
    pub path: &'a Path,
    pub object: &'a Map<String, Value>,
    /// Stands before the key in errors.
    pub prefix: &'static str,
}

impl<'a> Keys<'a> {
    pub(super) fn error(&self, key: &str, expected: &str, found: &str) -> Error {
        Error::Config {
            path: self.path.into(),
            key: format!("{}{key}", self.prefix),
            expected: expected.into(),
            found: found.into(),
        }
    }

    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn read<T>(
        &self,
        key: &str,
        default: T,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<T> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => {
                read(value).ok_or_else(|| self.error(key, expected, &shortened(&value.to_string())))
            }
        }
    }

    pub(super) fn size(&self, key: &str, default: usize) -> Result<usize> {
        self.read(key, default, "a positive whole number", whole)
    }

    pub(super) fn real(&self, key: &str, default: f64) -> Result<f64> {
        self.read(key, default, "a number", special::as_f64)
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        self.read(key, default, "true or false", Value::as_bool)
    }

    pub(super) fn text(&self, key: &str, default: &'a str) -> Result<&'a str> {
        self.read(key, default, "a string", Value::as_str)
    }

    /// The rank of the Δ projection: a number or `"auto"`.
    pub(super) fn rank(&self, key: &str) -> Result<Option<usize>> {
        self.read(key, None, "\"auto\" or a positive whole number", |value| match value {
            Value::String(text) if text == "auto" => Some(None),
            number => whole(number).map(Some),
        })
    }

    /// Only matters before training; other programs have more names for it than we have schemes.
    pub(super) fn dt_init(&self, key: &str) -> Result<DtInit> {
        Ok(match self.text(key, "random")? {
            "constant" => DtInit::Constant,
            _ => DtInit::Random,
        })
    }

    pub(super) fn norm(&self) -> Result<NormKind> {
        Ok(if self.flag("rms_norm", true)? { NormKind::Rms } else { NormKind::Layer })
    }
}

/// A positive whole number, also one that was written as `2.0`.
fn whole(value: &Value) -> Option<usize> {
    let number = value.as_u64().or_else(|| {
        let real = value.as_f64()?;
        (real.fract() == 0.0 && (1.0..9e15).contains(&real)).then_some(real as u64)
    })?;
    usize::try_from(number).ok().filter(|&number| number > 0)
}

/// Enough of a value to recognise it in an error.
fn shortened(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: Value) -> Result<MambaConfig> {
        config_from_json(Path::new("config.json"), value.as_object().unwrap())
    }

    #[test]
    fn every_configuration_survives_the_round_trip() {
        let odd = MambaConfig {
            d_model: 24,
            n_layer: 3,
            vocab_size: 259,
            d_state: 5,
            d_conv: 3,
            expand: 3,
            dt_rank: Some(7),
            dt_min: 0.1 + 0.2,
            dt_max: 0.7,
            dt_init: DtInit::Constant,
            dt_scale: 0.3,
            dt_init_floor: 1e-7,
            embedding_std: 0.5,
            conv_bias: false,
            bias: true,
            norm: NormKind::Layer,
            norm_eps: 1e-6,
            residual_in_fp32: false,
            pad_vocab_size_multiple: 16,
            tie_embeddings: false,
            mixer_rms_eps: Some(1e-7),
        };
        assert_eq!(parse(config_to_json(&odd, DType::BF16)).unwrap(), odd);
        for name in MambaConfig::preset_names() {
            let config = MambaConfig::preset(name).unwrap();
            let rank = Some(config.dt_rank());
            let expected = MambaConfig { dt_rank: rank, ..config.clone() };
            assert_eq!(parse(config_to_json(&config, DType::F32)).unwrap(), expected, "{name}");
        }
    }

    #[test]
    fn initial_values_have_their_names_of_transformers() {
        let config = MambaConfig { embedding_std: 0.5, ..MambaConfig::bytes(16, 1) };
        let value = config_to_json(&config, DType::F32);
        assert_eq!(value["initializer_range"], json!(0.5));
        assert_eq!(value["time_step_max"], json!(0.1));
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let config = parse(json!({ "model_type": "mamba", "torch_dtype": "float16" })).unwrap();
        assert_eq!((config.d_model, config.n_layer), (768, 32));
        assert_eq!(config.padded_vocab_size(), 50280);
        assert!(config.bias && config.tie_embeddings && config.dt_rank() == 48);
        assert_eq!(config.embedding_std, 0.1);
    }

    #[test]
    fn the_original_configuration() {
        let config = parse(json!({
            "d_model": 64, "n_layer": 4, "vocab_size": 259, "rms_norm": false,
            "ssm_cfg": { "d_state": 8, "dt_rank": "auto", "layer": "Mamba1" },
            "residual_in_fp32": true, "fused_add_norm": true, "pad_vocab_size_multiple": 8
        }))
        .unwrap();
        assert_eq!((config.vocab_size, config.padded_vocab_size()), (259, 264));
        assert_eq!((config.d_state, config.norm, config.bias), (8, NormKind::Layer, false));
        let refused = [
            (json!({ "d_model": 64, "ssm_cfg": { "layer": "Mamba2" } }), "ssm_cfg.layer"),
            (json!({ "d_model": 64, "attn_layer_idx": [3] }), "attn_layer_idx"),
            (json!({ "d_model": 64, "d_intermediate": 128 }), "d_intermediate"),
        ];
        for (value, key) in refused {
            let error = parse(value).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn errors_name_key_and_value() {
        let cases = [
            (json!({ "model_type": "mamba2" }), vec!["model_type", "\"mamba\"", "mamba2"]),
            (json!({}), vec!["model_type"]),
            (json!({ "model_type": "mamba", "hidden_size": -3 }), vec!["hidden_size", "-3"]),
            (json!({ "model_type": "mamba", "hidden_act": "gelu" }), vec!["hidden_act", "gelu"]),
            (json!({ "model_type": "mamba", "use_bias": 1 }), vec!["use_bias", "true or false"]),
            (
                json!({ "model_type": "mamba", "intermediate_size": 5 }),
                vec!["intermediate_size", "1536", "5"],
            ),
            (
                json!({ "model_type": "mamba", "real_vocab_size": 99 }),
                vec!["real_vocab_size", "50280", "99"],
            ),
            (json!({ "model_type": "mamba", "state_size": 70000 }), vec!["d_state", "70000"]),
            (
                json!({ "model_type": "mamba", "layer_norm_epsilon": { "__float__": "Infinity" } }),
                vec!["norm_eps", "inf"],
            ),
        ];
        for (value, words) in cases {
            let error = parse(value).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
    }
}
