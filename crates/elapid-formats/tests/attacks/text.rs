//! Files of JSON: indexes of shards, recurrent states and tokenizers that want more memory than they have bytes.

use std::fmt::Write;

use super::header;

/// So many items with commas between them.
fn items(count: usize, item: impl Fn(usize) -> String) -> String {
    (0..count).map(item).collect::<Vec<_>>().join(",")
}

/// An array that is refused or ignored, and dense: two bytes an item, or four an item that is an object of its own.
fn dense() -> [String; 3] {
    let [zeros, arrays, objects] =
        ["0", "[0]", "{\"\":0}"].map(|item| items(500_000 / item.len(), |_| item.into()));
    [zeros, arrays, objects].map(|items| format!("[{items}]"))
}

/// Texts of indexes.
pub fn indexes() -> Vec<(&'static str, String)> {
    let map = |entries: String| format!("{{\"weight_map\":{{{entries}}}}}");
    let mut all = vec![
        ("one shard", map(items(60_000, |i| format!("\"{i:x}\":\"s\"")))),
        ("60,000 shards", map(items(60_000, |i| format!("\"{i:x}\":\"{i:x}\"")))),
        ("one tensor 60,000 times", map(items(60_000, |_| "\"a\":\"s\"".into()))),
        ("60,000 spellings of a shard", {
            map(items(60_000, |i| format!("\"{i:x}\":\"s{:/<1$}\"", "", 1 + i % 300)))
        }),
        ("100,000 levels", "{\"weight_map\":".repeat(100_000)),
    ];
    for dense in dense() {
        all.push(("no file names", map(format!("\"a\":{dense}"))));
        all.push(("metadata", format!("{{\"metadata\":{dense},\"weight_map\":{{\"a\":\"s\"}}}}")));
    }
    all
}

/// Files of recurrent states.
pub fn states() -> Vec<(&'static str, Vec<u8>)> {
    let file = |positions: &str, tensors: &str| {
        let positions = positions.replace('"', "");
        let header = format!(
            r#"{{"__metadata__":{{"format":"elapid-state","version":"1","model":"{{}}","checksum":"{:032x}","positions":"{positions}"}}{tensors}}}"#,
            0
        );
        header::file(header.as_bytes(), &[])
    };
    let tensors = |name: &dyn Fn(usize) -> String, shape: &str| {
        (0..20_000).fold(String::new(), |mut all, i| {
            let name = name(i);
            write!(all, r#","{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}"#)
                .unwrap();
            all
        })
    };
    let layers = |i: usize| format!("layers.{i}.a");
    let mut all = vec![
        ("20,000 layers", file("[]", &tensors(&layers, "[0]"))),
        ("20,000 tensors of a layer", file("[]", &tensors(&|i| format!("layers.0.{i}"), "[0]"))),
        ("20,000 others", file("[]", &tensors(&|i| i.to_string(), "[0]"))),
        ("slots that are not there", file("[0]", &tensors(&layers, "[0]"))),
    ];
    for dense in dense() {
        all.push(("positions", file(&dense, "")));
        let tensor = format!(
            r#","layers.0.a":{{"dtype":"F32","shape":{},"data_offsets":[0,0]}}"#,
            dense.replace("\"\"", "\"a\"")
        );
        all.push(("a shape", file("[]", &tensor)));
    }
    all
}

/// Texts of `tokenizer.json`.
pub fn tokenizers() -> Vec<(String, String)> {
    let bpe = |vocab: String, merges: String, rest: &str| {
        format!(
            r#"{{"model":{{"type":"BPE","vocab":{{{vocab}}},"merges":[{merges}]}},"added_tokens":[]{rest}}}"#
        )
    };
    let vocab = |count| items(count, |i| format!("\"{i:x}\":{i}"));
    let ab = r#""a":0,"b":1,"ab":2"#;
    let mut all = vec![
        ("60,000 tokens".to_owned(), bpe(vocab(60_000), String::new(), "")),
        ("merges of two tokens".into(), bpe(ab.into(), items(60_000, |_| r#""a b""#.into()), "")),
        ("pairs".into(), bpe(ab.into(), items(60_000, |_| r#"["a","b"]"#.into()), "")),
        (
            "merges that are not there".into(),
            bpe(vocab(60_000), items(60_000, |i| format!("\"{i:x} 0\"")), ""),
        ),
    ];
    let added = items(10_000, |i| {
        format!(
            r#"{{"id":{i},"content":"{i}","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}}"#
        )
    });
    all.push((
        "10,000 marks".into(),
        format!(
            r#"{{"model":{{"type":"BPE","vocab":{{}},"merges":[]}},"added_tokens":[{added}]}}"#
        ),
    ));
    let words = items(60_000, |i| format!("\"{i:x}\":{i}"));
    all.push((
        "60,000 words".into(),
        format!(r#"{{"model":{{"type":"WordLevel","vocab":{{{words}}},"unk_token":"0"}},"added_tokens":[]}}"#),
    ));
    let pieces = items(60_000, |i| format!("[\"{i:x}\",0]"));
    all.push((
        "60,000 pieces".into(),
        format!(
            r#"{{"model":{{"type":"Unigram","unk_id":0,"vocab":[{pieces}]}},"added_tokens":[]}}"#
        ),
    ));
    for dense in dense() {
        for part in ["normalizer", "pre_tokenizer", "post_processor", "decoder", "padding", "other"]
        {
            let rest = format!(",\"{part}\":{dense}");
            all.push((part.into(), bpe(ab.into(), String::new(), &rest)));
            let rest = format!(",\"{part}\":{{\"type\":\"Sequence\",\"x\":{dense}}}");
            all.push((format!("inside of {part}"), bpe(ab.into(), String::new(), &rest)));
        }
        for kind in ["BPE", "WordLevel", "WordPiece", "Unigram", "none"] {
            all.push((
                format!("a model of kind {kind}"),
                format!(r#"{{"model":{{"type":"{kind}","vocab":{dense},"merges":{dense}}},"added_tokens":[]}}"#),
            ));
        }
        all.push((
            "added tokens".into(),
            format!(
                r#"{{"model":{{"type":"BPE","vocab":{{}},"merges":[]}},"added_tokens":{dense}}}"#
            ),
        ));
        all.push(("a model that is an array".into(), format!("{{\"model\":{dense}}}")));
    }
    all
}
