//! Models of the Hugging Face hub behind `--model`: a path that exists wins; what looks like `OWNER/NAME`
//! otherwise is taken from the cache, or downloaded, with progress bars where a terminal is.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use elapid_formats::hub::{Hub, Progress, Reference, Wanted};
use indicatif::{ProgressBar, ProgressStyle};

use crate::output::bytes;

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

/// How often a line is written where bars are not possible.
const LINE: Duration = Duration::from_secs(10);

/// Progress on standard error: a bar a file, or lines where nobody watches.
#[derive(Default)]
pub struct Bars {
    bar: Option<ProgressBar>,
    name: String,
    size: u64,
    last: Option<Instant>,
}

impl Progress for Bars {
    fn file(&mut self, name: &str, size: u64, have: u64) {
        (self.name, self.size, self.last) = (name.to_owned(), size, Some(Instant::now()));
        if io::stderr().is_terminal() {
            let bar = ProgressBar::new(size).with_position(have);
            let style = "{msg:32!} {bar:24} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            if let Ok(style) = ProgressStyle::with_template(style) {
                bar.set_style(style);
            }
            bar.set_message(name.to_owned());
            bar.reset_eta();
            self.bar = Some(bar);
            return;
        }
        let mut line = format!("{name}: {}", bytes(size));
        if have > 0 {
            line += &format!(", {} of them are there", bytes(have));
        }
        say(&line);
    }

    fn at(&mut self, position: u64) {
        match &self.bar {
            Some(bar) => bar.set_position(position),
            None if self.last.is_some_and(|last| last.elapsed() >= LINE) => {
                self.last = Some(Instant::now());
                let share = 100.0 * position as f64 / self.size.max(1) as f64;
                say(&format!("{}: {share:.0} % of {}", self.name, bytes(self.size)));
            }
            None => {}
        }
    }

    fn done(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }

    fn note(&mut self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => say(text),
        }
    }
}

/// A line for people; if nobody can read it, that is no reason to stop.
fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}
