//! Models of the Hugging Face hub behind `--model`: a path that exists wins; what looks like `OWNER/NAME`
//! otherwise is taken from the cache, or downloaded, with progress bars where a terminal is.

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use elapid_formats::hub::{Hub, Progress, Reference, Wanted};

use crate::output::bytes;
use crate::progress::{Bar, Unit, say};

static OFFLINE: AtomicBool = AtomicBool::new(false);

/// What `--offline` says, for the whole process.
pub fn set_offline(offline: bool) {
    OFFLINE.store(offline, Ordering::Relaxed);
}

/// The hub as the environment and `--offline` say.
pub fn hub() -> Result<Hub> {
    Ok(Hub::from_environment()?.offline(OFFLINE.load(Ordering::Relaxed)))
}

/// Where the model is, if `path` names one on the hub.
///
/// # Errors
/// If it is there neither in the cache nor on the hub.
pub fn model(path: &Path) -> Result<Option<PathBuf>> {
    find(path, Wanted::Model)
}

/// Where the tokenizer is, if `path` names a model on the hub.
///
/// # Errors
/// As [`model`].
pub fn tokenizer(path: &Path) -> Result<Option<PathBuf>> {
    find(path, Wanted::Tokenizer)
}

fn find(path: &Path, wanted: Wanted<'_>) -> Result<Option<PathBuf>> {
    if path.exists() {
        return Ok(None);
    }
    let Some(reference) = path.to_str().and_then(Reference::parse) else { return Ok(None) };
    // Within a folder that is here, it is a path with a mistake in it.
    let owner = reference.repository.split('/').next().unwrap_or_default();
    if Path::new(owner).is_dir() {
        return Ok(None);
    }
    let hub = hub()?;
    if let Some(found) = hub.cached(&reference, wanted) {
        return Ok(Some(found));
    }
    let pulled = hub
        .pull(&reference, wanted, &mut Bars::default())
        .with_context(|| format!("there is no {} here, so the hub was asked", path.display()))?;
    Ok(Some(pulled.model))
}

/// Progress on standard error: a bar a file, or lines where nobody watches.
#[derive(Default)]
pub struct Bars(Option<Bar>);

impl Progress for Bars {
    fn file(&mut self, name: &str, size: u64, have: u64) {
        if !io::stderr().is_terminal() {
            let there = match have {
                0 => String::new(),
                have => format!(", {} of them are there", bytes(have)),
            };
            say(&format!("{name}: {}{there}", bytes(size)));
        }
        self.0 = Some(Bar::new(name, Unit::Bytes, have, size));
    }

    fn at(&mut self, position: u64) {
        if let Some(bar) = &mut self.0 {
            bar.at(position);
        }
    }

    fn done(&mut self) {
        if let Some(bar) = self.0.take() {
            bar.keep();
        }
    }

    fn note(&mut self, text: &str) {
        match &self.0 {
            Some(bar) => bar.note(text),
            None => say(text),
        }
    }
}
