//! Which files of a repository make a model: configuration, weights in one of the forms that are read here,
//! tokenizer. The same rules say whether a snapshot in the cache is complete.

use std::path::Path;

use super::reference::is_file;
use super::{HubError, Reference};
use crate::model_source::Index;
use crate::{Result, json};

/// Beside the weights, in this order, where they exist.
const BESIDE: &[&str] = &["config.json", "generation_config.json"];
const TOKENIZER: &[&str] = &["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"];
/// Weights, the preferred form first. An index names shards.
const WEIGHTS: &[&str] = &[
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];

/// The weights of a repository.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Weights {
    /// All in this file.
    One(String),
    /// In shards that this index names.
    Shards(String),
}

/// The file names of a repository or a snapshot.
pub(super) struct Names<'a> {
    reference: &'a Reference,
    names: &'a [String],
}

impl<'a> Names<'a> {
    pub(super) fn new(reference: &'a Reference, names: &'a [String]) -> Self {
        Self { reference, names }
    }

    fn has(&self, name: &str) -> bool {
        self.names.iter().any(|own| own == name)
    }

    /// A file that must be there.
    pub(super) fn file(&self, name: &str) -> Result<String, HubError> {
        if is_file(name) && self.has(name) {
            return Ok(name.into());
        }
        let repository = self.reference.repository.clone();
        Err(HubError::NoFile { repository, file: name.into(), files: self.names.to_vec() })
    }

    /// The weights, in the form that is preferred. A `.gguf` is a whole model, and there must be one only.
    pub(super) fn weights(&self) -> Result<Weights, HubError> {
        if let Some(&name) = WEIGHTS.iter().find(|name| self.has(name)) {
            let name = name.to_owned();
            let index = name.ends_with(".index.json");
            return Ok(if index { Weights::Shards(name) } else { Weights::One(name) });
        }
        let repository = self.reference.repository.clone();
        let models: Vec<String> =
            self.names.iter().filter(|name| name.ends_with(".gguf")).cloned().collect();
        match models.as_slice() {
            [] => Err(HubError::NoWeights { repository, files: self.names.to_vec() }),
            [only] => Ok(Weights::One(only.clone())),
            _ => Err(HubError::Several { repository, files: models }),
        }
    }

    /// The weights' file or index, and what belongs to it. A `.gguf` has all of that inside.
    pub(super) fn beside(&self, weights: &str) -> Vec<String> {
        let others = BESIDE.iter().chain(TOKENIZER).filter(|name| self.has(name));
        let others = others.filter(|_| !weights.ends_with(".gguf"));
        others.map(|&name| name.to_owned()).chain([weights.to_owned()]).collect()
    }

    /// The tokenizer's files.
    pub(super) fn tokenizer(&self) -> Result<Vec<String>, HubError> {
        self.file(TOKENIZER[0])?;
        let there = BESIDE.iter().chain(TOKENIZER).filter(|name| self.has(name));
        Ok(there.map(|&name| name.to_owned()).collect())
    }
}

/// The shards that an index names, each once.
///
/// # Errors
/// If it is no index, or names a place outside of the repository.
pub(super) fn shards(index: &Path) -> Result<Vec<String>> {
    let index = Index::parse(index, &json::read_bytes(index)?)?;
    Ok(index.shards.into_keys().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with<R>(names: &[&str], look: impl FnOnce(&Names<'_>) -> R) -> R {
        let reference = Reference::parse("a/b").unwrap();
        let names: Vec<String> = names.iter().map(|&name| name.into()).collect();
        look(&Names::new(&reference, &names))
    }

    #[test]
    fn safetensors_before_pickles_before_gguf() {
        let weights = |names: &[&str]| with(names, |names| names.weights().unwrap());
        let one = |name: &str| Weights::One(name.into());
        let all = ["x.gguf", "pytorch_model.bin", "model.safetensors"];
        assert_eq!(weights(&all), one("model.safetensors"));
        assert_eq!(weights(&all[..2]), one("pytorch_model.bin"));
        assert_eq!(weights(&all[..1]), one("x.gguf"));
        let index = "model.safetensors.index.json";
        assert_eq!(
            weights(&["pytorch_model.bin", index, "model-00001-of-00001.safetensors"]),
            Weights::Shards(index.into())
        );
        let several = with(&["a.gguf", "b.gguf"], |names| names.weights()).unwrap_err();
        assert!(
            matches!(&several, HubError::Several { files, .. } if files.len() == 2),
            "{several}"
        );
        let none = with(&["readme.md"], |names| names.weights()).unwrap_err();
        assert!(matches!(none, HubError::NoWeights { .. }));
    }

    #[test]
    fn only_what_is_needed() {
        let names = [
            "README.md",
            "config.json",
            "flax_model.msgpack",
            "model.safetensors",
            "tokenizer.json",
            "pytorch_model.bin",
            "training_args.bin",
        ];
        let files = with(&names, |names| names.beside("model.safetensors"));
        assert_eq!(files, ["config.json", "tokenizer.json", "model.safetensors"]);
        assert_eq!(with(&names, |names| names.beside("x.gguf")), ["x.gguf"]);
        assert_eq!(with(&names, |n| n.tokenizer()).unwrap(), ["config.json", "tokenizer.json"]);
        assert!(with(&["../x"], |names| names.file("../x")).is_err());
    }
}
