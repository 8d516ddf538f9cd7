//! The `[model]` table: a preset, or the shape written out, or both (what is written wins over the
//! preset), or the folder of a model to continue from, whose own shape then holds.
//!
//! The shape itself, its presets, defaults and limits are [`MambaConfig`]'s, but for one default: the
//! vocabulary is that of raw bytes.

use std::fmt;
use std::path::PathBuf;

use elapid_models::{DtInit, MambaConfig, NormKind};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::check::Check;
use super::keys::nearest;
use crate::error::{Error, Place, Result};

/// The `[model]` table as it is written; every key may be left out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelConfig {
    /// Name of a published shape: `mamba-130m` .. `mamba-2.8b`, `mambabyte-353m` .. `mambabyte-1.6b`.
    pub preset: Option<String>,
    /// Folder of an existing model to start from; it brings its own shape.
    pub init_from: Option<PathBuf>,
    /// Residual width D.
    pub d_model: Option<usize>,
    /// Number of Mamba blocks.
    pub n_layer: Option<usize>,
    /// State per channel N (16).
    pub d_state: Option<usize>,
    /// Convolution taps W (4).
    pub d_conv: Option<usize>,
    /// Inner width E as a multiple of D (2).
    pub expand: Option<usize>,
    /// Rank R of the Δ projection: a number, or "auto" for ceil(D / 16) ("auto").
    pub dt_rank: Option<DtRank>,
    /// Vocabulary V before padding (256: raw bytes).
    pub vocab_size: Option<usize>,
    /// The vocabulary is padded to a multiple of this (8).
    pub pad_vocab_size_multiple: Option<usize>,
    /// "rms" for RMSNorm, "layer" for LayerNorm with bias ("rms").
    pub norm: Option<NormKind>,
    /// Added to the mean square or variance inside the norms (1e-5).
    pub norm_eps: Option<f64>,
    /// Use the embedding as the output head (true).
    pub tie_embeddings: Option<bool>,
    /// FalconMamba: normalise Δ's input, B and C, with this added to the mean square (no such norms).
    pub mixer_rms_eps: Option<f64>,
    /// Keep the residual stream in f32 whatever the compute type (true).
    pub residual_in_fp32: Option<bool>,
    /// Bias of the convolution (true).
    pub conv_bias: Option<bool>,
    /// Biases of the input and output projections (false).
    pub bias: Option<bool>,
    /// "random" or "constant" initial Δ projection ("random").
    pub dt_init: Option<DtInit>,
    /// Scale of the initial Δ projection (1).
    pub dt_scale: Option<f64>,
    /// Smallest initial Δ of the log-uniform draw (1e-3).
    pub dt_min: Option<f64>,
    /// Largest initial Δ of the log-uniform draw (1e-1).
    pub dt_max: Option<f64>,
    /// Initial Δ is at least this (1e-4).
    pub dt_init_floor: Option<f64>,
    /// Standard deviation of the embedding's initial values (0.02).
    pub embedding_std: Option<f64>,
}

/// Rank of the Δ projection as written in a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DtRank {
    /// ceil(D / 16).
    Auto,
    /// This many.
    Rank(usize),
}

impl ModelConfig {
    /// The whole shape, or `None` when the model comes from a folder that brings its own.
    ///
    /// In a configuration that passed [`super::RunConfig::validate`] every value makes sense;
    /// otherwise an unknown preset counts as none, and a missing width or depth is 0.
    pub fn shape(&self) -> Option<MambaConfig> {
        if self.init_from.is_some() {
            return None;
        }
        let preset = self.preset.as_ref().and_then(|name| MambaConfig::preset(name).ok());
        let base = preset.unwrap_or_else(|| MambaConfig::bytes(0, 0));
        Some(MambaConfig {
            d_model: self.d_model.unwrap_or(base.d_model),
            n_layer: self.n_layer.unwrap_or(base.n_layer),
            vocab_size: self.vocab_size.unwrap_or(base.vocab_size),
            d_state: self.d_state.unwrap_or(base.d_state),
            d_conv: self.d_conv.unwrap_or(base.d_conv),
            expand: self.expand.unwrap_or(base.expand),
            dt_rank: match self.dt_rank {
                Some(DtRank::Rank(rank)) => Some(rank),
                Some(DtRank::Auto) | None => base.dt_rank,
            },
            dt_min: self.dt_min.unwrap_or(base.dt_min),
            dt_max: self.dt_max.unwrap_or(base.dt_max),
            dt_init: self.dt_init.unwrap_or(base.dt_init),
            dt_scale: self.dt_scale.unwrap_or(base.dt_scale),
            dt_init_floor: self.dt_init_floor.unwrap_or(base.dt_init_floor),
            embedding_std: self.embedding_std.unwrap_or(base.embedding_std),
            conv_bias: self.conv_bias.unwrap_or(base.conv_bias),
            bias: self.bias.unwrap_or(base.bias),
            norm: self.norm.unwrap_or(base.norm),
            norm_eps: self.norm_eps.unwrap_or(base.norm_eps),
            residual_in_fp32: self.residual_in_fp32.unwrap_or(base.residual_in_fp32),
            pad_vocab_size_multiple: self
                .pad_vocab_size_multiple
                .unwrap_or(base.pad_vocab_size_multiple),
            tie_embeddings: self.tie_embeddings.unwrap_or(base.tie_embeddings),
            mixer_rms_eps: self.mixer_rms_eps.or(base.mixer_rms_eps),
        })
    }

    /// The shape of a model that starts afresh, checked.
    ///
    /// # Errors
    /// A value makes no sense, or `init_from` names a folder that brings its own shape.
    pub fn mamba(&self) -> Result<MambaConfig> {
        self.validate(&Check { place: &|_| Place::Nowhere })?;
        self.shape().ok_or_else(|| Error::BadValue {
            place: Place::Nowhere,
            key: "model.init_from".to_string(),
            expected: "nothing, for a model that starts afresh".to_string(),
            found: format!("{:?}", self.init_from),
        })
    }

    /// The same table with every default written out.
    pub(crate) fn resolved(&self) -> Self {
        let Some(shape) = self.shape() else { return self.clone() };
        Self { preset: self.preset.clone(), ..Self::from(shape) }
    }

    pub(crate) fn validate(&self, check: &Check<'_>) -> Result<()> {
        if let Some(folder) = &self.init_from {
            // Anything but the folder itself would silently lose against the folder's own shape.
            let written = toml::Table::try_from(self).unwrap_or_default();
            let other = written.keys().find(|key| *key != "init_from");
            return check.that(
                other.is_none(),
                &format!("model.{}", other.map_or("init_from", String::as_str)),
                "to be left out beside model.init_from, which brings its own shape",
                format_args!("both (init_from = {:?})", folder.display().to_string()),
            );
        }
        if let Some(name) = &self.preset {
            let names: Vec<&str> = MambaConfig::preset_names().collect();
            let hint = match nearest(name, &names) {
                Some((near, true)) => format!("; did you mean \"{near}\"?"),
                _ => String::new(),
            };
            let expected = format!("one of {}", names.join(", "));
            let known = names.contains(&name.as_str());
            check.that(known, "model.preset", &expected, format_args!("\"{name}\"{hint}"))?;
        } else {
            let shaped = self.d_model.is_some() && self.n_layer.is_some();
            let missing = if self.d_model.is_none() { "d_model" } else { "n_layer" };
            check.that(
                shaped,
                &format!("model.{missing}"),
                "model.preset, or model.d_model and model.n_layer, or model.init_from",
                "nothing",
            )?;
        }
        match self.shape().map(|shape| shape.validate()) {
            Some(Err(elapid_models::Error::Config { key, expected, found })) => {
                check.that(false, &format!("model.{key}"), &expected, found)
            }
            Some(Err(other)) => check.that(false, "model", "a sound shape", other),
            Some(Ok(())) | None => Ok(()),
        }
    }
}

impl From<MambaConfig> for ModelConfig {
    fn from(shape: MambaConfig) -> Self {
        Self {
            preset: None,
            init_from: None,
            d_model: Some(shape.d_model),
            n_layer: Some(shape.n_layer),
            d_state: Some(shape.d_state),
            d_conv: Some(shape.d_conv),
            expand: Some(shape.expand),
            dt_rank: Some(shape.dt_rank.map_or(DtRank::Auto, DtRank::Rank)),
            vocab_size: Some(shape.vocab_size),
            pad_vocab_size_multiple: Some(shape.pad_vocab_size_multiple),
            norm: Some(shape.norm),
            norm_eps: Some(shape.norm_eps),
            tie_embeddings: Some(shape.tie_embeddings),
            mixer_rms_eps: shape.mixer_rms_eps,
            residual_in_fp32: Some(shape.residual_in_fp32),
            conv_bias: Some(shape.conv_bias),
            bias: Some(shape.bias),
            dt_init: Some(shape.dt_init),
            dt_scale: Some(shape.dt_scale),
            dt_min: Some(shape.dt_min),
            dt_max: Some(shape.dt_max),
            dt_init_floor: Some(shape.dt_init_floor),
            embedding_std: Some(shape.embedding_std),
        }
    }
}

impl Serialize for DtRank {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Rank(rank) => serializer.serialize_u64(*rank as u64),
        }
    }
}

impl<'de> Deserialize<'de> for DtRank {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Rank;
        impl Visitor<'_> for Rank {
            type Value = DtRank;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"auto\" or a whole number")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> std::result::Result<DtRank, E> {
                match text {
                    "auto" => Ok(DtRank::Auto),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_i64<E: de::Error>(self, rank: i64) -> std::result::Result<DtRank, E> {
                let unexpected = de::Unexpected::Signed(rank);
                usize::try_from(rank)
                    .map(DtRank::Rank)
                    .map_err(|_| E::invalid_value(unexpected, &self))
            }
        }
        deserializer.deserialize_any(Rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_values_win_over_the_preset() {
        let config = ModelConfig {
            preset: Some("mamba-130m".into()),
            vocab_size: Some(256),
            d_model: Some(100),
            ..Default::default()
        };
        let shape = config.shape().unwrap();
        assert_eq!((shape.vocab_size, shape.d_model, shape.n_layer), (256, 100, 24));
        assert_eq!(shape.dt_rank(), 7, "ceil(100 / 16)");
        assert_eq!(config.resolved().shape().unwrap(), shape);
        assert_eq!(config.mamba().unwrap(), shape);
        assert!(ModelConfig { d_state: Some(0), ..config }.mamba().is_err());
        let folder = ModelConfig { init_from: Some("model".into()), ..Default::default() };
        assert!(folder.mamba().unwrap_err().to_string().contains("model.init_from"));
    }

    #[test]
    fn a_preset_alone_is_that_preset() {
        for name in MambaConfig::preset_names() {
            let config = ModelConfig { preset: Some(name.into()), ..Default::default() };
            assert_eq!(config.shape(), MambaConfig::preset(name).ok(), "{name}");
        }
    }

    #[test]
    fn every_field_of_a_shape_can_be_written() {
        let shape = MambaConfig {
            d_model: 48,
            n_layer: 3,
            vocab_size: 17,
            d_state: 5,
            d_conv: 3,
            expand: 3,
            dt_rank: Some(9),
            dt_min: 0.002,
            dt_max: 0.2,
            dt_init: DtInit::Constant,
            dt_scale: 2.0,
            dt_init_floor: 1e-5,
            embedding_std: 0.3,
            conv_bias: false,
            bias: true,
            norm: NormKind::Layer,
            norm_eps: 1e-6,
            residual_in_fp32: false,
            pad_vocab_size_multiple: 4,
            tie_embeddings: false,
            mixer_rms_eps: Some(1e-7),
        };
        assert_eq!(ModelConfig::from(shape.clone()).shape(), Some(shape));
    }
}
