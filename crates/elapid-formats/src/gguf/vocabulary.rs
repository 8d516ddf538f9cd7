//! What a GGUF file says about its tokens: lists that become a tokenizer, and that a `tokenizer.json` becomes.

use std::path::Path;

use super::read::GgufFile;
use super::value::{Array, Value};
use crate::model_source::{Format, ModelSource};
use crate::tokenizer::{TOKENIZER_FILE, TokenKind, Tokenizer, Vocabulary, end_of_sequence};
use crate::{Result, Texts, json};

const PREFIX: &str = "tokenizer.";

impl GgufFile {
    /// The vocabulary. A file that says nothing of tokens has one whose model is empty.
    ///
    /// # Errors
    /// If a key has another type than it should, or a token is of an unknown kind.
    pub fn vocabulary(&self) -> Result<Vocabulary> {
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let text = |name: &str| -> Result<Option<String>> {
            Ok(self.text(&key(name))?.map(str::to_owned))
        };
        let texts = |name: &str| -> Result<Texts> {
            let found = self.value(&key(name), "an array of texts", Value::as_texts)?;
            Ok(found.cloned().unwrap_or_default())
        };
        let id = |name: &str| {
            self.value(&key(name), "a token id", |value| {
                value.as_u64().and_then(|id| u32::try_from(id).ok())
            })
        };
        let flag = |name: &str| -> Result<bool> {
            Ok(self.value(&key(name), "true or false", Value::as_bool)?.unwrap_or_default())
        };
        let kinds = self.value(&key("token_type"), "an array of 1 to 6", |value| match value {
            Value::Array(Array::I32(kinds)) => {
                kinds.iter().map(|&kind| TokenKind::from_number(kind.into())).collect()
            }
            Value::Array(Array::U32(kinds)) => {
                kinds.iter().map(|&kind| TokenKind::from_number(kind.into())).collect()
            }
            _ => None,
        })?;
        Ok(Vocabulary {
            model: text("model")?.unwrap_or_default(),
            pre: text("pre")?,
            tokens: texts("tokens")?,
            kinds: kinds.unwrap_or_default(),
            merges: texts("merges")?,
            begin_of_sequence: id("bos_token_id")?,
            end_of_sequence: id("eos_token_id")?,
            unknown: id("unknown_token_id")?,
            padding: id("padding_token_id")?,
            add_begin: flag("add_bos_token")?,
            add_end: flag("add_eos_token")?,
        })
    }
}

/// The metadata about a model's tokens: that of the GGUF file it comes from, or that of the `tokenizer.json` beside
/// its weights, or that there is none (bytes, or a kind that these lists cannot hold).
///
/// # Errors
/// If a file of the model cannot be read, or does not fit the embedding.
pub fn vocabulary_of(source: &ModelSource) -> Result<Vec<(String, Value)>> {
    if source.format() == Format::Gguf {
        let file = GgufFile::open(source.path())?;
        let own = file.metadata().iter().filter(|(key, _)| key.starts_with(PREFIX));
        return Ok(own.map(|(key, value)| (key.clone(), value.clone())).collect());
    }
    let folder = source.path().parent().unwrap_or(Path::new("."));
    let path = folder.join(TOKENIZER_FILE);
    if path.exists() {
        let value = serde_json::Value::Object(json::read_object(&path)?);
        let rows = source.config().padded_vocab_size();
        if let Some(vocabulary) = Vocabulary::from_json(&path, &value, rows)? {
            let tokenizer = Tokenizer::open(&path)?;
            let end = end_of_sequence(folder, Some(&tokenizer))?.first().copied();
            return Ok(metadata(Vocabulary { end_of_sequence: end, ..vocabulary }));
        }
    }
    Ok(vec![("tokenizer.ggml.model".into(), Value::from("no_vocab"))])
}

fn metadata(vocabulary: Vocabulary) -> Vec<(String, Value)> {
    let kinds = vocabulary.kinds.iter().map(|&kind| kind as i32).collect();
    let ids = [
        ("bos_token_id", vocabulary.begin_of_sequence),
        ("eos_token_id", vocabulary.end_of_sequence),
        ("unknown_token_id", vocabulary.unknown),
        ("padding_token_id", vocabulary.padding),
    ];
    let ids = ids.into_iter().filter_map(|(key, id)| Some((key, Value::U32(id?))));
    [
        ("model", Value::Text(vocabulary.model)),
        ("pre", Value::Text(vocabulary.pre.unwrap_or_default())),
        ("tokens", Value::Array(Array::Text(vocabulary.tokens))),
        ("token_type", Value::Array(Array::I32(kinds))),
        ("merges", Value::Array(Array::Text(vocabulary.merges))),
        ("add_bos_token", Value::Bool(vocabulary.add_begin)),
        ("add_eos_token", Value::Bool(vocabulary.add_end)),
    ]
    .into_iter()
    .chain(ids)
    .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value))
    .collect()
}
