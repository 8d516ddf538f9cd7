//! From what stands behind `--model` to a model: a folder or file of any format, a checkpoint, or a run's folder,
//! of which the best checkpoint is taken, or the newest if none was marked as best.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use elapid_formats::checkpoint::{Checkpoint, Store};
use elapid_formats::{ModelSource, hf};

use crate::hub;

/// A run keeps its checkpoints here, or directly in its folder.
const CHECKPOINTS: &str = "checkpoints";
/// What only checkpoints have.
const MANIFEST: &str = "training.json";

/// Opens the model without reading its weights, and says which folder it came from.
pub fn open(path: &Path) -> Result<(ModelSource, PathBuf)> {
    let folder = resolve(path)?;
    if folder != path {
        eprintln!("model: {}", folder.display());
    }
    if folder.join(MANIFEST).is_file() {
        // A checkpoint knows the hashes of its files, so damage is found here.
        Checkpoint::open(&folder)?;
    }
    Ok((ModelSource::open(&folder)?, folder))
}

/// The folder that holds the model's files, or its one file.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    if let Some(found) = hub::model(path)? {
        return Ok(found);
    }
    let metadata =
        path.metadata().with_context(|| format!("cannot open the model {}", path.display()))?;
    if metadata.is_file() {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        return match path.file_name().and_then(|name| name.to_str()) {
            Some(hf::CONFIG_FILE | hf::WEIGHTS_FILE | MANIFEST) => {
                Ok(parent.unwrap_or(Path::new(".")).to_path_buf())
            }
            _ => Ok(path.to_path_buf()),
        };
    }
    if path.join(hf::CONFIG_FILE).exists() || elapid_formats::holds_weights(path) {
        return Ok(path.to_path_buf());
    }
    for root in [path.to_path_buf(), path.join(CHECKPOINTS)] {
        let store = Store::new(&root, 1);
        let best = store.best().map(|step| store.folder(step));
        if let Some(best) = &best {
            match Checkpoint::open(best) {
                Ok(_) => return Ok(best.clone()),
                Err(error) => eprintln!(
                    "warning: the best checkpoint is damaged, the newest is taken instead: {error}"
                ),
            }
        }
        let latest = store.latest()?;
        for (folder, error) in
            latest.skipped.iter().filter(|(folder, _)| Some(folder) != best.as_ref())
        {
            eprintln!("warning: {} is skipped: {error}", folder.display());
        }
        if let Some(checkpoint) = latest.checkpoint {
            return Ok(checkpoint.path().to_path_buf());
        }
        if !latest.skipped.is_empty() {
            bail!("{}: every checkpoint is damaged", root.display());
        }
    }
    bail!(
        "no model in {}: expected {} and {} or another file of weights, or a run's checkpoints (step-00001000, ...)",
        path.display(),
        hf::CONFIG_FILE,
        hf::WEIGHTS_FILE
    )
}
