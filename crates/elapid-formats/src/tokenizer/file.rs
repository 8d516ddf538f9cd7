//! A `tokenizer.json`, read into the library's parts. The library's own reader is not used: it goes through a tree of
//! values, many times as large as the text, and panics where a part is damaged.

use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::Value;
use tokenizers::models::unigram::Unigram;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::{AddedToken, ModelWrapper, Tokenizer};

use super::bpe;
use super::parts::Part;

/// Bytes of all pieces together: each may become a node of a tree, in which it takes a hundred times as much. The largest
/// published vocabularies have half of this.
const MOST_PIECES: usize = 4 << 20;

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
    continuing_subword_prefix: Option<IgnoredAny>,
    unk_token: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct Pieces {
    vocab: Vec<(String, f64)>,
    unk_id: Option<usize>,
    #[serde(default)]
    byte_fallback: bool,
}

impl Pieces {
    fn build(self) -> tokenizers::Result<ModelWrapper> {
        let bytes: usize = self.vocab.iter().map(|(piece, _)| piece.len()).sum();
        if bytes > MOST_PIECES {
            return Err(format!(
                "pieces of {bytes} bytes together, at most {MOST_PIECES} are read"
            )
            .into());
        }
        Ok(Unigram::from(self.vocab, self.unk_id, self.byte_fallback)?.into())
    }
}

// Padding and truncation are left out.
#[derive(Deserialize)]
struct File<M> {
    version: Option<String>,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Part,
    #[serde(default)]
    pre_tokenizer: Part,
    #[serde(default)]
    post_processor: Part,
    #[serde(default)]
    decoder: Part,
    model: M,
}

/// The tokenizer of a file.
///
/// # Errors
/// If it is damaged, or of a kind that is not known.
pub(super) fn read(text: &[u8]) -> tokenizers::Result<Tokenizer> {
    let model = serde_json::from_slice::<Outline>(text)?.model;
    // Old files do not say; the library tells them apart so.
    let untyped = match (model.merges, model.continuing_subword_prefix, model.unk_token) {
        (Some(_), _, _) => "BPE",
        (None, Some(_), _) => "WordPiece",
        (None, None, Some(_)) => "WordLevel",
        (None, None, None) => "Unigram",
    };
    let kind = model.kind.as_deref().unwrap_or(untyped);
    match kind {
        "BPE" => {
            assemble(serde_json::from_slice(text)?, |model: bpe::Model| Ok(model.build()?.into()))
        }
        "WordLevel" => ready::<WordLevel>(text),
        "WordPiece" => ready::<WordPiece>(text),
        "Unigram" => assemble(serde_json::from_slice(text)?, Pieces::build),
        other => {
            let known = "BPE, WordLevel, WordPiece or Unigram";
            Err(format!("the model is of type {other:?}, expected {known}").into())
        }
    }
}

/// The tokenizer of a file without a model, that model, and tokens that are found in a text first.
///
/// # Errors
/// As [`read`].
pub(super) fn with_model(
    rest: Value,
    model: bpe::Model,
    added_tokens: Vec<AddedToken>,
) -> tokenizers::Result<Tokenizer> {
    let file = File::<Option<IgnoredAny>> { added_tokens, ..serde_json::from_value(rest)? };
    assemble(file, |_| Ok(model.build()?.into()))
}

/// Of a kind whose model the library reads without a tree.
fn ready<M: DeserializeOwned + Into<ModelWrapper>>(text: &[u8]) -> tokenizers::Result<Tokenizer> {
    assemble(serde_json::from_slice(text)?, |model: M| Ok(model.into()))
}

fn assemble<M>(
    file: File<M>,
    model: impl FnOnce(M) -> tokenizers::Result<ModelWrapper>,
) -> tokenizers::Result<Tokenizer> {
    if let Some(version) = file.version.filter(|version| version != "1.0") {
        return Err(format!("version {version}, expected 1.0").into());
    }
    let mut tokenizer = Tokenizer::new(model(file.model)?);
    tokenizer.with_normalizer(file.normalizer.normalizer()?)?;
    tokenizer.with_pre_tokenizer(file.pre_tokenizer.pre_tokenizer()?);
    tokenizer.with_post_processor(file.post_processor.post_processor()?);
    tokenizer.with_decoder(file.decoder.decoder()?);
    tokenizer.add_tokens(file.added_tokens)?;
    Ok(tokenizer)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Tokenizer, Value, read};

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
    fn other_models_are_those_of_the_library() {
        let vocab = json!({"a": 0, "b": 1, "##b": 2, "?": 3});
        let pieces = json!([["?", 0.0], ["a", -1.0], ["ab", -1.5]]);
        for model in [
            json!({"type": "WordLevel", "vocab": vocab, "unk_token": "?"}),
            json!({"vocab": vocab, "unk_token": "?"}),
            json!({"type": "WordPiece", "vocab": vocab, "unk_token": "?", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 9}),
            json!({"vocab": vocab, "unk_token": "?", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}),
            json!({"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": false}),
            json!({"unk_id": 0, "vocab": pieces}),
        ] {
            let text = with(model);
            let (own, library) =
                (read(text.as_bytes()).unwrap(), text.parse::<Tokenizer>().unwrap());
            assert_eq!(own.to_string(false).unwrap(), library.to_string(false).unwrap());
        }
        for (text, word) in [
            ("{}", "model"),
            ("not json", "expected"),
            (r#"{"model": {"type": "Words"}}"#, "Words"),
            (r#"{"model": {"type": "WordLevel", "vocab": 3}}"#, "expected a map"),
        ] {
            let error = read(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    /// Four bytes of size, a table of one entry that points far away, and no replacements.
    #[test]
    fn a_table_of_characters_that_points_outside_is_no_panic() {
        let table = r#"{"type":"Precompiled","precompiled_charsmap":"BAAAAP///38="}"#;
        let text = with(model(json!([]))).replace(r#"{"type":"NFC"}"#, table);
        assert!(text.contains("Precompiled"));
        let own = crate::Tokenizer::from_json("table.json".as_ref(), text.as_bytes());
        if let Err(error) = own.and_then(|own| own.encode("abé", false)) {
            assert!(error.to_string().contains("table.json"), "{error}");
        }
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
