//! What is told about a model: all of it where its configuration is read here, else what its tensors show.

use elapid_formats::{Error, Format, Layout, Weights, hf};
use elapid_models::{MambaConfig, NormKind};
use serde::Serialize;
use serde_json::{Map, Value};

use super::sizes::Sizes;
use crate::output::{Table, bytes, grouped};

/// What a file without a configuration lacks.
const NO_CONFIG: &str = "no config";
/// Keys of a configuration that name another architecture.
const ANOTHER: [&str; 4] = ["model_type", "ssm_cfg.layer", "attn_layer_idx", "d_intermediate"];

/// A model.
#[derive(Debug, Serialize)]
pub struct Model {
    /// As transformers names it; none if neither a configuration nor the tensors tell.
    architecture: Option<String>,
    /// Why it cannot be run, if it cannot.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
    format: String,
    layout: &'static str,
    parameters: u64,
    #[serde(flatten)]
    sizes: Sizes,
    /// Of a model that can be run.
    config: Option<MambaConfig>,
}

impl Model {
    /// The model that weights and the configuration inside or beside them make.
    ///
    /// # Errors
    /// If the configuration is damaged. None at all, and one of another architecture, are no errors.
    pub fn of(weights: &Weights) -> Result<Self, Error> {
        let (config, problem) = match weights.read_config() {
            Ok(config) => return Ok(Self::of_config(weights, config)),
            Err(_) if !weights.config_file().exists() => (Map::new(), NO_CONFIG.to_owned()),
            Err(Error::Config { key, expected, found, .. }) if ANOTHER.contains(&key.as_str()) => {
                let problem = format!("{key}: expected {expected}, found {found}");
                (hf::read_config_object(&weights.config_file())?, problem)
            }
            Err(error) => return Err(error),
        };
        let shapes = weights.tensors.iter().map(|(name, tensor)| (name.as_str(), &*tensor.shape));
        let (architecture, sizes) = Sizes::of_tensors(shapes, &config);
        let named = config.get("model_type").and_then(Value::as_str).map(str::to_owned);
        let tied = !weights.has_own_head();
        let counted =
            weights.tensors.iter().filter(|(name, _)| !(tied && name.as_str() == hf::HEAD));
        Ok(Self {
            architecture: named.or_else(|| architecture.map(str::to_owned)),
            problem: Some(problem),
            format: weights.format.to_string(),
            layout: layout(weights),
            parameters: counted.map(|(_, tensor)| tensor.elements() as u64).sum(),
            sizes,
            config: None,
        })
    }

    /// What the tensors of a GGUF file show whose weights are not read here because of a `problem`; none if they are those
    /// of no model that is known.
    pub fn of_gguf<'a>(
        tensors: impl Iterator<Item = (&'a str, &'a [usize])> + Clone,
        problem: String,
    ) -> Option<Self> {
        let (architecture, sizes) = Sizes::of_tensors(tensors.clone(), &Map::new());
        let parameters = tensors.map(|(_, shape)| shape.iter().product::<usize>() as u64).sum();
        architecture.map(|name| Self {
            architecture: Some(name.into()),
            problem: Some(problem),
            format: Format::Gguf.to_string(),
            layout: "llama.cpp",
            parameters,
            sizes,
            config: None,
        })
    }

    fn of_config(weights: &Weights, config: MambaConfig) -> Self {
        let name = if config.mixer_rms_eps.is_some() { "falcon_mamba" } else { "mamba" };
        Self {
            architecture: Some(name.into()),
            problem: None,
            format: weights.format.to_string(),
            layout: layout(weights),
            parameters: config.parameter_count() as u64,
            sizes: Sizes::of_config(&config),
            config: Some(config),
        }
    }

    /// True if a configuration or the tensors tell what it is.
    pub fn is_known(&self) -> bool {
        self.architecture.is_some()
    }

    /// Adds what people read.
    pub fn rows(&self, table: &mut Table) {
        let problem = self.problem.as_deref();
        let Some(name) = &self.architecture else {
            table.row("architecture", format!("not known: {}", problem.unwrap_or(NO_CONFIG)));
            return;
        };
        match problem {
            None => table.row("architecture", name),
            Some(NO_CONFIG) => table.row("architecture", format!("{name} ({NO_CONFIG})")),
            Some(problem) => table.row("architecture", name).row("cannot be run", problem),
        };
        table.row("format", format!("{}, names of the {} layout", self.format, self.layout));
        table.row("parameters", grouped(self.parameters));
        self.sizes.rows(table, self.config.as_ref().map(|config| config.vocab_size));
        if let Some(config) = &self.config {
            let norm = match config.norm {
                NormKind::Rms => "RMSNorm",
                NormKind::Layer => "LayerNorm",
            };
            table.row("norm", format!("{norm}, eps {:e}", config.norm_eps));
            if let Some(eps) = config.mixer_rms_eps {
                table.row("norms of Δ, B and C", format!("RMS without weights, eps {eps:e}"));
            }
            table.row("head", if config.tie_embeddings { "tied to the embedding" } else { "own" });
        }
        if let Some(floats) = self.sizes.state_floats() {
            table.row("state of a sequence", bytes(4 * floats as u64));
        }
    }
}

fn layout(weights: &Weights) -> &'static str {
    match (weights.format, weights.layout) {
        (Format::Gguf, _) => "llama.cpp",
        (_, Layout::HuggingFace) => "hf",
        (_, Layout::Original) => "original",
    }
}
