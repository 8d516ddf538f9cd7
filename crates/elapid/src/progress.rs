//! Progress of long work on standard error: a bar where a person watches, else a line from time to time.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::output::{bytes, grouped};

/// How often a line is written where bars are not possible.
const LINE: Duration = Duration::from_secs(10);

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Tokens.
    Tokens,
}

/// The progress of one piece of work.
pub struct Bar {
    bar: Option<ProgressBar>,
    name: String,
    unit: Unit,
    all: u64,
    last: Instant,
}

impl Bar {
    /// Of work called `name`, of which `done` of `all` are done already.
    pub fn new(name: &str, unit: Unit, done: u64, all: u64) -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let template = match unit {
                Unit::Bytes => {
                    "{msg:32!} {bar:24.cyan/blue} {bytes}/{total_bytes}  {bytes_per_sec}  ETA {eta}"
                }
                Unit::Tokens => "{msg:32!} {bar:24.cyan/blue} {pos}/{len} tokens  ETA {eta}",
            };
            // The templates are constant, so the fallback is only for the type.
            let style = ProgressStyle::with_template(template)
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .progress_chars("━╸─");
            let bar = ProgressBar::new(all).with_style(style).with_position(done);
            bar.set_message(name.to_owned());
            bar.reset_eta();
            bar
        });
        Self { bar, name: name.to_owned(), unit, all, last: Instant::now() }
    }

    /// So many are done.
    pub fn at(&mut self, done: u64) {
        match &self.bar {
            Some(bar) => bar.set_position(done),
            None if self.last.elapsed() >= LINE => {
                self.last = Instant::now();
                let all = match self.unit {
                    Unit::Bytes => bytes(self.all),
                    Unit::Tokens => format!("{} tokens", grouped(self.all)),
                };
                let share = 100.0 * done as f64 / self.all.max(1) as f64;
                say(&format!("{}: {share:.0} % of {all}", self.name));
            }
            None => {}
        }
    }

    /// So many of so many are done.
    pub fn of(&mut self, done: u64, all: u64) {
        self.all = all;
        if let Some(bar) = &self.bar {
            bar.set_length(all);
        }
        self.at(done);
    }

    /// A line that is no progress.
    pub fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => say(text),
        }
    }

    /// Leaves the bar as it stands.
    pub fn keep(self) {
        if let Some(bar) = &self.bar {
            bar.finish();
        }
    }
}

/// A bar that is not kept goes away with its work.
impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar
            && !bar.is_finished()
        {
            bar.finish_and_clear();
        }
    }
}

/// A line for people; if nobody can read it, that is no reason to stop.
pub fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}
