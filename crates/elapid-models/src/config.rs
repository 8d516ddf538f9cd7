//! The shape of a Mamba language model: one struct, the published sizes, and exact parameter counts.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The normalisation before each mixer and before the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormKind {
    /// RMSNorm: the released Mamba models.
    Rms,
    /// LayerNorm with bias: MambaByte.
    Layer,
}

/// How the weight of the Δ projection starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DtInit {
    /// Uniform in ±R^-½ · dt_scale.
    Random,
    /// R^-½ · dt_scale everywhere.
    Constant,
}

/// A Mamba language model (arXiv 2312.00752). Field names are those of the original configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MambaConfig {
    /// D, the width of the residual stream.
    pub d_model: usize,
    /// Number of blocks.
    pub n_layer: usize,
    /// Number of real tokens; the embedding has [`MambaConfig::padded_vocab_size`] rows.
    pub vocab_size: usize,
    /// N, the state of one channel.
    pub d_state: usize,
    /// W, the taps of the causal convolution.
    pub d_conv: usize,
    /// E / D.
    pub expand: usize,
    /// R, the rank of the Δ projection; none for ceil(D / 16).
    pub dt_rank: Option<usize>,
    /// Smallest initial Δ.
    pub dt_min: f64,
    /// Largest initial Δ.
    pub dt_max: f64,
    /// How the Δ projection starts.
    pub dt_init: DtInit,
    /// Factor of the Δ projection's initial size.
    pub dt_scale: f64,
    /// Initial Δ is never below this.
    pub dt_init_floor: f64,
    /// Standard deviation of the embedding's initial values.
    pub embedding_std: f64,
    /// Bias of the convolution.
    pub conv_bias: bool,
    /// Bias of the input and output projections.
    pub bias: bool,
    /// The normalisation.
    pub norm: NormKind,
    /// Added to the mean square or variance.
    pub norm_eps: f64,
    /// Keep the residual stream in f32 (always so on the CPU).
    pub residual_in_fp32: bool,
    /// Rows of the embedding are rounded up to a multiple of this.
    pub pad_vocab_size_multiple: usize,
    /// The head is the embedding.
    pub tie_embeddings: bool,
    /// FalconMamba: Δ before its projection, B and C are normalised (RMS without weights) with this eps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mixer_rms_eps: Option<f64>,
}

impl Default for MambaConfig {
    fn default() -> Self {
        Self {
            d_model: 2560,
            n_layer: 64,
            vocab_size: 50277,
            d_state: 16,
            d_conv: 4,
            expand: 2,
            dt_rank: None,
            dt_min: 1e-3,
            dt_max: 0.1,
            dt_init: DtInit::Random,
            dt_scale: 1.0,
            dt_init_floor: 1e-4,
            embedding_std: 0.02,
            conv_bias: true,
            bias: false,
            norm: NormKind::Rms,
            norm_eps: 1e-5,
            residual_in_fp32: true,
            pad_vocab_size_multiple: 8,
            tie_embeddings: true,
            mixer_rms_eps: None,
        }
    }
}

/// Name, layers and width of the published sizes; the last three are byte-level.
const PRESETS: [(&str, usize, usize); 8] = [
    ("mamba-130m", 24, 768),
    ("mamba-370m", 48, 1024),
    ("mamba-790m", 48, 1536),
    ("mamba-1.4b", 48, 2048),
    ("mamba-2.8b", 64, 2560),
    ("mambabyte-353m", 53, 1024),
    ("mambabyte-972m", 48, 1792),
    ("mambabyte-1.6b", 48, 2304),
];

impl MambaConfig {
    /// A published size: `mamba-130m`, `-370m`, `-790m`, `-1.4b`, `-2.8b` (Mamba, table 10), or
    /// `mambabyte-353m`, `-972m`, `-1.6b` (MambaByte: 256 bytes, LayerNorm with bias).
    ///
    /// # Errors
    /// For any other name, listing these.
    pub fn preset(name: &str) -> Result<Self> {
        let Some(&(_, n_layer, d_model)) = PRESETS.iter().find(|preset| preset.0 == name) else {
            return Err(Error::UnknownPreset {
                name: name.into(),
                known: Self::preset_names().collect::<Vec<_>>().join(", "),
            });
        };
        let base = Self { n_layer, d_model, ..Self::default() };
        Ok(if name.starts_with("mambabyte") {
            Self { vocab_size: 256, norm: NormKind::Layer, ..base }
        } else {
            base
        })
    }

    /// The names that [`MambaConfig::preset`] knows.
    pub fn preset_names() -> impl Iterator<Item = &'static str> {
        PRESETS.iter().map(|preset| preset.0)
    }

    /// A byte-level model (vocabulary 256) with RMSNorm.
    pub fn bytes(d_model: usize, n_layer: usize) -> Self {
        Self { d_model, n_layer, vocab_size: 256, ..Self::default() }
    }

    /// E, the inner width.
    pub fn d_inner(&self) -> usize {
        self.expand * self.d_model
    }

    /// R, the rank of the Δ projection.
    pub fn dt_rank(&self) -> usize {
        self.dt_rank.unwrap_or(self.d_model.div_ceil(16))
    }

    /// V, the rows of the embedding.
    pub fn padded_vocab_size(&self) -> usize {
        self.vocab_size.next_multiple_of(self.pad_vocab_size_multiple.max(1))
    }

    /// Number of parameters, a tied head counted once.
    pub fn parameter_count(&self) -> usize {
        let (d, e, n, r) = (self.d_model, self.d_inner(), self.d_state, self.dt_rank());
        let norm = match self.norm {
            NormKind::Rms => d,
            NormKind::Layer => 2 * d,
        };
        let bias = if self.bias { 2 * e + d } else { 0 };
        let conv = e * (self.d_conv + usize::from(self.conv_bias));
        let mixer = 2 * e * d + conv + (r + 2 * n) * e + e * (r + 1) + e * n + e + d * e + bias;
        let embeddings = if self.tie_embeddings { 1 } else { 2 };
        embeddings * self.padded_vocab_size() * d + self.n_layer * (mixer + norm) + norm
    }

    /// Checks every value.
    ///
    /// # Errors
    /// [`Error::Config`] for the first that makes no sense.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("d_model", self.d_model),
            ("n_layer", self.n_layer),
            ("vocab_size", self.vocab_size),
            ("d_state", self.d_state),
            ("d_conv", self.d_conv),
            ("expand", self.expand),
            ("dt_rank", self.dt_rank()),
            ("pad_vocab_size_multiple", self.pad_vocab_size_multiple),
        ];
        for (key, value) in sizes {
            // 2^24 is far above every real model and keeps products of two sizes within 64 bits.
            if value == 0 || value > 1 << 24 {
                return Err(Error::Config {
                    key,
                    expected: "1 to 16777216".into(),
                    found: value.to_string(),
                });
            }
        }
        if self.d_state > 256 {
            return Err(Error::Config {
                key: "d_state",
                expected: "1 to 256".into(),
                found: self.d_state.to_string(),
            });
        }
        let reals = [
            ("dt_min", self.dt_min),
            ("dt_max", self.dt_max),
            ("dt_scale", self.dt_scale),
            ("dt_init_floor", self.dt_init_floor),
            ("embedding_std", self.embedding_std),
            ("norm_eps", self.norm_eps),
            ("mixer_rms_eps", self.mixer_rms_eps.unwrap_or(1.0)),
        ];
        for (key, value) in reals {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Error::Config {
                    key,
                    expected: "a positive number".into(),
                    found: value.to_string(),
                });
            }
        }
        if self.dt_min > self.dt_max {
            return Err(Error::Config {
                key: "dt_min",
                expected: format!("at most dt_max = {}", self.dt_max),
                found: self.dt_min.to_string(),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_parameter_counts() {
        // Mamba: V = 50280 tied. MambaByte: counts of the paper's widths, plus (layers + 1) · D for the
        // biases of LayerNorm.
        let expected = [
            ("mamba-130m", 129_135_360),
            ("mamba-370m", 371_516_416),
            ("mamba-790m", 793_204_224),
            ("mamba-1.4b", 1_372_178_432),
            ("mamba-2.8b", 2_768_345_600),
            ("mambabyte-353m", 353_628_160 + 54 * 1024),
            ("mambabyte-972m", 973_387_520 + 49 * 1792),
            ("mambabyte-1.6b", 1_605_392_640 + 49 * 2304),
        ];
        for (name, count) in expected {
            assert_eq!(MambaConfig::preset(name).unwrap().parameter_count(), count, "{name}");
        }
        let dna = |n_layer, d_model| {
            MambaConfig {
                n_layer,
                d_model,
                vocab_size: 12,
                pad_vocab_size_multiple: 16,
                ..MambaConfig::default()
            }
            .parameter_count()
        };
        // The DNA sizes of the paper (table 12), twice the Transformer's blocks, 16 padded tokens.
        let sizes = [(8, 64), (10, 96), (12, 128), (14, 192), (16, 256), (20, 384), (24, 512)];
        let counts = [262_720, 684_192, 1_401_472, 3_527_232, 7_012_608, 19_291_008, 40_694_272];
        for ((n_layer, d_model), count) in sizes.into_iter().zip(counts) {
            assert_eq!(dna(n_layer, d_model), count);
        }
    }

    #[test]
    fn unknown_presets_and_absurd_values_are_refused() {
        let error = MambaConfig::preset("mamba-3b").unwrap_err().to_string();
        assert!(error.contains("mamba-3b") && error.contains("mamba-2.8b"), "{error}");
        let zero = MambaConfig { d_state: 0, ..MambaConfig::bytes(16, 1) };
        assert!(zero.validate().unwrap_err().to_string().contains("d_state"));
        let nan = MambaConfig { norm_eps: f64::NAN, ..MambaConfig::bytes(16, 1) };
        assert!(nan.validate().unwrap_err().to_string().contains("norm_eps"));
        for std in [0.0, -0.5, f64::INFINITY, f64::NAN] {
            let config = MambaConfig { embedding_std: std, ..MambaConfig::bytes(16, 1) };
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains("embedding_std") && error.contains("positive"), "{error}");
        }
        assert!(MambaConfig::bytes(16, 1).validate().is_ok());
    }
}
