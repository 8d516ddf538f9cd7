//! Tokenizers from every place that has one: ids, text, and text that comes token by token.

use std::path::{Path, PathBuf};

use elapid_formats::tokenizer::{TokenKind, Tokenizer, Vocabulary, end_of_sequence};
use elapid_models::MambaConfig;
use proptest::prelude::*;
use serde_json::{Value, json};

/// All that the tokens give, one after the other, as bytes.
fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<u8> {
    let mut stream = tokenizer.detokenizer(&[]);
    let mut bytes = Vec::new();
    for &id in ids {
        stream.push(id, &mut bytes);
    }
    stream.finish(&mut bytes);
    bytes
}

/// A byte-level vocabulary: the 256 bytes in GPT-2's alphabet, six merges, two marks.
fn small() -> Vocabulary {
    let alphabet = (0..=255u8).map(|byte| match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        // The others follow from U+0100 on.
        0..=32 => char::from_u32(0x100 + u32::from(byte)).unwrap(),
        127..=160 => char::from_u32(0x121 + u32::from(byte) - 127).unwrap(),
        _ => '\u{143}',
    });
    let mut tokens: Vec<String> = alphabet.map(String::from).collect();
    tokens.extend(["th", "the", "Ġthe", "Ã©", "ĠĠ", "12"].map(String::from));
    let merges = ["t h", "th e", "Ġ the", "Ã ©", "Ġ Ġ", "1 2"].map(String::from);
    tokens.extend(["<|end|>", "<|user|>"].map(String::from));
    let mut kinds = vec![TokenKind::Normal; tokens.len()];
    kinds[262] = TokenKind::Control;
    kinds[263] = TokenKind::UserDefined;
    Vocabulary {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens: tokens.into_iter().collect(),
        kinds,
        merges: merges.into(),
        end_of_sequence: Some(262),
        ..Vocabulary::default()
    }
}

fn small_tokenizer() -> Tokenizer {
    small().tokenizer(Path::new("small.gguf")).unwrap().unwrap()
}

/// Words with a mark for the space, pieces by probability, bytes for the rest: nothing byte-level about it.
fn sentence_pieces() -> Value {
    let mut vocabulary = vec![json!(["<unk>", 0.0]), json!(["</s>", 0.0])];
    vocabulary.extend((0..=255).map(|byte| json!([format!("<0x{byte:02X}>"), -9.0])));
    for (piece, score) in [("▁", -3.0), ("▁Hello", -1.0), ("▁wor", -1.5), ("ld", -1.5), ("o", -4.0)]
    {
        vocabulary.push(json!([piece, score]));
    }
    json!({
        "version": "1.0", "truncation": null,
        "padding": {
            "strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>",
        },
        "added_tokens": [{
            "id": 1, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }],
        "normalizer": null,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": true},
    })
}

fn sentence_tokenizer() -> Tokenizer {
    let text = sentence_pieces().to_string();
    Tokenizer::from_json(Path::new("tokenizer.json"), text.as_bytes()).unwrap()
}

fn data(name: &str) -> Option<PathBuf> {
    match std::env::var_os("ELAPID_FIXTURES") {
        Some(folder) => Some(Path::new(&folder).join("data/tokenizers").join(name)),
        None => {
            eprintln!("SKIPPED: ELAPID_FIXTURES is not set, so there is no {name}");
            None
        }
    }
}

/// (text, ids, decoded text) of the GPT-NeoX tokenizer.
fn neox_cases() -> Option<Vec<(String, Vec<u32>, String)>> {
    let text = std::fs::read_to_string(data("gpt-neox-20b-cases.json")?).unwrap();
    let value: Value = serde_json::from_str(&text).unwrap();
    let cases: Vec<_> = value["cases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|case| {
            let ids = case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32);
            let text = |key: &str| case[key].as_str().unwrap().to_owned();
            (text("text"), ids.collect(), text("decoded"))
        })
        .collect();
    assert_eq!(cases.len(), 27);
    Some(cases)
}

#[test]
fn gpt_neox_gives_the_ids_and_texts_of_its_cases() {
    let Some(cases) = neox_cases() else { return };
    let path = data("gpt-neox-20b-tokenizer.json").unwrap();
    let tokenizer = Tokenizer::open(&path).unwrap();
    assert_eq!(tokenizer.vocab_size(), 50_277);
    for (text, ids, decoded) in &cases {
        assert_eq!(&tokenizer.encode(text, true).unwrap(), ids, "{text:?}");
        assert_eq!(&tokenizer.decode(ids, false).unwrap(), decoded);
        let bytes = streamed(&tokenizer, ids);
        assert_eq!(String::from_utf8(bytes).unwrap(), tokenizer.decode(ids, true).unwrap());
    }
}

#[test]
fn gpt_neox_through_the_lists_of_a_gguf_file() {
    let Some(cases) = neox_cases() else { return };
    let path = data("gpt-neox-20b-tokenizer.json").unwrap();
    let value: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let lists = Vocabulary::from_json(&path, &value, 50_280).unwrap().unwrap();
    assert_eq!((lists.tokens.len(), lists.pre.as_deref()), (50_280, Some("gpt-2")));
    let tokenizer = lists.tokenizer(Path::new("x.gguf")).unwrap().unwrap();
    for (text, ids, decoded) in &cases {
        // GGUF keeps no normaliser.
        if text == decoded {
            assert_eq!(&tokenizer.encode(text, true).unwrap(), ids, "{text:?}");
        }
        assert_eq!(&tokenizer.decode(ids, false).unwrap(), decoded);
    }
    let small_rows = Vocabulary::from_json(&path, &value, 50_000).unwrap_err().to_string();
    assert!(small_rows.contains("below 50000"), "{small_rows}");
}

#[test]
fn bytes_are_their_own_ids() {
    let tokenizer = Tokenizer::bytes();
    assert_eq!(tokenizer.encode("é!", true).unwrap(), [0xC3, 0xA9, 33]);
    assert_eq!(tokenizer.encode_bytes(&[0xFF], true).unwrap(), [0xFF]);
    assert_eq!(tokenizer.decode(&[0xC3, 0xA9, 300, 0xFF], true).unwrap(), "é\u{FFFD}");
    assert_eq!(streamed(&tokenizer, &[0xC3, 0xA9, 300, 0xFF]), [0xC3, 0xA9, 0xFF]);
    assert_eq!((tokenizer.id("a"), tokenizer.id("é")), (Some(97), None));
}

#[test]
fn a_vocabulary_of_gguf_encodes_and_decodes() {
    let tokenizer = small_tokenizer();
    let ids = tokenizer.encode("the the  12é<|user|>x<|end|>", true).unwrap();
    assert_eq!(
        ids,
        [257, 258, 0x20, 0x20, 261, 259, 263, u32::from(b'x'), 262],
        "{:?}",
        tokenizer.decode(&ids, false)
    );
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "the the  12é<|user|>x");
    assert_eq!(streamed(&tokenizer, &ids), "the the  12é<|user|>x".as_bytes());
    assert_eq!(tokenizer.encode("e\u{301}", true).unwrap(), [0x65, 0xCC, 0x81]);

    let marks = Vocabulary { add_begin: true, begin_of_sequence: Some(262), ..small() };
    let tokenizer = marks.tokenizer(Path::new("m.gguf")).unwrap().unwrap();
    assert_eq!(tokenizer.encode("the", true).unwrap(), [262, 257]);
    assert_eq!(tokenizer.encode("the", false).unwrap(), [257]);

    let none = Vocabulary { model: "no_vocab".into(), ..Vocabulary::default() };
    assert!(none.tokenizer(Path::new("n.gguf")).unwrap().is_none());
}

#[test]
fn lists_become_a_tokenizer_file_and_lists_again() {
    for pre in ["gpt-2", "llama-bpe", "qwen2", "falcon"] {
        let lists = Vocabulary { pre: Some(pre.into()), end_of_sequence: None, ..small() };
        let value = lists.to_json(Path::new("a.gguf")).unwrap().unwrap();
        let again = Vocabulary::from_json(Path::new("b.json"), &value, 264).unwrap().unwrap();
        assert_eq!(lists, again);
        lists.tokenizer(Path::new("a.gguf")).unwrap().unwrap();
    }
    let other = sentence_pieces();
    assert_eq!(Vocabulary::from_json(Path::new("c.json"), &other, 300).unwrap(), None);
}

#[test]
fn lists_that_do_not_fit_are_refused_by_name() {
    let path = Path::new("bad.gguf");
    let refused = |vocabulary: Vocabulary, parts: &[&str]| {
        let text = vocabulary.tokenizer(path).unwrap_err().to_string();
        for part in ["bad.gguf"].iter().chain(parts) {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
    };
    refused(Vocabulary { model: "bert".into(), ..small() }, &["ggml.model", "\"bert\"", "gpt2"]);
    refused(
        Vocabulary { pre: Some("own".into()), ..small() },
        &["ggml.pre", "\"own\"", "llama-bpe"],
    );
    refused(
        Vocabulary { kinds: vec![TokenKind::Normal], ..small() },
        &["token_type", "264", "found 1"],
    );
    refused(Vocabulary { end_of_sequence: Some(264), ..small() }, &["eos_token_id", "264"]);
    refused(Vocabulary { merges: ["th"].into(), ..small() }, &["merges", "\"th\""]);
    refused(Vocabulary { merges: ["th x"].into(), ..small() }, &["th", "tokenizer"]);
    let twice = Vocabulary { tokens: ["a", "a"].into(), kinds: vec![], ..small() };
    refused(Vocabulary { end_of_sequence: None, ..twice }, &["tokens", "\"a\" twice"]);
}

#[test]
fn a_tokenizer_that_is_not_byte_level() {
    let tokenizer = sentence_tokenizer();
    let ids = tokenizer.encode("Hello world", true).unwrap();
    // Padding is left out, the mark at the end is not.
    assert_eq!((ids.len(), ids.last()), (4, Some(&1)));
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "Hello world");
    assert_eq!(streamed(&tokenizer, &ids), b"Hello world");
    assert!(tokenizer.encode_bytes(&[b'a', 0xFF], true).unwrap_err().to_string().contains("UTF-8"));
}

#[test]
fn no_character_is_broken_and_none_waits_forever() {
    let tokenizer = sentence_tokenizer();
    let ids = tokenizer.encode("Hello 🐍o", false).unwrap();
    let mut stream = tokenizer.detokenizer(&[]);
    let mut shown = Vec::new();
    for &id in &ids {
        let mut bytes = Vec::new();
        stream.push(id, &mut bytes);
        shown.push(String::from_utf8(bytes).unwrap());
    }
    assert_eq!(shown, ["Hello", " ", "", "", "", "🐍", "o"]);
    // The space of a word that goes on from a prompt is text.
    let (before, after) = (tokenizer.encode("Hello", false).unwrap(), "▁wor");
    let mut bytes = Vec::new();
    tokenizer.detokenizer(&before).push(tokenizer.id(after).unwrap(), &mut bytes);
    assert_eq!(bytes, b" wor");
    // <0xFF> is no character; it is shown as such after a while, and at the end at the latest.
    let bad = tokenizer.id("<0xFF>").unwrap();
    let mut stream = tokenizer.detokenizer(&[]);
    let mut bytes = Vec::new();
    stream.push(bad, &mut bytes);
    assert!(bytes.is_empty());
    for _ in 0..8 {
        stream.push(bad, &mut bytes);
    }
    assert!(!bytes.is_empty());
    let mut stream = tokenizer.detokenizer(&[]);
    let mut bytes = Vec::new();
    stream.push(bad, &mut bytes);
    stream.finish(&mut bytes);
    assert_eq!(bytes, "\u{FFFD}".as_bytes());
}

#[test]
fn a_folder_has_its_tokenizer_and_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let write =
        |name: &str, value: Value| std::fs::write(path.join(name), value.to_string()).unwrap();
    let own = MambaConfig { vocab_size: 264, ..MambaConfig::default() };
    let bytes = MambaConfig { vocab_size: 256, ..MambaConfig::default() };
    assert!(Tokenizer::find(path, &own).unwrap().is_none());
    assert!(Tokenizer::find(path, &bytes).unwrap().is_some_and(|found| found.is_bytes()));
    assert!(end_of_sequence(path, None).unwrap().is_empty());

    write("tokenizer.json", small().to_json(Path::new("x")).unwrap().unwrap());
    let tokenizer = Tokenizer::find(path, &own).unwrap().unwrap();
    assert_eq!(tokenizer.source(), Some(path.join("tokenizer.json").as_path()));
    write("tokenizer_config.json", json!({"eos_token": {"content": "<|end|>"}}));
    assert_eq!(end_of_sequence(path, Some(&tokenizer)).unwrap(), [262]);
    write("config.json", json!({"eos_token_id": 7}));
    assert_eq!(end_of_sequence(path, Some(&tokenizer)).unwrap(), [7]);
    write("generation_config.json", json!({"eos_token_id": [3, 4]}));
    assert_eq!(end_of_sequence(path, None).unwrap(), [3, 4]);
    write("generation_config.json", json!({"eos_token_id": "end"}));
    let error = end_of_sequence(path, None).unwrap_err().to_string();
    assert!(
        error.contains("generation_config.json: eos_token_id") && error.contains("\"end\""),
        "{error}"
    );

    // Without files, the vocabulary itself knows.
    assert_eq!(end_of_sequence(Path::new("none"), Some(&small_tokenizer())).unwrap(), [262]);
    for (text, part) in
        [("{}", "no usable tokenizer"), ("", "no usable tokenizer"), ("[1]", "tokenizer")]
    {
        std::fs::write(path.join("tokenizer.json"), text).unwrap();
        let error = Tokenizer::find(path, &own).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json") && error.contains(part), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_text_comes_back_whole_and_token_by_token(text in "(?s)[ a-eéth12<|>\n🐍-🐙界]{0,24}") {
        for tokenizer in [small_tokenizer(), Tokenizer::bytes()] {
            let ids = tokenizer.encode(&text, false).unwrap();
            prop_assert_eq!(&tokenizer.decode(&ids, false).unwrap(), &text);
            prop_assert_eq!(streamed(&tokenizer, &ids), text.as_bytes());
        }
        // Leading spaces are not kept by this one.
        let tokenizer = sentence_tokenizer();
        let ids = tokenizer.encode(&text, false).unwrap();
        let whole = tokenizer.decode(&ids, false).unwrap();
        prop_assert_eq!(whole.trim_start(), text.trim_start_matches(' ').trim_start());
        prop_assert_eq!(streamed(&tokenizer, &ids), whole.as_bytes());
    }

    #[test]
    fn any_tokens_of_bytes_give_the_same_text_whole_and_one_by_one(
        ids in prop::collection::vec(0u32..270, 0..24),
    ) {
        let tokenizer = small_tokenizer();
        let whole = tokenizer.decode(&ids, true).unwrap();
        let bytes = streamed(&tokenizer, &ids);
        prop_assert_eq!(String::from_utf8_lossy(&bytes), whole);
    }

    #[test]
    fn any_tokens_give_text(ids in prop::collection::vec(0u32..300, 0..24)) {
        prop_assert!(String::from_utf8(streamed(&sentence_tokenizer(), &ids)).is_ok());
    }
}
