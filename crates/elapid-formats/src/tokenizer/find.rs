//! Where a model's tokenizer is, and which tokens end a sequence.

use std::path::Path;

use elapid_models::MambaConfig;
use serde_json::Value;

use super::{Kind, TOKENIZER_FILE, Tokenizer};
use crate::hf::CONFIG_FILE;
use crate::{Error, Result, json};

const GENERATION_FILE: &str = "generation_config.json";
const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";
const EOS: &str = "eos_token_id";

/// What [`Tokenizer::find`] looks for, for messages.
pub const LOOKED_FOR: &str = "tokenizer.json in the model's folder, a vocabulary in a GGUF file, or a vocabulary of 256 tokens = bytes";

impl Tokenizer {
    /// The tokenizer of the model in a folder: its `tokenizer.json`; bytes for a vocabulary of 256 without
    /// one; else none. Of a GGUF file: the vocabulary inside, or likewise.
    ///
    /// # Errors
    /// If there is one that cannot be used.
    pub fn find(folder: &Path, config: &MambaConfig) -> Result<Option<Self>> {
        if folder.is_file() {
            let file = crate::model_source::Bytes::map(folder)?;
            if file.starts_with(&crate::gguf::MAGIC) {
                let vocabulary = crate::gguf::GgufFile::from_bytes(folder, file)?.vocabulary()?;
                if let Some(tokenizer) = vocabulary.tokenizer(folder)? {
                    return Ok(Some(tokenizer));
                }
            }
        }
        let path = folder.join(TOKENIZER_FILE);
        if path.exists() {
            return Self::open(&path).map(Some);
        }
        Ok((config.vocab_size == 256).then(Self::bytes))
    }
}

/// The tokens that end a sequence: those of `generation_config.json`, or else of `config.json`, or else the
/// `eos_token` of `tokenizer_config.json`, or else what the vocabulary itself says.
///
/// # Errors
/// If one of these files is damaged, or has something else under the key.
pub fn end_of_sequence(folder: &Path, tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>> {
    for name in [GENERATION_FILE, CONFIG_FILE] {
        let path = folder.join(name);
        if !path.exists() {
            continue;
        }
        match json::read_object(&path)?.get(EOS) {
            None | Some(Value::Null) => {}
            Some(value) => return ids(&path, value),
        }
    }
    let path = folder.join(TOKENIZER_CONFIG_FILE);
    if let Some(tokenizer) = tokenizer
        && path.exists()
    {
        let object = json::read_object(&path)?;
        let token = object.get("eos_token").map(|token| token.get("content").unwrap_or(token));
        if let Some(id) = token.and_then(Value::as_str).and_then(|token| tokenizer.id(token)) {
            return Ok(vec![id]);
        }
    }
    Ok(match tokenizer.map(|tokenizer| &tokenizer.0) {
        Some(Kind::Subwords(own)) => own.end_of_sequence.clone(),
        _ => Vec::new(),
    })
}

fn ids(path: &Path, value: &Value) -> Result<Vec<u32>> {
    let all = match value {
        Value::Array(values) => values.as_slice(),
        one => std::slice::from_ref(one),
    };
    all.iter()
        .map(|value| match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
            Some(id) => Ok(id),
            None => Err(Error::Config {
                path: path.into(),
                key: EOS.into(),
                expected: "a token id, or an array of them".into(),
                found: value.to_string(),
            }),
        })
        .collect()
}
