//! The folder of a run: which checkpoints there are, which one to go on from, which ones to keep.

use std::fs;
use std::path::{Path, PathBuf};

use super::contents::{Checkpoint, Contents};
use crate::{Error, Result, atomic, hf, json};

const PREFIX: &str = "step-";
const BEST_FILE: &str = "best";

/// The checkpoints of one run.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    keep_last: usize,
}

/// The newest valid checkpoint, and newer ones that are damaged.
#[derive(Debug)]
pub struct Latest {
    /// None if there is no valid one.
    pub checkpoint: Option<Checkpoint>,
    /// Folder and reason of each newer one, newest first.
    pub skipped: Vec<(PathBuf, Error)>,
}

impl Store {
    /// The checkpoints in `root`, which need not exist yet. The newest `keep_last` (at least one) and the
    /// best are kept.
    pub fn new(root: impl Into<PathBuf>, keep_last: usize) -> Self {
        Self { root: root.into(), keep_last: keep_last.max(1) }
    }

    /// The folder of a step.
    pub fn folder(&self, step: u64) -> PathBuf {
        self.root.join(format!("{PREFIX}{step:08}"))
    }

    /// Saves a checkpoint, then removes those that need not be kept.
    ///
    /// # Errors
    /// If it cannot be saved; older ones are then all in place.
    pub fn save(&self, contents: Contents<'_>) -> Result<PathBuf> {
        let step = contents.step;
        let path = self.folder(step);
        contents.save(&path)?;
        self.prune(step)?;
        Ok(path)
    }

    /// Steps that have a folder, oldest first.
    ///
    /// # Errors
    /// If the folder exists but cannot be read.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io("read", &self.root)(error)),
        };
        let mut steps: Vec<u64> = entries
            .filter_map(|entry| {
                let name = entry.ok()?.file_name();
                let step = name.to_str()?.strip_prefix(PREFIX)?.parse().ok()?;
                (name.to_str()? == format!("{PREFIX}{step:08}")).then_some(step)
            })
            .collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// The newest valid checkpoint. What a killed save has left is cleaned up first.
    ///
    /// # Errors
    /// If the folder cannot be read; damaged checkpoints are skipped and reported instead.
    pub fn latest(&self) -> Result<Latest> {
        atomic::clean_leftovers(&self.root);
        let mut skipped = Vec::new();
        for step in self.steps()?.into_iter().rev() {
            let path = self.folder(step);
            match Checkpoint::open(&path) {
                Ok(checkpoint) => return Ok(Latest { checkpoint: Some(checkpoint), skipped }),
                Err(error) => skipped.push((path, error)),
            }
        }
        Ok(Latest { checkpoint: None, skipped })
    }

    /// Makes the checkpoint of `step` the best one; it is kept until another takes its place.
    ///
    /// # Errors
    /// If there is none, or the system refuses.
    pub fn mark_best(&self, step: u64) -> Result<()> {
        let folder = self.folder(step);
        if !folder.is_dir() {
            return Err(Error::format(&folder, "no such checkpoint"));
        }
        let path = self.root.join(BEST_FILE);
        atomic::write_file(&path, |out| writeln!(out, "{PREFIX}{step:08}"))
    }

    /// The best checkpoint's step, if one was marked and is still there.
    pub fn best(&self) -> Option<u64> {
        let text = json::read_text(&self.root.join(BEST_FILE)).ok()?;
        let step = text.trim().strip_prefix(PREFIX)?.parse().ok()?;
        self.folder(step).is_dir().then_some(step)
    }

    /// Removes what is neither the best nor among the newest up to `current`. Folders of later steps
    /// belong to a run that was left for an earlier checkpoint; they stay.
    fn prune(&self, current: u64) -> Result<()> {
        let best = self.best();
        let steps = self.steps()?;
        let done = steps.iter().filter(|&&step| step <= current).count();
        for &step in &steps[..done.saturating_sub(self.keep_last)] {
            if Some(step) != best {
                atomic::remove_folder(&self.folder(step))?;
            }
        }
        Ok(())
    }
}

/// The model folder that a path stands for: the path itself if it holds a configuration, the checkpoint
/// that a `best` file names, or the newest checkpoint of a run's folder.
///
/// # Errors
/// If the path is none of these.
pub fn resolve_model(path: &Path) -> Result<PathBuf> {
    if path.is_file() && path.file_name().is_some_and(|name| name == BEST_FILE) {
        let root = path.parent().unwrap_or(Path::new(""));
        let store = Store::new(root, 1);
        return match store.best() {
            Some(step) => Ok(store.folder(step)),
            None => Err(Error::format(path, "does not name a checkpoint that exists")),
        };
    }
    if path.is_dir() && !path.join(hf::CONFIG_FILE).exists() {
        let latest = Store::new(path, 1).latest()?;
        if let Some(checkpoint) = latest.checkpoint {
            return Ok(checkpoint.path().to_path_buf());
        }
        if let Some((_, error)) = latest.skipped.into_iter().next() {
            return Err(error);
        }
    }
    Ok(path.to_path_buf())
}
