//! safetensors: headers that contradict the file or themselves.

use super::Attack;

/// A file with this header and data.
pub fn file(header: &[u8], data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(data);
    bytes
}

pub fn attacks() -> Vec<Attack> {
    let attack = |what, header: &str, data: usize, words| Attack {
        what,
        file: "model.safetensors",
        bytes: file(header.as_bytes(), &vec![0; data]),
        words,
    };
    let raw = |what, bytes: &[u8], words| Attack {
        what,
        file: "raw.safetensors",
        bytes: bytes.to_vec(),
        words,
    };
    vec![
        raw("an empty file", b"", &["truncated", "found 0"]),
        raw("seven bytes", &[1; 7], &["truncated", "found 7"]),
        raw("a header of 2^64 - 1 bytes", &[255; 16], &["18446744073709551615"]),
        raw("a header of 2^40 bytes", &(1u64 << 40).to_le_bytes(), &["1099511627776"]),
        attack("no JSON", "{\"a\":", 0, &["damaged header"]),
        attack("JSON in 100,000 levels", &"[".repeat(100_000), 0, &["damaged header"]),
        attack(
            "data cut off",
            r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#,
            15,
            &["16 bytes of data", "15"],
        ),
        attack(
            "data beyond the last tensor",
            r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#,
            17,
            &["16 bytes of data", "17"],
        ),
        attack(
            "overlapping offsets",
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
            12,
            &["damaged header"],
        ),
        attack(
            "a gap between tensors",
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}"#,
            12,
            &["damaged header"],
        ),
        attack(
            "offsets in reverse",
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#,
            4,
            &["damaged header"],
        ),
        attack(
            "a shape that does not fill its offsets",
            r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,16]}}"#,
            16,
            &["damaged header"],
        ),
        attack(
            "a negative extent",
            r#"{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}"#,
            16,
            &["damaged header"],
        ),
        attack(
            "a shape whose product overflows",
            r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,16]}}"#,
            16,
            &["damaged header"],
        ),
        attack(
            "an empty extent beside enormous ones",
            r#"{"a":{"dtype":"F32","shape":[0,4294967296,4294967296],"data_offsets":[0,0]}}"#,
            0,
            &["a: ", "memory"],
        ),
        attack(
            "an unknown type",
            r#"{"a":{"dtype":"F7","shape":[4],"data_offsets":[0,16]}}"#,
            16,
            &["damaged header"],
        ),
        attack(
            "whole numbers as weights",
            r#"{"a":{"dtype":"I64","shape":[2],"data_offsets":[0,16]}}"#,
            16,
            &["a: expected F32, BF16, F16 or F64", "I64"],
        ),
        attack(
            "both names of the embedding",
            r#"{"backbone.embedding.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"backbone.embeddings.weight":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
            8,
            &["backbone.embedding", "twice"],
        ),
    ]
}
