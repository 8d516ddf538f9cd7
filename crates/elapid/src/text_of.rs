//! What the tokens of a model mean: its tokenizer, and the tokens that end a text.

use std::path::{Path, PathBuf};

use anyhow::Result;
use elapid_formats::Tokenizer;
use elapid_formats::tokenizer::{LOOKED_FOR, TOKENIZER_FILE, end_of_sequence};
use elapid_models::MambaConfig;

use crate::exit::Usage;
use crate::hub;

/// A model's tokenizer and ends.
#[derive(Debug)]
pub struct TextOf {
    /// None if there is none.
    pub tokenizer: Option<Tokenizer>,
    /// Tokens that end a text.
    pub end_of_sequence: Vec<u32>,
    model: PathBuf,
    tokens: usize,
}

impl TextOf {
    /// Of the model in a folder, with `tokenizer` (a file, a folder that has one, or a model on the hub) instead
    /// of its own.
    ///
    /// # Errors
    /// If a tokenizer is there, or was given, that cannot be used.
    pub fn model(folder: &Path, config: &MambaConfig, tokenizer: Option<&Path>) -> Result<Self> {
        let tokenizer = match tokenizer {
            None => Tokenizer::find(folder, config)?,
            Some(path) if !path.exists() => match hub::tokenizer(path)? {
                Some(found) if found.is_dir() => {
                    Some(Tokenizer::open(&found.join(TOKENIZER_FILE))?)
                }
                Some(found) => Some(Tokenizer::open(&found)?),
                None => Some(Tokenizer::open(path)?),
            },
            Some(path) if path.is_dir() => Some(Tokenizer::open(&path.join(TOKENIZER_FILE))?),
            Some(path) => Some(Tokenizer::open(path)?),
        };
        let end_of_sequence = end_of_sequence(folder, tokenizer.as_ref())?;
        let (model, tokens) = (folder.to_path_buf(), config.vocab_size);
        Ok(Self { tokenizer, end_of_sequence, model, tokens })
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// If there is none; says what was looked for.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            Usage::new(format!(
                "{} has a vocabulary of {} tokens and no tokenizer (looked for: {LOOKED_FOR}): give one with \
                 --tokenizer FILE; elapid generate also takes token ids, with --tokens 1,2,3",
                self.model.display(),
                self.tokens
            ))
            .into()
        })
    }
}
