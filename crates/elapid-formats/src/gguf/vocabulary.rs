//! What a GGUF file says about its tokens.

use super::read::GgufFile;
use super::value::Value;
use crate::Result;
use crate::model_source::{Format, ModelSource};

const PREFIX: &str = "tokenizer.";

/// The metadata about a model's tokens: that of the GGUF file it comes from, or that it has none.
///
/// # Errors
/// If a file of the model cannot be read.
pub fn vocabulary_of(source: &ModelSource) -> Result<Vec<(String, Value)>> {
    if source.format() == Format::Gguf {
        let file = GgufFile::open(source.path())?;
        let own = file.metadata().iter().filter(|(key, _)| key.starts_with(PREFIX));
        return Ok(own.map(|(key, value)| (key.clone(), value.clone())).collect());
    }
    Ok(vec![("tokenizer.ggml.model".into(), Value::from("no_vocab"))])
}
