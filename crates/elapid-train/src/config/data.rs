//! The `[data]` table: files of bytes, or a synthetic task whose samples are drawn afresh.

use std::fmt;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::check::Check;
use crate::error::Result;

/// The `[data]` table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataConfig {
    /// Files, folders (walked recursively) and globs; `.gz` and `.zst` are read directly.
    #[serde(deserialize_with = "one_or_many")]
    pub paths: Vec<String>,
    /// In folders, take only files that end in one of these, such as ["md", "rs"]; empty takes all.
    #[serde(deserialize_with = "one_or_many")]
    pub extensions: Vec<String>,
    /// Text between the documents of a file, such as "\u0000"; unset, one file is one document.
    pub separator: Option<String>,
    /// Share of the documents held out for validation; a single document is split by position.
    pub validation_fraction: f64,
    /// Files to validate on, instead of a share of `paths`.
    #[serde(deserialize_with = "one_or_many")]
    pub validation_paths: Vec<String>,
    /// Longest sequence in tokens; longer documents become consecutive windows.
    pub context: usize,
    /// Start each window of a document from the state at the end of the one before.
    pub carry_state: bool,
    /// "greedy" fills each batch with whole documents (PackMamba), "none" takes windows one by one.
    pub packing: Packing,
    /// How many documents greedy packing chooses among.
    pub packing_window: usize,
    /// A synthetic task instead of files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub synthetic: Option<SyntheticConfig>,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            paths: Vec::new(),
            extensions: Vec::new(),
            separator: None,
            validation_fraction: 0.05,
            validation_paths: Vec::new(),
            context: 512,
            carry_state: false,
            packing: Packing::None,
            packing_window: 128,
            synthetic: None,
        }
    }
}

/// How documents are laid into batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// One window after the other.
    None,
    /// The largest document of a buffer that still fits (packmamba.md b4).
    Greedy,
}

/// The `[data.synthetic]` table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SyntheticConfig {
    /// "induction-heads" or "selective-copying"; must be written.
    pub task: SyntheticTask,
    /// Length of a training sample: all of its tokens, the final prefix included (induction heads), or
    /// its noise tokens (selective copying).
    pub length: usize,
    /// Vocabulary, special tokens included.
    pub vocab_size: usize,
    /// Data tokens to memorise (selective copying only).
    pub memorize: usize,
    /// Lengths to validate on; empty validates on `length`.
    pub eval_lengths: Vec<usize>,
    /// Fresh samples for each of `eval_lengths`.
    pub eval_samples: usize,
}

impl Default for SyntheticConfig {
    fn default() -> Self {
        Self {
            task: SyntheticTask::InductionHeads,
            length: 256,
            vocab_size: 16,
            memorize: 16,
            eval_lengths: Vec::new(),
            eval_samples: 64,
        }
    }
}

/// The synthetic tasks of the Mamba paper (section 4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SyntheticTask {
    /// Recall the token that followed the earlier prefix.
    InductionHeads,
    /// Repeat the data tokens that lay scattered among noise.
    SelectiveCopying,
}

impl SyntheticConfig {
    /// Tokens of one training sample.
    pub fn sample_tokens(&self) -> usize {
        match self.task {
            SyntheticTask::InductionHeads => self.length,
            SyntheticTask::SelectiveCopying => self.length + 2 * self.memorize,
        }
    }
}

impl DataConfig {
    pub(crate) fn validate(&self, check: &Check<'_>) -> Result<()> {
        if let Some(task) = &self.synthetic {
            let expected = "no files beside data.synthetic";
            check.that(self.paths.is_empty(), "data.paths", expected, self.paths.join(", "))?;
            let files = &self.validation_paths;
            check.that(files.is_empty(), "data.validation_paths", expected, files.join(", "))?;
            check.whole("data.synthetic.vocab_size", task.vocab_size, 4, 1 << 24)?;
            check.whole("data.synthetic.length", task.length, 4, 1 << 30)?;
            let memorize = task.memorize;
            check.whole("data.synthetic.memorize", memorize, 1, task.length)?;
            for &length in &task.eval_lengths {
                check.whole("data.synthetic.eval_lengths", length, 4, 1 << 30)?;
            }
            return check.whole("data.synthetic.eval_samples", task.eval_samples, 1, 1 << 20);
        }
        let expected = "at least one file, folder or glob (or a [data.synthetic] table)";
        check.that(!self.paths.is_empty(), "data.paths", expected, "none")?;
        for (key, list) in [
            ("data.paths", &self.paths),
            ("data.validation_paths", &self.validation_paths),
            ("data.extensions", &self.extensions),
        ] {
            check.that(!list.iter().any(String::is_empty), key, "no empty text", "\"\"")?;
        }
        if let Some(separator) = &self.separator {
            check.that(
                !separator.is_empty(),
                "data.separator",
                "at least one character",
                "\"\"",
            )?;
        }
        check.fraction("data.validation_fraction", self.validation_fraction)?;
        check.whole("data.context", self.context, 2, 1 << 30)?;
        check.whole("data.packing_window", self.packing_window, 1, 1 << 20)?;
        let both = self.carry_state && self.packing == Packing::Greedy;
        let expected = "false with packing = \"greedy\", which reorders documents";
        check.that(!both, "data.carry_state", expected, self.carry_state)
    }
}

/// Reads a list of strings, or one string as a list of one.
fn one_or_many<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Vec<String>, D::Error> {
    struct Strings;
    impl<'de> Visitor<'de> for Strings {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string or a list of strings")
        }

        fn visit_str<E>(self, text: &str) -> std::result::Result<Vec<String>, E> {
            Ok(vec![text.to_string()])
        }

        fn visit_seq<A: SeqAccess<'de>>(
            self,
            mut items: A,
        ) -> std::result::Result<Vec<String>, A::Error> {
            let mut list = Vec::new();
            while let Some(item) = items.next_element()? {
                list.push(item);
            }
            Ok(list)
        }
    }
    deserializer.deserialize_any(Strings)
}
