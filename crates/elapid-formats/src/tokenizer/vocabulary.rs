//! Vocabularies as GGUF files keep them: lists of tokens, their kinds and merges, and the name of the rule
//! that divides a text into words. They become a `tokenizer.json` and from there a [`Tokenizer`]; a
//! byte-level `tokenizer.json` becomes such lists, so that models can be converted both ways.
//!
//! GGUF has no place for a normaliser, so what comes back from it has none (GPT-NeoX's is NFC).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::AddedToken;
use tokenizers::models::bpe::Vocab;

use super::{Tokenizer, bpe, file};
use crate::{Error, Result, Texts};

/// What a token is (`tokenizer.ggml.token_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TokenKind {
    /// Text.
    #[default]
    Normal = 1,
    /// Stands for what no token covers.
    Unknown = 2,
    /// A mark that is not text.
    Control = 3,
    /// Text that is always one token.
    UserDefined = 4,
    /// A row that nobody uses.
    Unused = 5,
    /// A single byte.
    Byte = 6,
}

impl TokenKind {
    /// The kind of a number in a file.
    pub fn from_number(number: i64) -> Option<Self> {
        let all = [
            Self::Normal,
            Self::Unknown,
            Self::Control,
            Self::UserDefined,
            Self::Unused,
            Self::Byte,
        ];
        all.into_iter().find(|&kind| kind as i64 == number)
    }
}

/// The vocabulary inside a GGUF file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vocabulary {
    /// `tokenizer.ggml.model`: `gpt2` is byte-level BPE; `none` or `no_vocab` says that there is none.
    pub model: String,
    /// `tokenizer.ggml.pre`: how a text is divided into words.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`: the text of each id, in the byte-level alphabet.
    pub tokens: Texts,
    /// `tokenizer.ggml.token_type`: one for each token, or empty if all are normal.
    pub kinds: Vec<TokenKind>,
    /// `tokenizer.ggml.merges`: two tokens with a space between them, best first.
    pub merges: Texts,
    /// `tokenizer.ggml.bos_token_id`.
    pub begin_of_sequence: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub end_of_sequence: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unknown: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`.
    pub padding: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_begin: bool,
    /// `tokenizer.ggml.add_eos_token`.
    pub add_end: bool,
}

/// Each takes half a kilobyte in the automaton that looks for them, and sixteen bytes in a file.
const MOST_MARKS: usize = 1 << 14;

/// GPT-2's division of a text into words, which the byte-level step has built in.
const GPT2: &[&str] =
    &["", "default", "gpt-2", "gpt2", "gpt-neox", "mpt", "olmo", "phi-2", "jais", "exaone4"];
const LLAMA3: &[&str] = &["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1"];
const QWEN2: &[&str] = &["qwen2", "deepseek-r1-qwen"];
const FALCON: &[&str] = &["falcon"];

/// Words of up to `digits` digits.
fn cased(digits: &str) -> String {
    format!(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|\\p{{N}}{digits}|\
         \x20?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    )
}

fn split(pattern: &str) -> Value {
    json!({
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false,
    })
}

fn byte_level(use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex,
    })
}

/// The steps that divide a text into words, by the name that GGUF gives them.
fn division(pre: &str) -> Option<Value> {
    let steps = |steps: &[Value]| json!({"type": "Sequence", "pretokenizers": steps});
    Some(if GPT2.contains(&pre) {
        byte_level(true)
    } else if LLAMA3.contains(&pre) {
        steps(&[split(&cased("{1,3}")), byte_level(false)])
    } else if QWEN2.contains(&pre) {
        steps(&[split(&cased("")), byte_level(false)])
    } else if FALCON.contains(&pre) {
        steps(&[
            json!({"type": "Punctuation", "behavior": "Contiguous"}),
            byte_level(true),
            json!({"type": "Digits", "individual_digits": false}),
            split("[0-9][0-9][0-9]"),
        ])
    } else {
        return None;
    })
}

fn refused(source: &Path, key: &str, expected: &str, found: String) -> Error {
    Error::Config {
        path: source.into(),
        key: format!("tokenizer.ggml.{key}"),
        expected: expected.into(),
        found,
    }
}

impl Vocabulary {
    /// The tokenizer, or none if the file says that it has none. `source` is for errors.
    ///
    /// # Errors
    /// If it is of a kind that is not known here, or its lists do not fit each other.
    pub fn tokenizer(&self, source: &Path) -> Result<Option<Tokenizer>> {
        let Some((rest, ignore_merges)) = self.without_model(source)? else { return Ok(None) };
        let (vocab, merges) = self.vocab_and_merges(source)?;
        let model = bpe::Model::of_lists(vocab, merges, ignore_merges);
        let end = self.end_of_sequence.into_iter().collect();
        let inner =
            file::with_model(rest, model, self.added_tokens().map(|(_, token)| token).collect());
        Tokenizer::build(source, inner, end).map(Some)
    }

    /// The vocabulary as a `tokenizer.json`, or none if the file says that it has none.
    ///
    /// # Errors
    /// As [`Vocabulary::tokenizer`].
    pub fn to_json(&self, source: &Path) -> Result<Option<Value>> {
        let Some((mut file, ignore_merges)) = self.without_model(source)? else { return Ok(None) };
        let (vocab, merges) = self.vocab_and_merges(source)?;
        let mut vocabulary: Vec<_> = vocab.into_iter().collect();
        vocabulary.sort_unstable_by_key(|&(_, id)| id);
        let vocabulary: Map<String, Value> =
            vocabulary.into_iter().map(|(token, id)| (token, json!(id))).collect();
        let merges: Vec<Value> =
            merges.into_iter().map(|bpe::Merge(left, right)| json!([left, right])).collect();
        let added = self.added_tokens().map(|(id, token)| {
            let mut token = json!(token);
            token["id"] = json!(id);
            token
        });
        file["added_tokens"] = added.collect();
        file["model"] = json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": ignore_merges, "vocab": vocabulary, "merges": merges,
        });
        Ok(Some(file))
    }

    /// The id of every token, and the merges.
    fn vocab_and_merges(&self, source: &Path) -> Result<(Vocab, Vec<bpe::Merge>)> {
        let refuse = |key, expected, found| Err(refused(source, key, expected, found));
        let mut vocab = Vocab::with_capacity(self.tokens.len());
        for (id, token) in (0..).zip(self.tokens.iter()) {
            if vocab.insert(token.to_owned(), id).is_some() {
                return refuse("tokens", "every token once", format!("{token:?} twice"));
            }
        }
        let mut merges = Vec::with_capacity(self.merges.len());
        for merge in self.merges.iter() {
            match merge.split_once(' ') {
                Some((left, right)) if !left.is_empty() && !right.is_empty() => {
                    merges.push(bpe::Merge(left.into(), right.into()));
                }
                _ => {
                    let expected = "two tokens with a space between";
                    return refuse("merges", expected, format!("{merge:?}"));
                }
            }
        }
        Ok((vocab, merges))
    }

    /// The `tokenizer.json` without its model, and whether a word that is a token needs no merges; none if the file says
    /// that it has no vocabulary.
    fn without_model(&self, source: &Path) -> Result<Option<(Value, bool)>> {
        let refuse =
            |key: &str, expected: &str, found: String| Err(refused(source, key, expected, found));
        match self.model.as_str() {
            "gpt2" => {}
            "" | "none" | "no_vocab" => return Ok(None),
            other => return refuse("model", "\"gpt2\" (byte-level BPE)", format!("{other:?}")),
        }
        let pre = self.pre.as_deref().unwrap_or_default();
        let Some(pre_tokenizer) = division(pre) else {
            let known = [GPT2, LLAMA3, QWEN2, FALCON].concat()[1..].join(", ");
            return refuse("pre", &format!("one of {known}"), format!("{pre:?}"));
        };
        let count = self.tokens.len();
        if !self.kinds.is_empty() && self.kinds.len() != count {
            let expected = format!("one for each of {count} tokens");
            return refuse("token_type", &expected, self.kinds.len().to_string());
        }
        let marks = self.added_tokens().count();
        if marks > MOST_MARKS {
            let expected = format!("at most {MOST_MARKS} tokens that are no normal text");
            return refuse("token_type", &expected, marks.to_string());
        }
        let special = [
            ("bos_token_id", self.begin_of_sequence),
            ("eos_token_id", self.end_of_sequence),
            ("unknown_token_id", self.unknown),
            ("padding_token_id", self.padding),
        ];
        for (key, id) in special {
            if let Some(id) = id
                && id as usize >= count
            {
                return refuse(key, &format!("an id below {count}"), id.to_string());
            }
        }
        let file = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "normalizer": null,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.post_processor(),
            "decoder": byte_level(true),
        });
        Ok(Some((file, LLAMA3.contains(&pre))))
    }

    fn kind(&self, id: usize) -> TokenKind {
        self.kinds.get(id).copied().unwrap_or_default()
    }

    /// Tokens that are found in a text before it is divided into words, with their ids.
    fn added_tokens(&self) -> impl Iterator<Item = (usize, AddedToken)> {
        let ends = [self.begin_of_sequence, self.end_of_sequence, self.unknown, self.padding];
        self.tokens.iter().enumerate().filter_map(move |(id, token)| {
            let special = match self.kind(id) {
                TokenKind::Control => true,
                TokenKind::UserDefined => false,
                // Files without kinds name their marks at least.
                _ if self.kinds.is_empty() && ends.contains(&u32::try_from(id).ok()) => true,
                _ => return None,
            };
            Some((id, AddedToken { normalized: false, ..AddedToken::from(token, special) }))
        })
    }

    /// Marks around a whole text, where the file asks for them.
    fn post_processor(&self) -> Value {
        let begin = self.begin_of_sequence.filter(|_| self.add_begin);
        let end = self.end_of_sequence.filter(|_| self.add_end);
        if begin.is_none() && end.is_none() {
            return Value::Null;
        }
        let token = |id: u32| self.tokens.get(id as usize).unwrap_or_default().to_owned();
        let mark = |id: u32| json!({"SpecialToken": {"id": token(id), "type_id": 0}});
        let sequence = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
        let around = |inner: &[Value]| -> Vec<Value> {
            begin.map(mark).into_iter().chain(inner.iter().cloned()).chain(end.map(mark)).collect()
        };
        let special: BTreeMap<String, Value> = [begin, end]
            .into_iter()
            .flatten()
            .map(|id| (token(id), json!({"id": token(id), "ids": [id], "tokens": [token(id)]})))
            .collect();
        json!({
            "type": "TemplateProcessing",
            "single": around(&[sequence("A")]),
            "pair": around(&[sequence("A"), sequence("B")]),
            "special_tokens": special,
        })
    }

    /// The lists of a byte-level BPE `tokenizer.json`, for a model whose vocabulary has `rows` rows (rows
    /// without a token get a name of their own). None if it is of another kind, which GGUF cannot keep
    /// this way. What ends a sequence stands elsewhere ([`super::end_of_sequence`]).
    ///
    /// # Errors
    /// If an id is `rows` or more.
    pub fn from_json(source: &Path, value: &Value, rows: usize) -> Result<Option<Self>> {
        let model = &value["model"];
        let byte_level = value["decoder"]["type"] == "ByteLevel";
        let bpe = model["type"] == "BPE" || (model["type"].is_null() && !model["merges"].is_null());
        let (Some(vocabulary), Some(pairs)) =
            (model["vocab"].as_object(), model["merges"].as_array())
        else {
            return Ok(None);
        };
        let Some(pre) = name_of_division(&value["pre_tokenizer"]) else { return Ok(None) };
        if !byte_level || !bpe {
            return Ok(None);
        }
        let mut tokens: Vec<String> = (0..rows).map(|id| format!("[PAD{id}]")).collect();
        let mut kinds = vec![TokenKind::Unused; rows];
        let empty = Vec::new();
        let added = value["added_tokens"].as_array().unwrap_or(&empty);
        let normal = vocabulary.iter().map(|(token, id)| (token.as_str(), id, TokenKind::Normal));
        let added = added.iter().map(|token| {
            let special = token["special"] == true;
            let kind = if special { TokenKind::Control } else { TokenKind::UserDefined };
            (token["content"].as_str().unwrap_or_default(), &token["id"], kind)
        });
        for (token, id, kind) in normal.chain(added) {
            let place = id.as_u64().and_then(|id| usize::try_from(id).ok()).filter(|&id| id < rows);
            let Some(place) = place else {
                return Err(Error::Mismatch {
                    path: source.into(),
                    what: "token id",
                    expected: format!("below {rows}, the rows of the embedding"),
                    found: format!("{id} for {token:?}"),
                });
            };
            token.clone_into(&mut tokens[place]);
            kinds[place] = kind;
        }
        let merges = pairs.iter().map(|pair| match pair {
            Value::String(text) => Some(Cow::Borrowed(text.as_str())),
            pair => Some(format!("{} {}", pair[0].as_str()?, pair[1].as_str()?).into()),
        });
        let Some(merges) = merges.collect() else {
            return Err(Error::format(source, "a merge is not a pair of tokens"));
        };
        Ok(Some(Self {
            model: "gpt2".into(),
            pre: Some(pre.into()),
            tokens: tokens.into_iter().collect(),
            kinds,
            merges,
            ..Self::default()
        }))
    }
}

/// GGUF's name of the steps that divide a text into words.
fn name_of_division(pre_tokenizer: &Value) -> Option<&'static str> {
    let same = |pre: &str| division(pre).is_some_and(|steps| same_steps(&steps, pre_tokenizer));
    ["gpt-2", "llama-bpe", "qwen2", "falcon"].into_iter().find(|pre| same(pre))
}

/// Whether two steps do the same: offsets play no part, and a missing `use_regex` means true.
fn same_steps(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(x), Value::Object(y)) => {
            let value = |object: &Map<String, Value>, key: &str| match object.get(key) {
                None if key == "use_regex" => Value::Bool(true),
                found => found.cloned().unwrap_or_default(),
            };
            x.keys()
                .chain(y.keys())
                .filter(|key| *key != "trim_offsets")
                .all(|key| same_steps(&value(x, key), &value(y, key)))
        }
        (Value::Array(x), Value::Array(y)) => {
            x.len() == y.len() && x.iter().zip(y).all(|(x, y)| same_steps(x, y))
        }
        (Value::String(x), Value::String(y)) => x == y,
        _ => a == b,
    }
}
