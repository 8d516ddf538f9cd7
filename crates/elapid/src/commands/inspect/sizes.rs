//! The sizes of a model, from its configuration or from the shapes of its tensors.
//!
//! Mamba has `x_proj` in its mixers, Mamba-2 `dt_bias`. FalconMamba's further norms have no weights, so that its
//! tensors are those of Mamba; and what Mamba-2's tensors hold of B and C is groups times state, which only a
//! configuration divides.

use std::collections::{BTreeMap, BTreeSet};

use elapid_models::MambaConfig;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::output::Table;

/// What tensors alone tell.
const MAMBA: &str = "mamba or falcon_mamba";
const MAMBA2: &str = "mamba2";
/// N of a Mamba-2 whose configuration does not say.
const MAMBA2_STATE: u64 = 128;

/// What is known of the sizes.
#[derive(Debug, Default, Serialize)]
pub struct Sizes {
    #[serde(skip_serializing_if = "Option::is_none")]
    layers: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    d_model: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    d_inner: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    d_state: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    d_conv: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dt_rank: Option<usize>,
    /// Of Mamba-2, likewise the next three.
    #[serde(skip_serializing_if = "Option::is_none")]
    heads: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    head_width: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    groups: Option<usize>,
    /// B's width, which is C's.
    #[serde(skip_serializing_if = "Option::is_none")]
    groups_times_state: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vocabulary_rows: Option<usize>,
}

impl Sizes {
    /// Those of a model that can be run.
    pub fn of_config(config: &MambaConfig) -> Self {
        Self {
            layers: Some(config.n_layer),
            d_model: Some(config.d_model),
            d_inner: Some(config.d_inner()),
            d_state: Some(config.d_state),
            d_conv: Some(config.d_conv),
            dt_rank: Some(config.dt_rank()),
            vocabulary_rows: Some(config.padded_vocab_size()),
            ..Self::default()
        }
    }

    /// The architecture that names and shapes show, and its sizes; `config` may be empty.
    pub fn of_tensors<'a>(
        tensors: impl Iterator<Item = (&'a str, &'a [usize])>,
        config: &Map<String, Value>,
    ) -> (Option<&'static str>, Self) {
        let mut layers = BTreeSet::new();
        let mut shapes = BTreeMap::new();
        let mut sizes = Self::default();
        for (name, shape) in tensors {
            if let ("backbone.embeddings.weight" | "backbone.embedding.weight", &[rows, width]) =
                (name, shape)
            {
                (sizes.vocabulary_rows, sizes.d_model) = (Some(rows), Some(width));
            }
            let parts = name.strip_prefix("backbone.layers.").and_then(|rest| rest.split_once('.'));
            let Some((Ok(layer), part)) = parts.map(|(layer, part)| (layer.parse::<usize>(), part))
            else {
                continue;
            };
            layers.insert(layer);
            // A file may hold some layers only; all are alike.
            shapes.entry(part).or_insert(shape);
        }
        let shape = |part: &str| shapes.get(part).copied();
        let is_mamba2 = shape("mixer.dt_bias").is_some();
        if !is_mamba2 && shape("mixer.x_proj.weight").is_none() {
            return (None, Self::default());
        }
        sizes.layers = Some(layers.len());
        let taps = shape("mixer.conv1d.weight");
        sizes.d_conv = taps.and_then(<[usize]>::last).copied();
        if let Some(&[width, inner]) = shape("mixer.out_proj.weight") {
            (sizes.d_model, sizes.d_inner) = (Some(width), Some(inner));
        }
        if is_mamba2 {
            let channels = taps.and_then(<[usize]>::first).copied();
            sizes.divide_mamba2(shape("mixer.dt_bias"), channels, config);
            return (Some(MAMBA2), sizes);
        }
        if let Some(&[_, state]) = shape("mixer.A_log") {
            sizes.d_state = Some(state);
        }
        if let Some(&[_, rank]) = shape("mixer.dt_proj.weight") {
            sizes.dt_rank = Some(rank);
        }
        (Some(MAMBA), sizes)
    }

    /// True if names and shapes are those of a model that is known.
    pub fn are_told_by<'a>(tensors: impl Iterator<Item = (&'a str, &'a [usize])>) -> bool {
        Self::of_tensors(tensors, &Map::new()).0.is_some()
    }

    /// Heads, groups and state of a Mamba-2 from Δ's bias [H], the convolution's channels E + 2GN, and the configuration
    /// of either layout.
    fn divide_mamba2(
        &mut self,
        bias: Option<&[usize]>,
        channels: Option<usize>,
        config: &Map<String, Value>,
    ) {
        let Some((inner, &[heads])) = self.d_inner.zip(bias) else { return };
        self.heads = Some(heads);
        self.head_width = inner.checked_div(heads);
        let both = channels.and_then(|channels| channels.checked_sub(inner));
        self.groups_times_state = both.map(|both| both / 2);
        if config.is_empty() {
            return;
        }
        let original = config.get("ssm_cfg").and_then(|own| own.get("d_state"));
        let state = config.get("state_size").or(original);
        let state = state.map_or(Some(MAMBA2_STATE), Value::as_u64);
        self.d_state = state.and_then(|state| usize::try_from(state).ok());
        self.groups = self
            .groups_times_state
            .zip(self.d_state)
            .and_then(|(all, state)| all.checked_div(state));
    }

    /// Floats that a sequence's state has, if all sizes that it depends on are known.
    pub fn state_floats(&self) -> Option<usize> {
        let taps = self.d_conv?.saturating_sub(1);
        let inner = self.d_inner?;
        let channels = inner + 2 * self.groups_times_state.unwrap_or(0);
        Some(self.layers? * (inner * self.d_state? + channels * taps))
    }

    /// Adds what people read; `vocabulary` is the number of tokens without padding, if that is known.
    pub fn rows(&self, table: &mut Table, vocabulary: Option<usize>) {
        let known = [
            ("layers", self.layers),
            ("width D", self.d_model),
            ("inner width E", self.d_inner),
            ("heads", self.heads),
            ("width of a head", self.head_width),
            ("groups G", self.groups),
            ("state N", self.d_state),
            // Told apart by a configuration only.
            ("groups x state", self.groups_times_state.filter(|_| self.d_state.is_none())),
            ("conv taps W", self.d_conv),
            ("Δ rank R", self.dt_rank),
        ];
        for (label, size) in known {
            if let Some(size) = size {
                table.row(label, size.to_string());
            }
        }
        if let Some(rows) = self.vocabulary_rows {
            let text = match vocabulary.unwrap_or(rows) {
                256 => "256 (bytes)".into(),
                real if real == rows => real.to_string(),
                real => format!("{real} (padded to {rows})"),
            };
            table.row("vocabulary V", text);
        }
    }
}
