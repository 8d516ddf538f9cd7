//! What a run keeps beside the model, and under which conditions it goes on from it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use elapid_formats::checkpoint::{Contents, Store};
use elapid_models::{LanguageModel, State};
use elapid_tensor::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::evaluate::Evaluation;
use crate::optimizer::AdamW;

/// Folder of the checkpoints within the run's folder.
pub const FOLDER: &str = "checkpoints";

/// Keys that may differ between a run and its resumption: they do not touch what was computed so far.
/// The bytes behind `data.paths` are compared by content when the feed is opened.
const FREE: [&str; 15] = [
    "train.recompute",
    "data.paths",
    "train.device",
    "train.steps",
    "train.epochs",
    "train.tokens",
    "train.threads",
    "train.validation_every",
    "train.validation_tokens",
    "train.sample_every",
    "train.sample_tokens",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_best",
    "train.out",
];

/// The figures of a run that are not tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunProgress {
    /// Optimizer steps done.
    pub step: u64,
    /// Training tokens seen.
    pub tokens: u64,
    /// Seconds of training.
    pub seconds: f64,
    /// The place in the data after the last step.
    pub place: Value,
    /// Where the validation loss was lowest so far.
    pub best: Option<Best>,
    /// The last validation.
    pub evaluation: Option<Evaluation>,
    /// The validation of this step was interrupted, and is to be made when the run goes on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub validation_due: bool,
    /// Running average of the gradient norm.
    pub norm_average: f64,
    /// Gradient norms in that average.
    pub norms_seen: u64,
}

/// The lowest validation loss of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The step that it was reached at.
    pub step: u64,
    /// The loss in nats.
    pub loss: f64,
}

/// A checkpoint that was read.
pub struct Loaded {
    pub path: PathBuf,
    pub model: LanguageModel,
    pub tensors: HashMap<String, Tensor>,
    pub carried: Option<State>,
    pub progress: RunProgress,
    pub config: RunConfig,
}

/// True if a folder holds any checkpoint, sound or not.
pub fn exists(folder: &Path) -> Result<bool> {
    Ok(!Store::new(folder, 1).steps()?.is_empty())
}

/// Makes the checkpoint of a step the best one again, if the folder says otherwise: the process may have
/// been killed after it saved and before it said so, or a damaged checkpoint may have taken the place.
pub fn restore_best(folder: &Path, best: Best) -> Result<()> {
    let store = Store::new(folder, 1);
    if store.best() != Some(best.step) && store.folder(best.step).is_dir() {
        store.mark_best(best.step)?;
    }
    Ok(())
}

/// Saves a checkpoint; with `is_best` it becomes the best.
pub fn save(
    config: &RunConfig,
    model: &mut LanguageModel,
    optimizer: &AdamW,
    carried: Option<&State>,
    progress: &RunProgress,
    is_best: bool,
) -> Result<PathBuf> {
    let store = Store::new(config.train.out.join(FOLDER), config.train.keep_last);
    let malformed = |error: serde_json::Error| Error::Checkpoint { message: error.to_string() };
    let path = store.save(Contents {
        step: progress.step,
        model,
        tensors: &optimizer.tensors(),
        state: carried,
        meta: serde_json::to_value(progress).map_err(malformed)?,
        config_toml: &config.resolved().to_toml(),
    })?;
    if is_best {
        store.mark_best(progress.step)?;
    }
    Ok(path)
}

/// The newest sound checkpoint; damaged ones are named on `warn` and passed over.
pub fn load_latest(folder: &Path, warn: &mut dyn FnMut(&str)) -> Result<Loaded> {
    let latest = Store::new(folder, 1).latest()?;
    for (path, reason) in &latest.skipped {
        warn(&format!("passing over the damaged checkpoint {}: {reason}", path.display()));
    }
    let Some(checkpoint) = latest.checkpoint else {
        let message = match latest.skipped.len() {
            0 => format!(
                "{}: there is no checkpoint to resume from; start the run without --resume",
                folder.display()
            ),
            n => format!("{}: none of the {n} checkpoints is sound", folder.display()),
        };
        return Err(Error::Checkpoint { message });
    };
    let path = checkpoint.path().to_path_buf();
    let progress =
        serde_json::from_value(checkpoint.meta().clone()).map_err(|error| Error::Checkpoint {
            message: format!("{}: the run's figures cannot be read: {error}", path.display()),
        })?;
    let config = RunConfig::parse(checkpoint.config_toml(), Some(&path.join("config.toml")), &[])?;
    let model = checkpoint.load_model()?;
    let carried = checkpoint.state(&model)?;
    let tensors = checkpoint.tensors()?.into_iter().collect();
    Ok(Loaded { path, model, tensors, carried, progress, config })
}

/// Refuses to resume with a configuration that would not have led to the checkpoint.
pub fn check_config(saved: &RunConfig, given: &RunConfig, checkpoint: &Path) -> Result<()> {
    let word = |value: Option<String>| value.unwrap_or_else(|| "nothing".into());
    let changed: Vec<String> = saved
        .differences(given)
        .into_iter()
        .filter(|(key, ..)| !FREE.contains(&key.as_str()) && !key.starts_with("log."))
        .map(|(key, saved, given)| format!("{key} = {} (now {})", word(saved), word(given)))
        .collect();
    if changed.is_empty() {
        return Ok(());
    }
    Err(Error::Checkpoint {
        message: format!(
            "{}: the run was begun with {}; put that back, or start another run (train.out)",
            checkpoint.display(),
            changed.join(", ")
        ),
    })
}
