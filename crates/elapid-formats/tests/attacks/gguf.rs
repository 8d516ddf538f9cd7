//! GGUF: headers, metadata and vocabularies that want more memory than they have bytes.

use elapid_formats::gguf::{Array, ElementType, Planned, Value, write_gguf};

/// Texts of a few letters, no two the same.
fn texts(count: usize, end: &str) -> Vec<String> {
    (0..count).map(|i| format!("{i:x}{end}")).collect()
}

fn file(metadata: Vec<(String, Value)>, tensors: &[Planned]) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_gguf(&mut bytes, &metadata, tensors, |index, out| {
        out.write_all(&vec![0; tensors[index].bytes as usize])
    })
    .unwrap();
    bytes
}

fn list(texts: Vec<String>) -> Value {
    Value::Array(Array::Text(texts.into_iter().collect()))
}

fn vocabulary(tokens: Vec<String>, kind: i32, merges: Vec<String>) -> Vec<u8> {
    let kinds = Value::Array(Array::I32(vec![kind; tokens.len()]));
    let metadata = [
        ("general.architecture", Value::from("mamba")),
        ("tokenizer.ggml.model", Value::from("gpt2")),
        ("tokenizer.ggml.tokens", list(tokens)),
        ("tokenizer.ggml.token_type", kinds),
        ("tokenizer.ggml.merges", list(merges)),
    ];
    file(metadata.map(|(key, value)| (key.to_owned(), value)).into(), &[])
}

/// Files that may be read or refused, in memory of their own size.
pub fn wants() -> Vec<(&'static str, Vec<u8>)> {
    let architecture = ("general.architecture".to_owned(), Value::from("mamba"));
    let values = texts(40_000, "").into_iter().map(|key| (key, Value::Bool(true)));
    let tensor = |name: String| Planned {
        name,
        shape: Vec::new(),
        element: ElementType::new(24).unwrap(),
        bytes: 1,
    };
    let tensors: Vec<Planned> = texts(20_000, "").into_iter().map(tensor).collect();
    let mut floats = tensors.clone();
    for tensor in &mut floats {
        tensor.element = ElementType::new(0).unwrap();
        tensor.bytes = 4;
    }
    let sizes = [
        "embedding_length",
        "block_count",
        "ssm.inner_size",
        "ssm.state_size",
        "ssm.conv_kernel",
        "ssm.time_step_rank",
    ];
    let mut model = vec![architecture.clone(), ("general.alignment".into(), Value::U32(8))];
    model.extend(sizes.map(|key| (format!("mamba.{key}"), Value::U32(1))));
    floats[0].name = "token_embd.weight".into();
    let merges =
        texts(60_000, "").windows(2).map(|pair| format!("{} {}", pair[0], pair[1])).collect();
    vec![
        ("40,000 values", file(std::iter::once(architecture.clone()).chain(values).collect(), &[])),
        ("20,000 tensors of a byte", file(vec![architecture], &tensors)),
        ("20,000 weights", file(model, &floats)),
        ("60,000 tokens", vocabulary(texts(60_000, ""), 1, Vec::new())),
        ("60,000 marks", vocabulary(texts(60_000, ""), 3, Vec::new())),
        ("60,000 merges", vocabulary(texts(60_000, ""), 1, merges)),
        ("the same merge 60,000 times", vocabulary(texts(2, ""), 1, vec!["0 1".into(); 60_000])),
    ]
}
