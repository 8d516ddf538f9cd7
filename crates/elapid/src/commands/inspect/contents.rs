//! What a path holds, found out from its headers, and how that is told.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use elapid_formats::checkpoint::Store;
use elapid_formats::gguf::{GgufFile, to_hugging_face};
use elapid_formats::{Bytes, Format, StateFile, TensorFile, Weights, hf};
use serde::Serialize;
use serde_json::Value;

use super::model::Model;
use super::sizes::Sizes;
use crate::model_folder;
use crate::output::{Table, bytes, grouped};

const STATE_FORMAT: &str = "elapid-state";
const MANIFEST: &str = "training.json";

/// What a path holds.
#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Model,
    Checkpoint,
    Run,
    State,
    Safetensors,
    Tensors,
}

/// All that is told about a path.
#[derive(Debug, Serialize)]
pub struct Report {
    path: String,
    kind: Kind,
    /// Of a run: the checkpoint that is described, which is the one that `--model` would take.
    checkpoint: Option<String>,
    /// Of a run: the steps that have checkpoints.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    steps: Vec<u64>,
    /// Of a checkpoint: optimizer steps done.
    step: Option<u64>,
    model: Option<Model>,
    state: Option<State>,
    files: Vec<File>,
}

#[derive(Debug, Serialize)]
struct State {
    slots: usize,
    layers: usize,
    positions: Vec<u64>,
    /// The configuration of the model that it belongs to.
    model: Value,
    checksum: &'static str,
}

#[derive(Debug, Serialize)]
struct File {
    name: String,
    format: String,
    bytes: u64,
    elements: u64,
    dtypes: BTreeMap<String, u64>,
    metadata: BTreeMap<String, String>,
    tensors: Vec<TensorEntry>,
}

#[derive(Debug, Serialize)]
struct TensorEntry {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: usize,
}

/// Looks at a path.
pub fn report(path: &Path) -> Result<Report> {
    let metadata = fs::metadata(path).with_context(|| format!("cannot open {}", path.display()))?;
    if metadata.is_dir() { folder(path) } else { file(path) }
}

fn file(path: &Path) -> Result<Report> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    if name.as_deref() == Some(hf::CONFIG_FILE) {
        return folder(path.parent().unwrap_or(Path::new(".")));
    }
    let weights = Weights::open(path);
    if let Ok(weights) = &weights
        && weights.files != [path]
    {
        // The list of shards.
        return folder(path.parent().unwrap_or(Path::new(".")));
    }
    let file = describe(path)?;
    let safetensors = file.format == Format::Safetensors.to_string();
    let is_state = file.metadata.get("format").is_some_and(|format| format == STATE_FORMAT);
    let state = if is_state { Some(state(path)?) } else { None };
    let shapes = file.tensors.iter().map(|tensor| (tensor.name.as_str(), &*tensor.shape));
    let model = match weights {
        _ if is_state => None,
        // A safetensors file may be anything, and a configuration beside it another file's.
        Ok(weights) if safetensors && !Sizes::are_told_by(shapes.clone()) => {
            (!weights.config_file().exists()).then(|| Model::of(&weights)).transpose()?
        }
        Ok(weights) => Some(Model::of(&weights)?),
        Err(error) if file.format == Format::Gguf.to_string() => {
            Model::of_gguf(shapes, error.to_string())
        }
        Err(_) => None,
    };
    Ok(Report {
        path: path.display().to_string(),
        kind: match &model {
            Some(model) if model.is_known() => Kind::Model,
            _ if is_state => Kind::State,
            _ if safetensors => Kind::Safetensors,
            _ => Kind::Tensors,
        },
        checkpoint: None,
        steps: Vec::new(),
        step: None,
        model,
        state,
        files: vec![file],
    })
}

fn state(path: &Path) -> Result<State> {
    // States are small; reading one whole proves its checksum.
    let StateFile { state, fingerprint, .. } = StateFile::read(path)?;
    Ok(State {
        slots: state.slots(),
        layers: state.layers.len(),
        positions: state.positions,
        model: serde_json::from_str(&fingerprint.config).unwrap_or(Value::Null),
        checksum: "ok",
    })
}

fn folder(path: &Path) -> Result<Report> {
    let resolved = model_folder::resolve(path)?;
    let is_run = resolved != path;
    let manifest = resolved.join(MANIFEST);
    let step = if manifest.is_file() { Some(step(&manifest)?) } else { None };
    let weights = Weights::open(&resolved)?;
    let mut names: Vec<PathBuf> = fs::read_dir(&resolved)
        .with_context(|| format!("cannot read {}", resolved.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .collect();
    names.extend(weights.files.iter().cloned());
    names.sort();
    names.dedup();
    Ok(Report {
        path: path.display().to_string(),
        kind: match (is_run, step) {
            (true, _) => Kind::Run,
            (false, Some(_)) => Kind::Checkpoint,
            (false, None) => Kind::Model,
        },
        checkpoint: is_run.then(|| resolved.display().to_string()),
        steps: match resolved.parent() {
            Some(root) if is_run => Store::new(root, 1).steps()?,
            _ => Vec::new(),
        },
        step,
        model: Some(Model::of(&weights)?),
        state: None,
        files: names.iter().map(|path| describe(path)).collect::<Result<_>>()?,
    })
}

fn step(manifest: &Path) -> Result<u64> {
    let text = fs::read(manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
    let value: Value = serde_json::from_slice(&text)
        .with_context(|| format!("{}: damaged", manifest.display()))?;
    match value.get("step").and_then(Value::as_u64) {
        Some(step) => Ok(step),
        None => bail!("{}: damaged: no step", manifest.display()),
    }
}

/// Reads the header of a file of tensors.
fn describe(path: &Path) -> Result<File> {
    let bytes = Bytes::map(path)?;
    let size = bytes.len() as u64;
    let mut tensors = Vec::new();
    let (format, metadata) = match Weights::of_file(path, bytes.clone()) {
        Ok(weights) if weights.format != Format::Safetensors => {
            for (name, tensor) in &weights.tensors {
                tensors.push(TensorEntry {
                    name: name.clone(),
                    dtype: tensor.type_name(),
                    shape: tensor.shape.clone(),
                    bytes: tensor.bytes.len(),
                });
            }
            (weights.format, weights.metadata)
        }
        // Also models that cannot be loaded: of other architectures, of other element types.
        Err(_) if bytes.starts_with(b"GGUF") => {
            let file = GgufFile::from_bytes(path, bytes)?;
            let architecture = file.architecture().unwrap_or_default();
            for tensor in file.tensors() {
                let name = to_hugging_face(architecture, &tensor.name);
                tensors.push(TensorEntry {
                    name: name.unwrap_or_else(|| tensor.name.clone()),
                    dtype: tensor.element.to_string(),
                    shape: tensor.shape.clone(),
                    bytes: tensor.range.len(),
                });
            }
            let metadata = file.metadata().iter();
            let metadata = metadata.map(|(key, value)| (key.clone(), value.to_string()));
            (Format::Gguf, metadata.collect())
        }
        Err(error) if !TensorFile::may_be(&bytes) => return Err(error.into()),
        // Tensors of every type, not only weights.
        _ => {
            let file = TensorFile::of_bytes(path, bytes)?;
            for name in file.names() {
                let shape = file.shape(&name).unwrap_or_default().to_vec();
                let dtype = file.dtype_name(&name).unwrap_or_default();
                let bytes = file.bytes(&name)?.len();
                tensors.push(TensorEntry { name, dtype, shape, bytes });
            }
            let metadata = file.metadata_entries().into_iter();
            let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_owned()));
            (Format::Safetensors, metadata.collect())
        }
    };
    tensors.sort_by(|a, b| natural(&a.name).cmp(&natural(&b.name)));
    let mut dtypes = BTreeMap::new();
    let mut elements = 0u64;
    for tensor in &tensors {
        let count = tensor.shape.iter().fold(1u64, |a, &b| a.saturating_mul(b as u64));
        elements = elements.saturating_add(count);
        *dtypes.entry(tensor.dtype.clone()).or_insert(0) += count;
    }
    Ok(File {
        name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        format: format.to_string(),
        bytes: size,
        elements,
        dtypes,
        metadata,
        tensors,
    })
}

/// A name in pieces, so that layer 10 comes after layer 9.
fn natural(name: &str) -> Vec<Result<u64, &str>> {
    name.split('.').map(|part| part.parse().map_err(|_| part)).collect()
}

impl Report {
    /// The report for people.
    pub fn to_text(&self, all_tensors: bool) -> String {
        let mut table = Table::default();
        let kind = match self.kind {
            Kind::Model if self.files.iter().any(|file| self.path.ends_with(&file.name)) => {
                "model file"
            }
            Kind::Model => "model folder",
            Kind::Checkpoint => "training checkpoint",
            Kind::Run => "training run",
            Kind::State => "recurrent state",
            Kind::Safetensors => "safetensors file",
            Kind::Tensors => "file of tensors",
        };
        if let Some(checkpoint) = &self.checkpoint {
            table.row("checkpoint", checkpoint);
        }
        if !self.steps.is_empty() {
            let steps: Vec<String> = self.steps.iter().map(u64::to_string).collect();
            table.row("checkpoints at steps", steps.join(", "));
        }
        if let Some(step) = self.step {
            table.row("step", grouped(step));
        }
        if let Some(model) = &self.model {
            model.rows(&mut table);
        }
        if let Some(state) = &self.state {
            state.rows(&mut table);
        }
        let mut text = format!("{}: {kind}\n{table}", self.path);
        for file in &self.files {
            text += "\n";
            text += &file.to_text(all_tensors, self.state.is_none());
        }
        text
    }
}

impl State {
    fn rows(&self, table: &mut Table) {
        table.row("sequences", grouped(self.slots as u64));
        table.row("layers", grouped(self.layers as u64));
        let seen: Vec<String> = self.positions.iter().take(8).map(|&p| grouped(p)).collect();
        let more = if self.positions.len() > 8 { ", ..." } else { "" };
        table.row("tokens read", seen.join(", ") + more);
        table.row("checksum", self.checksum);
        if let Value::Object(model) = &self.model {
            let sizes: Vec<String> = ["d_model", "n_layer", "d_state", "vocab_rows"]
                .iter()
                .filter_map(|key| Some(format!("{key} {}", model.get(*key)?)))
                .collect();
            table.row("of a model with", sizes.join(", "));
        }
    }
}

impl File {
    fn to_text(&self, all_tensors: bool, with_metadata: bool) -> String {
        let mut text = String::new();
        let dtypes: Vec<String> = match self.dtypes.len() {
            1 => self.dtypes.keys().cloned().collect(),
            _ => self.dtypes.iter().map(|(name, n)| format!("{} {name}", grouped(*n))).collect(),
        };
        let _ = writeln!(
            text,
            "{}  {}, {} tensors, {} elements, {}",
            self.name,
            bytes(self.bytes),
            grouped(self.tensors.len() as u64),
            grouped(self.elements),
            dtypes.join(" + ")
        );
        if with_metadata {
            for (key, value) in &self.metadata {
                let short: String = value.chars().take(80).collect();
                let dots = if short.len() < value.len() { "..." } else { "" };
                let _ = writeln!(text, "  metadata {key}: {short}{dots}");
            }
        }
        if all_tensors {
            let width = self.tensors.iter().map(|t| t.name.len()).max().unwrap_or(0);
            for tensor in &self.tensors {
                let TensorEntry { name, dtype, shape, bytes: size } = tensor;
                let size = bytes(*size as u64);
                let _ = writeln!(text, "  {name:width$}  {dtype:4}  {shape:?}  {size}");
            }
        }
        text
    }
}
