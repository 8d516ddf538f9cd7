//! Files of recurrent state: safetensors with `layers.{i}.{name}` (for Mamba `conv_state` [S,E,W-1], oldest
//! first, and `ssm_state` [S,E,N]), perhaps `logits` [S,V] that the last tokens predict, and in the metadata what makes the file safe to go on from:
//!
//! | key | value |
//! |---|---|
//! | `format`, `version` | `elapid-state`, `1` |
//! | `model` | the configuration values that the state depends on, as JSON |
//! | `weights` | hash of the parameters, if it was taken |
//! | `positions` | tokens that each slot has seen, as a JSON array |
//! | `checksum` | XXH3-128 over all of the above and the tensors |

use std::path::Path;

use elapid_models::{LanguageModel, LayerState, MambaConfig, State};
use elapid_tensor::{DType, Tensor};
use xxhash_rust::xxh3::Xxh3;

use crate::fingerprint::{from_hex, hex};
use crate::tensor_file::{Entry, Metadata, TensorFile, write_tensors};
use crate::{Error, Fingerprint, Result, atomic, state_hash};

const FORMAT: &str = "elapid-state";
const VERSION: &str = "1";
const LOGITS: &str = "logits";

/// A state as read from a file, and the model that it belongs to.
#[derive(Debug)]
pub struct StateFile {
    /// The state.
    pub state: State,
    /// [S,V]: what the last token of each slot predicts, if that was saved too.
    pub logits: Option<Tensor>,
    /// The model that it was made by.
    pub fingerprint: Fingerprint,
}

/// Writes a state, atomically. `fingerprint` is that of the model that made it.
///
/// # Errors
/// If a tensor is not f32 or has another number of slots, or the system refuses; an old file is then
/// untouched.
pub fn save_state(path: &Path, state: &State, fingerprint: &Fingerprint) -> Result<()> {
    save_continuation(path, state, None, fingerprint)
}

/// [`save_state`] with the `logits` [S,V] that the last tokens predict, from which a text goes on without reading
/// anything more.
///
/// # Errors
/// As [`save_state`], also for the logits.
pub fn save_continuation(
    path: &Path,
    state: &State,
    logits: Option<&Tensor>,
    fingerprint: &Fingerprint,
) -> Result<()> {
    let (mut metadata, mut entries) = contents(path, state, fingerprint)?;
    if let Some(logits) = logits {
        check_tensor(path, LOGITS, logits, state.slots())?;
        entries.push(Entry::new(LOGITS.to_owned(), logits));
        let sum = hex(checksum(state, Some(logits), fingerprint)?);
        metadata.insert("checksum".into(), sum);
    }
    atomic::write_file(path, |out| write_tensors(out, &metadata, entries))
}

/// Reads a state for a model.
///
/// # Errors
/// If the file is damaged, of another format or version, or the state is of another model (of other
/// weights too, where both sides have hashed theirs).
pub fn load_state(path: &Path, model: &LanguageModel, fingerprint: &Fingerprint) -> Result<State> {
    Ok(load_continuation(path, model, fingerprint)?.0)
}

/// [`load_state`], and the logits [S,V] if they were saved.
///
/// # Errors
/// As [`load_state`]; also if the logits are of another vocabulary.
pub fn load_continuation(
    path: &Path,
    model: &LanguageModel,
    fingerprint: &Fingerprint,
) -> Result<(State, Option<Tensor>)> {
    load_continuation_checked(path, model.config(), fingerprint, &|state| {
        model.check_state(state).map_err(|error| error.to_string())
    })
}

/// [`load_continuation`] for whatever runs a model of `config`: `check` says what is wrong with a state, if anything.
///
/// # Errors
/// As [`load_continuation`].
pub fn load_continuation_checked(
    path: &Path,
    config: &MambaConfig,
    fingerprint: &Fingerprint,
    check: &dyn Fn(&State) -> Result<(), String>,
) -> Result<(State, Option<Tensor>)> {
    let file = StateFile::read(path)?;
    let mismatch = |what, expected: String, found: String| {
        Err(Error::Mismatch { path: path.into(), what, expected, found })
    };
    if file.fingerprint.config != fingerprint.config {
        return mismatch(
            "state of another model",
            fingerprint.config.clone(),
            file.fingerprint.config,
        );
    }
    if let (Some(expected), Some(found)) = (fingerprint.weights, file.fingerprint.weights)
        && expected != found
    {
        return mismatch("state of a model with other weights", hex(expected), hex(found));
    }
    check(&file.state).map_err(|message| Error::format(path, message))?;
    let width = config.padded_vocab_size();
    match &file.logits {
        Some(logits) if logits.rank() != 2 || logits.dim(1) != width => {
            let message =
                format!("{LOGITS}: expected {width} for each slot, found shape {}", logits.shape());
            Err(Error::format(path, message))
        }
        _ => Ok((file.state, file.logits)),
    }
}

/// Metadata and tensors of a state's file.
pub(crate) fn contents(
    path: &Path,
    state: &State,
    fingerprint: &Fingerprint,
) -> Result<(Metadata, Vec<Entry>)> {
    let mut entries = Vec::new();
    for (i, layer) in state.layers.iter().enumerate() {
        if layer.iter().next().is_none() {
            return Err(Error::format(path, format!("layer {i} of the state has no tensors")));
        }
        for (name, tensor) in layer.iter() {
            let label = format!("layers.{i}.{name}");
            check_tensor(path, &label, tensor, state.slots())?;
            entries.push(Entry::new(label, tensor));
        }
    }
    let mut metadata = Metadata::from([
        ("format".into(), FORMAT.into()),
        ("version".into(), VERSION.into()),
        ("model".into(), fingerprint.config.clone()),
        ("positions".into(), serde_json::json!(state.positions).to_string()),
        ("checksum".into(), hex(checksum(state, None, fingerprint)?)),
    ]);
    if let Some(weights) = fingerprint.weights {
        metadata.insert("weights".into(), hex(weights));
    }
    Ok((metadata, entries))
}

fn checksum(state: &State, logits: Option<&Tensor>, fingerprint: &Fingerprint) -> Result<u128> {
    let mut hash = Xxh3::new();
    hash.update(&state_hash(state)?.to_le_bytes());
    hash.update(&fingerprint.config_hash().to_le_bytes());
    if let Some(weights) = fingerprint.weights {
        hash.update(&weights.to_le_bytes());
    }
    if let Some(logits) = logits {
        for value in logits.to_vec::<f32>()? {
            hash.update(&value.to_le_bytes());
        }
    }
    Ok(hash.digest128())
}

fn check_tensor(path: &Path, label: &str, tensor: &Tensor, slots: usize) -> Result<()> {
    if tensor.dtype() != DType::F32 {
        return Err(Error::format(
            path,
            format!("{label}: expected f32, found {}", tensor.dtype()),
        ));
    }
    if tensor.rank() == 0 || tensor.dim(0) != slots {
        let message = format!("{label}: expected {slots} slots, found shape {}", tensor.shape());
        return Err(Error::format(path, message));
    }
    Ok(())
}

impl StateFile {
    /// Reads a state without a model, as a tool that looks into files does.
    ///
    /// # Errors
    /// If the file is damaged, or of another format or version.
    pub fn read(path: &Path) -> Result<Self> {
        Self::of_file(TensorFile::open(path)?)
    }

    /// The state that an open file holds.
    ///
    /// # Errors
    /// As [`StateFile::read`].
    pub fn of_file(file: TensorFile) -> Result<Self> {
        let path = &file.path().to_owned();
        let mismatch = |what, expected: &str, found: &str| Error::Mismatch {
            path: path.into(),
            what,
            expected: expected.into(),
            found: found.into(),
        };
        match file.metadata("format") {
            Some(FORMAT) => {}
            found => {
                let found = found.unwrap_or("a safetensors file without that mark");
                return Err(mismatch("not a state file", FORMAT, found));
            }
        }
        let value = |key: &str| {
            file.metadata(key)
                .ok_or_else(|| Error::format(path, format!("damaged: the metadata lacks {key:?}")))
        };
        let bad = |key: &str| {
            Error::format(path, format!("damaged: {key} in the metadata is unreadable"))
        };
        let version = value("version")?;
        if version != VERSION {
            return Err(mismatch("version of the state file", VERSION, version));
        }
        let positions: Vec<u64> =
            serde_json::from_str(value("positions")?).map_err(|_| bad("positions"))?;
        let weights = file
            .metadata("weights")
            .map(|text| from_hex(text).ok_or_else(|| bad("weights")))
            .transpose()?;
        let expected = from_hex(value("checksum")?).ok_or_else(|| bad("checksum"))?;
        let fingerprint = Fingerprint { config: value("model")?.to_owned(), weights };
        let state = State { layers: read_layers(&file, positions.len())?, positions };
        let logits = file
            .names()
            .iter()
            .any(|name| name == LOGITS)
            .then(|| file.tensor(LOGITS))
            .transpose()?;
        if let Some(logits) = &logits {
            check_tensor(path, LOGITS, logits, state.slots())?;
        }
        let found = checksum(&state, logits.as_ref(), &fingerprint)?;
        if found != expected {
            return Err(mismatch("damaged: checksum", &hex(expected), &hex(found)));
        }
        Ok(Self { state, logits, fingerprint })
    }
}

fn read_layers(file: &TensorFile, slots: usize) -> Result<Vec<LayerState>> {
    let path = file.path();
    let mut named: Vec<(usize, String)> = Vec::new();
    for name in file.names().into_iter().filter(|name| name != LOGITS) {
        let parts = name.strip_prefix("layers.").and_then(|rest| rest.split_once('.'));
        let Some((index, field)) = parts.and_then(|(i, f)| Some((i.parse().ok()?, f))) else {
            return Err(Error::format(path, format!("unexpected tensor {name:?}")));
        };
        if format!("layers.{index}.{field}") != name {
            return Err(Error::format(path, format!("unexpected tensor {name:?}")));
        }
        named.push((index, field.to_owned()));
    }
    named.sort_unstable();
    let mut layers: Vec<Vec<(std::borrow::Cow<'static, str>, Tensor)>> = Vec::new();
    for (index, field) in named {
        if index > layers.len() {
            return Err(Error::format(path, format!("layer {} is missing", layers.len())));
        }
        let label = format!("layers.{index}.{field}");
        let tensor = file.tensor(&label)?;
        check_tensor(path, &label, &tensor, slots)?;
        if index == layers.len() {
            // Mamba's have two tensors.
            layers.push(Vec::with_capacity(2));
        }
        layers[index].push((field.into(), tensor));
    }
    Ok(layers.into_iter().map(LayerState::new).collect())
}
