//! Byte-pair encoding, from a `tokenizer.json` or the lists of another file, brought into the library's parts.
//!
//! The library's own reader goes through a tree of values, which takes longer than the weights of a small model, and
//! takes for granted that merges fit the vocabulary.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, SeqAccess, Visitor};
use serde_json::Value;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    Tokenizer,
};

/// What tells a model's kind.
#[derive(Deserialize)]
struct Outline {
    model: ModelOutline,
}

#[derive(Deserialize)]
struct ModelOutline {
    #[serde(rename = "type")]
    kind: Option<String>,
    merges: Option<IgnoredAny>,
}

// Padding and truncation are left out.
#[derive(Deserialize)]
struct File<M> {
    version: Option<String>,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    post_processor: Option<PostProcessorWrapper>,
    decoder: Option<DecoderWrapper>,
    model: M,
}

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

/// True for a file whose model is byte-pair encoding.
pub(super) fn describes(text: &[u8]) -> bool {
    serde_json::from_slice::<Outline>(text).is_ok_and(|file| match file.model.kind {
        Some(kind) => kind == "BPE",
        None => file.model.merges.is_some(),
    })
}

/// The tokenizer of such a file.
pub(super) fn read(text: &[u8]) -> tokenizers::Result<Tokenizer> {
    assemble(serde_json::from_slice::<File<Model>>(text)?, Model::build)
}

/// The tokenizer of a file without a model, and that model.
pub(super) fn with_model(rest: Value, model: Model) -> tokenizers::Result<Tokenizer> {
    assemble(serde_json::from_value::<File<Option<IgnoredAny>>>(rest)?, |_| model.build())
}

fn assemble<M>(
    file: File<M>,
    model: impl FnOnce(M) -> tokenizers::Result<BPE>,
) -> tokenizers::Result<Tokenizer> {
    if let Some(version) = file.version.filter(|version| version != "1.0") {
        return Err(format!("version {version}, expected 1.0").into());
    }
    let mut tokenizer = Tokenizer::new(model(file.model)?);
    tokenizer.with_normalizer(file.normalizer)?;
    tokenizer.with_pre_tokenizer(file.pre_tokenizer);
    tokenizer.with_post_processor(file.post_processor);
    tokenizer.with_decoder(file.decoder);
    tokenizer.add_tokens(file.added_tokens)?;
    Ok(tokenizer)
}

impl Model {
    /// Of plain lists. If `ignore_merges`, a word that is a token needs no merges.
    pub(super) fn of_lists(vocab: Vocab, merges: Vec<Merge>, ignore_merges: bool) -> Self {
        Self { vocab, merges, ignore_merges: Some(ignore_merges), ..Self::default() }
    }

    fn build(self) -> tokenizers::Result<BPE> {
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Tokenizer, Value, describes, read};

    fn with(model: Value) -> String {
        json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [
                {"id": 4, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
                 "normalized": false, "special": true},
                {"id": 9, "content": "éa", "single_word": false, "lstrip": true, "rstrip": false,
                 "normalized": true, "special": false},
            ],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": null,
            "decoder": {"type": "BPEDecoder", "suffix": "</w>"},
            "model": model,
        })
        .to_string()
    }

    fn model(merges: Value) -> Value {
        let vocab = json!({"a": 0, "b": 1, "ab": 2, "?": 3, "<end>": 4, "abab": 5});
        json!({"type": "BPE", "unk_token": "?", "fuse_unk": true, "vocab": vocab, "merges": merges})
    }

    #[test]
    fn files_are_read_as_the_library_reads_them() {
        let mut untyped = model(json!([["a", "b"], ["ab", "ab"]]));
        untyped.as_object_mut().unwrap().remove("type");
        let whole = json!({
            "type": "BPE", "dropout": 0.5, "unk_token": null, "continuing_subword_prefix": "##",
            "end_of_word_suffix": "</w>", "fuse_unk": false, "byte_fallback": true, "ignore_merges": true,
            "vocab": {"a": 0, "##b": 1, "ab": 2}, "merges": [["a", "##b"]],
        });
        for model in [
            model(json!(["a b", "ab ab"])),
            model(json!([["a", "b"], ["ab", "ab"]])),
            model(json!([])),
            untyped,
            whole,
        ] {
            let text = with(model);
            assert!(describes(text.as_bytes()));
            let (own, library) =
                (read(text.as_bytes()).unwrap(), text.parse::<Tokenizer>().unwrap());
            assert_eq!(own.to_string(false).unwrap(), library.to_string(false).unwrap());
            if !text.contains("dropout") {
                let text = "abab <end> e\u{301}a b abc";
                let ids = own.encode(text, true).unwrap().get_ids().to_vec();
                assert_eq!(ids, library.encode(text, true).unwrap().get_ids());
                assert_eq!(own.decode(&ids, true).unwrap(), library.decode(&ids, true).unwrap());
            }
        }
    }

    #[test]
    fn other_models_are_left_to_the_library() {
        let words = json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"});
        assert!(!describes(with(words).as_bytes()));
        assert!(!describes(b"{}"));
        assert!(!describes(b"not json"));
    }

    #[test]
    fn merges_that_do_not_fit_the_vocabulary_are_refused() {
        let prefixed = |prefix: &str, second: &str| {
            let vocab = json!({"a": 0, second: 1, "a long one": 2});
            json!({"type": "BPE", "continuing_subword_prefix": prefix, "vocab": vocab, "merges": [["a", second]]})
        };
        for (model, part) in [
            (model(json!([["abab", "ab"]])), "merge of \"abab\" and \"ab\""),
            (model(json!([["a", "c"]])), "vocabulary"),
            (model(json!(["a b c"])), "a merge"),
            (model(json!(["ab"])), "a merge"),
            (model(json!([["a"]])), "a merge"),
            (model(json!([["a", "b", "ab"]])), "a merge"),
            (model(json!([[0, 1]])), "string"),
            (prefixed("longer than that", "b"), "merge of \"a\" and \"b\""),
            (prefixed("#", "éb"), "merge of \"a\" and \"éb\""),
        ] {
            let error = read(with(model).as_bytes()).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        let newer = with(model(json!([]))).replace("\"1.0\"", "\"2.0\"");
        assert!(read(newer.as_bytes()).unwrap_err().to_string().contains("version 2.0"));
    }
}
