//! The configuration of a run: one TOML file, overrides from the command line, one struct a table.
//!
//! Every key has a default, so a file states only what matters. Whatever is wrong (an unknown key, a
//! wrong type, a value out of range) is refused before any work starts, with the file and line or the
//! override, the key, what was expected and what was found. [`RunConfig::resolved`] writes every
//! default out; its TOML is stored beside each checkpoint and loads to the same run.
//! Relative paths are relative to the working folder.

mod check;
mod data;
mod document;
mod keys;
mod model;
mod replace;
mod train;

#[cfg(test)]
mod tests;

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

pub use data::{DataConfig, Packing, SyntheticConfig, SyntheticTask};
pub use model::{DtRank, ModelConfig};
pub use train::{
    Compute, LogConfig, OptimizerConfig, ProgressMode, ScheduleConfig, ScheduleKind, TrainConfig,
};

use crate::error::{Error, Place, Result};
use check::Check;
use document::Document;
use keys::{field_names, nearest};
use replace::replaced_by;

/// Everything that defines a training run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunConfig {
    /// What is trained.
    pub model: ModelConfig,
    /// On what.
    pub data: DataConfig,
    /// For how long, and where to.
    pub train: TrainConfig,
    /// By which steps.
    pub optimizer: OptimizerConfig,
    /// At which learning rate.
    pub schedule: ScheduleConfig,
    /// What is shown and recorded.
    pub log: LogConfig,
}

/// A table of the configuration: its keys and the type check of one value.
struct Section {
    name: &'static str,
    keys: &'static [&'static str],
    accepts: fn(&str, &Value) -> std::result::Result<(), String>,
}

fn section<T: DeserializeOwned>(name: &'static str) -> Section {
    Section { name, keys: field_names::<T>(), accepts: accepts::<T> }
}

/// Since every key has a default, a table of one key tells whether that key's value fits.
fn accepts<T: DeserializeOwned>(key: &str, value: &Value) -> std::result::Result<(), String> {
    let table = Table::from_iter([(key.to_string(), value.clone())]);
    table.try_into::<T>().map(|_| ()).map_err(|error| error.message().to_string())
}

fn sections() -> [Section; 8] {
    [
        section::<RunConfig>(""),
        section::<ModelConfig>("model"),
        section::<DataConfig>("data"),
        section::<SyntheticConfig>("data.synthetic"),
        section::<TrainConfig>("train"),
        section::<OptimizerConfig>("optimizer"),
        section::<ScheduleConfig>("schedule"),
        section::<LogConfig>("log"),
    ]
}

impl RunConfig {
    /// Reads a TOML file and lays `overrides` (`table.key=value`) over it.
    ///
    /// # Errors
    /// An unreadable file, bad TOML, an unknown key, a value of the wrong type or out of range.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let text = String::from_utf8(bytes).map_err(|error| {
            let valid = error.utf8_error().valid_up_to();
            let line = error.as_bytes()[..valid].iter().filter(|b| **b == b'\n').count() + 1;
            Error::Syntax {
                place: Place::File(path.to_path_buf(), Some(line)),
                message: format!("byte {valid} is not UTF-8"),
            }
        })?;
        Self::parse(&text, Some(path), overrides)
    }

    /// Reads TOML text as [`RunConfig::load`] reads a file; `file` is only named in errors.
    ///
    /// # Errors
    /// As [`RunConfig::load`], without those of reading.
    pub fn parse(text: &str, file: Option<&Path>, overrides: &[String]) -> Result<Self> {
        let sections = sections();
        let mut document = Document::parse(text, file)?;
        for text in overrides {
            document.set(text, |path, value| {
                let (table, key) = path.rsplit_once('.').unwrap_or(("", path));
                let section = sections.iter().find(|s| s.name == table);
                section.is_some_and(|s| (s.accepts)(key, value).is_ok())
            })?;
        }
        for text in overrides {
            let (key, value) = text.split_once('=').unwrap_or((text, ""));
            for other in replaced_by(key.trim(), value.trim()) {
                document.drop_written(&other);
            }
        }
        check_table(&document, &document.table, "", &sections)?;
        let whole = document.table.clone().try_into::<Self>();
        // Each key was accepted on its own, so the whole is too; an error still gets a name.
        let config = whole.map_err(|error| Error::Syntax {
            place: document.place(""),
            message: error.message().to_string(),
        })?;
        let check = Check { place: &|key| document.place(key) };
        if let Some(task) = document.table.get("data").and_then(|d| d.get("synthetic")) {
            let expected = "\"induction-heads\" or \"selective-copying\"";
            let named = task.get("task").is_some();
            check.that(named, "data.synthetic.task", expected, "nothing")?;
        }
        config.check(&check)?;
        Ok(config)
    }

    /// Checks the values of a configuration that was built in code.
    ///
    /// # Errors
    /// The first value that is out of range or contradicts another.
    pub fn validate(&self) -> Result<()> {
        self.check(&Check { place: &|_| Place::Nowhere })
    }

    fn check(&self, check: &Check<'_>) -> Result<()> {
        self.model.validate(check)?;
        self.data.validate(check)?;
        self.train.validate(check)?;
        self.optimizer.validate(check)?;
        self.schedule.validate(check, self.optimizer.lr, self.train.steps)?;
        self.log.validate(check)?;
        if let (Some(task), Some(shape)) = (&self.data.synthetic, self.model.shape()) {
            let expected = format!("at least data.synthetic.vocab_size = {}", task.vocab_size);
            let fits = shape.vocab_size >= task.vocab_size;
            check.that(fits, "model.vocab_size", &expected, shape.vocab_size)?;
        }
        if let Some(tokens) = self.train.batch_tokens {
            let sequence = self.sequence_tokens();
            let expected = format!("at least one sequence of {sequence} tokens");
            check.that(tokens >= sequence, "train.batch_tokens", &expected, tokens)?;
        }
        Ok(())
    }

    /// Tokens of the longest training sequence.
    pub fn sequence_tokens(&self) -> usize {
        self.data.synthetic.as_ref().map_or(self.data.context, SyntheticConfig::sample_tokens)
    }

    /// Tokens of one batch (one forward and backward pass) when it is full.
    pub fn tokens_per_batch(&self) -> usize {
        let size = self.train.batch_size.unwrap_or(TrainConfig::DEFAULT_BATCH_SIZE);
        self.train.batch_tokens.unwrap_or(size.saturating_mul(self.sequence_tokens()))
    }

    /// The same run with every default written out: the model's whole shape, the batch size, the
    /// warm-up and final learning rate as far as they are known without the data.
    #[must_use]
    pub fn resolved(&self) -> Self {
        let mut all = self.clone();
        all.model = self.model.resolved();
        if all.train.batch_tokens.is_none() {
            all.train.batch_size.get_or_insert(TrainConfig::DEFAULT_BATCH_SIZE);
        }
        if all.schedule.warmup_fraction.is_none() {
            all.schedule.warmup_steps.get_or_insert(0);
        }
        if all.schedule.kind == ScheduleKind::Cosine && all.schedule.final_lr.is_none() {
            let fraction = crate::schedule::DEFAULT_FINAL_LR_FRACTION;
            all.schedule.final_lr_fraction.get_or_insert(fraction);
        }
        all
    }

    /// The configuration as TOML, tables and keys in the order of the structs: equal
    /// configurations give equal text.
    pub fn to_toml(&self) -> String {
        // Serialising plain tables of numbers, words and lists cannot fail: integers beyond
        // TOML's range are refused by `validate`.
        toml::to_string(self).unwrap_or_default()
    }

    /// The keys in which two runs differ, with both values (`None` where unset), sorted by key.
    /// Defaults count as written out.
    pub fn differences(&self, other: &Self) -> Vec<(String, Option<String>, Option<String>)> {
        let flat = |config: &Self| {
            let mut values = std::collections::BTreeMap::new();
            if let Ok(table) = Table::try_from(config.resolved()) {
                flatten(&table, "", &mut values);
            }
            values
        };
        let (ours, theirs) = (flat(self), flat(other));
        let keys: std::collections::BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
        keys.into_iter()
            .filter(|key| ours.get(*key) != theirs.get(*key))
            .map(|key| (key.clone(), ours.get(key).cloned(), theirs.get(key).cloned()))
            .collect()
    }
}

fn flatten(table: &Table, prefix: &str, values: &mut std::collections::BTreeMap<String, String>) {
    for (key, value) in table {
        let path = join(prefix, key);
        match value {
            Value::Table(inner) => flatten(inner, &path, values),
            other => {
                values.insert(path, other.to_string());
            }
        }
    }
}

fn join(prefix: &str, key: &str) -> String {
    if prefix.is_empty() { key.to_string() } else { format!("{prefix}.{key}") }
}

/// Checks names and types of a table and of the tables in it.
fn check_table(document: &Document, table: &Table, name: &str, sections: &[Section]) -> Result<()> {
    let Some(section) = sections.iter().find(|s| s.name == name) else { return Ok(()) };
    for (key, value) in table {
        let path = join(name, key);
        if !section.keys.contains(&key.as_str()) {
            let hint = hint(key, section, sections);
            return Err(Error::UnknownKey { place: document.place(&path), key: path, hint });
        }
        match value {
            Value::Table(inner) if sections.iter().any(|s| s.name == path) => {
                check_table(document, inner, &path, sections)?;
            }
            _ => (section.accepts)(key, value).map_err(|message| {
                let (expected, found) = explain(&message);
                Error::BadValue { place: document.place(&path), key: path, expected, found }
            })?,
        }
    }
    Ok(())
}

/// What to suggest for an unknown key: a near one of the same table; or else the same name in
/// another table; or else the nearest of all. The table's keys follow.
fn hint(key: &str, section: &Section, sections: &[Section]) -> String {
    let near = nearest(key, section.keys);
    let elsewhere = sections.iter().find(|s| !s.name.is_empty() && s.keys.contains(&key));
    let suggestion = match (near, elsewhere) {
        (Some((_, false)) | None, Some(other)) => join(other.name, key),
        (Some((near, _)), _) => join(section.name, near),
        (None, None) => return String::new(),
    };
    let (what, table) = if section.name.is_empty() {
        ("tables", String::new())
    } else {
        ("keys", format!(" of [{}]", section.name))
    };
    let all = section.keys.join(", ");
    format!("; the nearest valid key is `{suggestion}` ({what}{table}: {all})")
}

/// Takes serde's "invalid type: X, expected Y" apart and says it in words of the file.
fn explain(message: &str) -> (String, String) {
    let first = message.lines().next().unwrap_or(message);
    let Some((found, expected)) = first.rsplit_once(", expected ") else {
        return ("a valid value".to_string(), first.to_string());
    };
    let expected = match expected {
        "u64" | "usize" => "a whole number, 0 or more",
        "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        other if other.starts_with("struct ") => "a table",
        other => other,
    };
    let prefixes = ["invalid type: ", "invalid value: ", "unknown variant "];
    let found = prefixes.iter().find_map(|p| found.strip_prefix(p)).unwrap_or(found);
    (expected.to_string(), found.to_string())
}
