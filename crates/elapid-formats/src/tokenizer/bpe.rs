//! Byte-pair encoding, from a `tokenizer.json` or the lists of another file, brought into the library's parts.
//!
//! The library's own reader goes through a tree of values, which takes longer than the weights of a small model, and
//! takes for granted that merges fit the vocabulary.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, SeqAccess, Visitor};
use tokenizers::models::bpe::{BPE, Vocab};

/// The model of a file.
#[derive(Deserialize, Default)]
pub(super) struct Model {
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
    vocab: Vocab,
    merges: Vec<Merge>,
}

/// Two tokens that become one: an array of both, or one text with a space between them.
pub(super) struct Merge(pub(super) String, pub(super) String);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = Merge;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a merge: two tokens, or a text of two tokens with a space between them",
                )
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Merge, E> {
                match text.split_once(' ') {
                    Some((first, second)) if !second.contains(' ') => {
                        Ok(Merge(first.into(), second.into()))
                    }
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut tokens: A) -> Result<Merge, A::Error> {
                let mut next =
                    |at| tokens.next_element()?.ok_or_else(|| A::Error::invalid_length(at, &self));
                let merge = Merge(next(0)?, next(1)?);
                match tokens.next_element::<IgnoredAny>()? {
                    None => Ok(merge),
                    Some(_) => Err(A::Error::invalid_length(3, &self)),
                }
            }
        }

        deserializer.deserialize_any(Either)
    }
}

impl Model {
    /// Of plain lists. If `ignore_merges`, a word that is a token needs no merges.
    pub(super) fn of_lists(vocab: Vocab, merges: Vec<Merge>, ignore_merges: bool) -> Self {
        Self { vocab, merges, ignore_merges: Some(ignore_merges), ..Self::default() }
    }

    /// The library's model.
    ///
    /// # Errors
    /// If a merge does not fit the vocabulary.
    pub(super) fn build(self) -> tokenizers::Result<BPE> {
        let prefix = self.continuing_subword_prefix.as_deref().unwrap_or_default().len();
        let longest = self.vocab.keys().map(String::len).max().unwrap_or_default();
        for Merge(first, second) in &self.merges {
            if !second.is_char_boundary(prefix) || first.len() + second.len() - prefix > longest {
                return Err(format!(
                    "the merge of {first:?} and {second:?} makes a token that is not in the vocabulary"
                )
                .into());
            }
        }
        let merges = self.merges.into_iter().map(|Merge(first, second)| (first, second)).collect();
        let mut builder = BPE::builder()
            .vocab_and_merges(self.vocab, merges)
            .fuse_unk(self.fuse_unk.unwrap_or_default())
            .byte_fallback(self.byte_fallback.unwrap_or_default())
            .ignore_merges(self.ignore_merges.unwrap_or_default());
        if let Some(dropout) = self.dropout {
            builder = builder.dropout(dropout);
        }
        if let Some(token) = self.unk_token {
            builder = builder.unk_token(token);
        }
        if let Some(prefix) = self.continuing_subword_prefix {
            builder = builder.continuing_subword_prefix(prefix);
        }
        if let Some(suffix) = self.end_of_word_suffix {
            builder = builder.end_of_word_suffix(suffix);
        }
        builder.build()
    }
}
