//! GGUF files made to harm: each is refused with a message that names what is wrong with it.

mod sample;

use std::path::Path;

use elapid_formats::gguf::{
    Array, ElementType, GgufFile, Plan, Planned, Value, WeightTypes, save_gguf, write_gguf,
};
use elapid_formats::{Bytes, ModelSource, Weights, hf};
use elapid_ops::blocks::Encoding;
use elapid_tensor::DType;
use proptest::prelude::*;

/// The bytes of a file by hand.
#[derive(Default, Clone)]
struct File(Vec<u8>);

impl File {
    fn new(tensors: u64, values: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(3).u64(tensors).u64(values)
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn text(mut self, text: &[u8]) -> Self {
        self = self.u64(text.len() as u64);
        self.0.extend(text);
        self
    }

    fn tensor(self, name: &str, extents: &[u64], element: u32, offset: u64) -> Self {
        let mut file = self.text(name.as_bytes()).u32(extents.len() as u32);
        for &extent in extents {
            file = file.u64(extent);
        }
        file.u32(element).u64(offset)
    }

    /// Zeros to the next multiple of 32 and `count` more.
    fn data(mut self, count: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(32) + count, 0);
        self
    }

    fn refusal(self) -> String {
        GgufFile::from_bytes(Path::new("x.gguf"), Bytes::from(self.0)).unwrap_err().to_string()
    }
}

#[track_caller]
fn refused(file: File, words: &[&str]) {
    let error = file.refusal();
    assert!(error.starts_with("x.gguf: "), "{error}");
    assert!(words.iter().all(|word| error.contains(word)), "{error}, expected {words:?}");
}

#[test]
fn beginnings() {
    refused(File(Vec::new()), &["truncated"]);
    refused(File(b"GGU".to_vec()), &["truncated"]);
    refused(File(b"GGML".to_vec()).u32(3), &["not a GGUF file"]);
    refused(File(b"GGUF".to_vec()).u32(1), &["version 1"]);
    refused(File(b"GGUF".to_vec()).u32(4), &["version 4"]);
    refused(File(b"GGUF".to_vec()).u32(3 << 24), &["big endian"]);
    refused(File(b"GGUF".to_vec()).u32(3).u64(0), &["truncated"]);
}

#[test]
fn absurd_counts() {
    for count in [2, 1 << 20, 1 << 32, u64::MAX] {
        refused(File::new(count, 0), &["tensors", &count.to_string()]);
        refused(File::new(0, count), &["metadata values", &count.to_string()]);
        let key = File::new(0, 1).u64(count.max(1 << 20)).data(64);
        refused(key, &["bytes of a metadata key"]);
        let array = File::new(0, 1).text(b"k").u32(9).u32(10).u64(count);
        refused(array, &["items of \"k\"", &count.to_string()]);
        let texts = File::new(0, 1).text(b"k").u32(9).u32(8).u64(count);
        refused(texts, &["items of \"k\""]);
        let text = File::new(0, 1).text(b"k").u32(8).u64(count);
        refused(text, &["bytes of the value of \"k\""]);
    }
}

#[test]
fn values() {
    refused(File::new(0, 1).text(b"k\xff").u32(4).u32(1).data(9), &["metadata key", "UTF-8"]);
    refused(File::new(0, 1).text(b"k").u32(8).text(b"\xc3\x28").data(9), &["\"k\"", "UTF-8"]);
    refused(File::new(0, 1).text(b"k").u32(13).data(9), &["\"k\"", "unknown type 13"]);
    refused(File::new(0, 1).text(b"k").u32(7).u32(2), &["\"k\"", "truth", "2"]);
    refused(
        File::new(0, 1).text(b"k").u32(9).u32(9).u64(1).u32(9).u64(1),
        &["\"k\"", "array of arrays"],
    );
    refused(File::new(0, 1).text(b"k").u32(9).u32(77).u64(1), &["\"k\"", "77"]);
    refused(File::new(0, 2).text(b"k").u32(4).u32(1).text(b"k").u32(4).u32(1), &["\"k\" twice"]);
    for alignment in [0, 1, 4, 33, 1 << 21, u32::MAX] {
        let file = File::new(0, 1).text(b"general.alignment").u32(4).u32(alignment);
        refused(file, &["general.alignment", &alignment.to_string()]);
    }
    refused(File::new(0, 1).text(b"general.alignment").u32(8).text(b"32"), &["general.alignment"]);
}

#[test]
fn tensors() {
    let one = |extents: &[u64], element, offset| {
        File::new(1, 0).tensor("t", extents, element, offset).data(256)
    };
    assert!(GgufFile::from_bytes(Path::new("x"), Bytes::from(one(&[64], 0, 0).0)).is_ok());
    assert!(GgufFile::from_bytes(Path::new("x"), Bytes::from(one(&[], 0, 0).0)).is_ok());
    refused(one(&[64], 0, 32), &["\"t\"", "288", "256"]);
    refused(one(&[65], 0, 0), &["truncated", "\"t\"", "260"]);
    refused(one(&[64], 0, 16), &["\"t\"", "multiple of 32"]);
    refused(one(&[64], 0, u64::MAX - 31), &["\"t\""]);
    refused(one(&[64], 0, 1 << 63), &["\"t\""]);
    refused(one(&[0], 0, 0), &["\"t\"", "0 elements"]);
    refused(one(&[1 << 40, 1 << 40], 0, 0), &["\"t\"", "larger than memory"]);
    refused(one(&[u64::MAX], 0, 0), &["\"t\""]);
    refused(one(&[1 << 62, 1 << 62, 1 << 62, 1 << 62], 1, 0), &["\"t\""]);
    refused(one(&[1; 5], 0, 0), &["\"t\"", "5 axes"]);
    refused(one(&[48], 8, 0), &["\"t\"", "multiple of 32", "Q8_0"]);
    refused(one(&[64], 12, 0), &["\"t\"", "multiple of 256", "Q4_K"]);
    refused(one(&[64], 4, 0), &["\"t\"", "element type 4"]);
    refused(one(&[64], u32::MAX, 0), &["\"t\"", "element type"]);
    let axes = File::new(1, 0).text(b"t").u32(u32::MAX).data(64);
    refused(axes, &["\"t\"", "4294967295 axes"]);
    let bad = File::new(1, 0).text(b"\x80").u32(1).data(64);
    refused(bad, &["tensor's name", "UTF-8"]);
    let two = |name: &str, offset| {
        File::new(2, 0).tensor("a", &[16], 0, 0).tensor(name, &[16], 0, offset).data(256)
    };
    refused(two("a", 64), &["\"a\" twice"]);
    refused(two("b", 32), &["\"a\" and \"b\" overlap"]);
    refused(two("b", 0), &["overlap"]);
    assert!(GgufFile::from_bytes(Path::new("x"), Bytes::from(two("b", 64).0)).is_ok());
}

/// A small model's file.
fn valid() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let (source, path) = (folder.path().join("hf"), folder.path().join("m.gguf"));
    hf::save_model(&source, &mut sample::model(), DType::F32).unwrap();
    let source = ModelSource::open(&source).unwrap();
    let plan = Plan::new(&source, WeightTypes::default()).unwrap();
    save_gguf(&source, &plan, Vec::new(), &path, &mut |_| {}).unwrap();
    std::fs::read(path).unwrap()
}

/// The small model's file with other metadata and tensors.
fn changed(change: impl FnOnce(&mut Vec<(String, Value)>, &mut Vec<(Planned, Vec<u8>)>)) -> String {
    let file = GgufFile::from_bytes(Path::new("m.gguf"), Bytes::from(valid())).unwrap();
    let mut metadata: Vec<_> = file.metadata().clone().into_iter().collect();
    let mut tensors: Vec<_> = file
        .tensors()
        .iter()
        .map(|info| {
            let bytes = file.bytes(info).unwrap().to_vec();
            let (name, shape) = (info.name.clone(), info.shape.clone());
            (Planned { name, shape, element: info.element, bytes: bytes.len() as u64 }, bytes)
        })
        .collect();
    change(&mut metadata, &mut tensors);
    let planned: Vec<Planned> = tensors.iter().map(|tensor| tensor.0.clone()).collect();
    let mut out = Vec::new();
    write_gguf(&mut out, &metadata, &planned, |i, out| out.write_all(&tensors[i].1)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    std::fs::write(&path, out).unwrap();
    match ModelSource::open(&path).and_then(|source| source.load()) {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    }
}

fn set(key: &str, value: Value) -> String {
    changed(|metadata, _| match metadata.iter_mut().find(|entry| entry.0 == key) {
        Some(entry) => entry.1 = value,
        None => metadata.push((key.into(), value)),
    })
}

#[test]
fn models_whose_metadata_does_not_fit() {
    assert_eq!(changed(|_, _| {}), "");
    let cases = [
        ("general.architecture", Value::from("llama"), "llama"),
        ("general.architecture", Value::from("mamba2"), "Mamba-2"),
        ("general.architecture", Value::U32(3), "general.architecture"),
        ("mamba.block_count", Value::U32(3), "number of layers"),
        ("mamba.block_count", Value::U32(u32::MAX), "n_layer"),
        ("mamba.block_count", Value::I32(-2), "mamba.block_count"),
        ("mamba.embedding_length", Value::U32(16), "embedding"),
        ("mamba.embedding_length", Value::U64(0), "mamba.embedding_length"),
        ("mamba.embedding_length", Value::from("8"), "mamba.embedding_length"),
        ("mamba.ssm.inner_size", Value::U32(17), "mamba.ssm.inner_size"),
        ("mamba.ssm.inner_size", Value::U64(1 << 50), "expand"),
        ("mamba.ssm.state_size", Value::U32(5), "A_log"),
        ("mamba.ssm.conv_kernel", Value::U32(1 << 20), "parameters"),
        ("mamba.ssm.time_step_rank", Value::F32(2.0), "mamba.ssm.time_step_rank"),
        ("mamba.attention.layer_norm_rms_epsilon", Value::F32(f32::NAN), "norm_eps"),
        ("mamba.attention.layer_norm_rms_epsilon", Value::U32(1), "layer_norm_rms_epsilon"),
        ("elapid.config", Value::from("{"), "elapid.config"),
        ("elapid.config", Value::from("[]"), "elapid.config"),
        ("elapid.a_log.index", Value::Array(Array::U64(vec![1])), "elapid.a_log.value"),
        ("elapid.a_log.value", Value::Array(Array::U8(vec![1])), "elapid.a_log.value"),
    ];
    for (key, value, word) in cases {
        let shown = value.to_string();
        let error = set(key, value);
        assert!(error.contains(word), "{key} = {shown}: {error:?}");
    }
    let error = changed(|metadata, _| metadata.retain(|entry| entry.0 != "mamba.ssm.state_size"));
    assert!(error.contains("mamba.ssm.state_size"), "{error}");
}

#[test]
fn models_whose_tensors_do_not_fit() {
    fn find<'a>(tensors: &'a mut [(Planned, Vec<u8>)], name: &str) -> &'a mut (Planned, Vec<u8>) {
        tensors.iter_mut().find(|tensor| tensor.0.name == name).unwrap()
    }
    let error = changed(|_, tensors| tensors.retain(|tensor| tensor.0.name != "blk.1.ssm_d"));
    assert!(
        error.contains("backbone.layers.1.mixer.D") && error.contains("no such tensor"),
        "{error}"
    );
    let error = changed(|_, tensors| tensors.retain(|tensor| tensor.0.name != "token_embd.weight"));
    assert!(error.contains("token_embd.weight"), "{error}");
    let error = changed(|_, tensors| find(tensors, "blk.1.ssm_d").0.name = "blk.01.ssm_d".into());
    assert!(error.contains("blk.01.ssm_d"), "{error}");
    let error = changed(|_, tensors| find(tensors, "blk.0.ssm_x.weight").0.shape.reverse());
    assert!(error.contains("x_proj.weight") && error.contains("[16, 10]"), "{error}");
    let error = changed(|_, tensors| {
        let (planned, bytes) = find(tensors, "blk.0.ssm_d");
        planned.element = ElementType::new(26).unwrap();
        bytes[0] = 1;
    });
    assert!(error.contains("blk.0.ssm_d") && error.contains("I32"), "{error}");
    for (value, word) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let error = changed(|_, tensors| {
            find(tensors, "blk.0.ssm_out.weight").1[8..12].copy_from_slice(&value.to_le_bytes());
        });
        assert!(error.contains("out_proj.weight") && error.contains(word), "{error}");
    }
    let error = changed(|_, tensors| {
        find(tensors, "blk.0.ssm_a").1[4..8].copy_from_slice(&1f32.to_le_bytes());
    });
    assert!(error.contains("A_log") && error.contains("element 1"), "{error}");
}

#[test]
fn every_cut_is_refused() {
    let bytes = valid();
    let end = GgufFile::from_bytes(Path::new("m"), Bytes::from(bytes.clone())).unwrap();
    let end = end.tensors().iter().map(|info| info.range.end).max().unwrap();
    for length in (0..end).step_by(7).chain(end - 40..end) {
        let error = File(bytes[..length].to_vec()).refusal();
        assert!(
            error.contains("truncated") || error.contains("absurd"),
            "cut at {length}: {error}"
        );
    }
}

/// Everything that opening and showing a file does.
fn read_all(bytes: Vec<u8>) {
    let Ok(file) = GgufFile::from_bytes(Path::new("x.gguf"), Bytes::from(bytes)) else { return };
    for info in file.tensors() {
        assert!(file.bytes(info).unwrap().len() >= info.elements().min(1));
    }
    file.metadata().values().for_each(|value| assert!(value.to_string().len() < 1 << 20));
    let _ = file.architecture();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn damaged_files_do_no_harm(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        thread_local!(static VALID: Vec<u8> = valid());
        let mut bytes = VALID.with(Vec::clone);
        let header = bytes.len() / 3;
        for (index, byte) in changes {
            bytes[index.index(header)] = byte;
        }
        read_all(bytes);
    }

    #[test]
    fn arbitrary_files_do_no_harm(tail in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tail);
        read_all(bytes);
    }
}

#[test]
fn blocks_of_another_shape_are_refused_by_name() {
    let error = changed(|_, tensors| {
        let (planned, bytes) =
            tensors.iter_mut().find(|t| t.0.name == "token_embd.weight").unwrap();
        // 16 rows of 8 become 2 rows of 64, which no longer fit the configuration.
        planned.shape = vec![2, 64];
        planned.element = ElementType::from(Encoding::Q8_0);
        planned.bytes = 2 * 68;
        *bytes = vec![0xff; 136];
    });
    assert!(error.contains("embeddings.weight") && error.contains("[2, 64]"), "{error}");
}

/// Scales of blocks that are no numbers, in a tensor that is sound otherwise.
#[test]
fn scales_that_are_no_numbers_are_found() {
    // Where the scales of a block are: 16 bits each.
    let scales: [(Encoding, &[usize]); 4] = [
        (Encoding::Q8_0, &[0]),
        (Encoding::Q4_0, &[0]),
        (Encoding::Q4_K, &[0, 2]),
        (Encoding::Q6_K, &[208]),
    ];
    for (encoding, places) in scales {
        let values: Vec<f32> = (0..1024).map(|i| (i as f32 * 0.7).sin()).collect();
        let sound = elapid_ops::blocks::quantize(encoding, 256, &values).unwrap();
        let planned = Planned {
            name: "token_embd.weight".into(),
            shape: vec![4, 256],
            element: ElementType::from(encoding),
            bytes: sound.len() as u64,
        };
        for (&place, bits) in places
            .iter()
            .flat_map(|place| [0x7e00u16, 0xfe01, 0x7c00, 0xfc00].map(|bits| (place, bits)))
        {
            let mut bytes = sound.clone();
            let at = 2 * encoding.block_bytes() + place;
            bytes[at..at + 2].copy_from_slice(&bits.to_le_bytes());
            let sizes = ["block_count", "ssm.state_size", "ssm.conv_kernel", "ssm.time_step_rank"];
            let mut metadata = vec![("general.architecture".to_owned(), Value::from("mamba"))];
            metadata.extend(sizes.map(|key| (format!("mamba.{key}"), Value::U32(1))));
            let widths = ["embedding_length", "ssm.inner_size"];
            metadata.extend(widths.map(|key| (format!("mamba.{key}"), Value::U32(256))));
            let mut file = Vec::new();
            let planned = std::slice::from_ref(&planned);
            write_gguf(&mut file, &metadata, planned, |_, out| out.write_all(&bytes)).unwrap();
            let weights = Weights::of_file(Path::new("m.gguf"), file.into()).unwrap();
            let tensor = &weights.tensors["backbone.embeddings.weight"];
            let (first, value) = tensor.first_not_finite().unwrap().unwrap();
            assert_eq!(first / encoding.block_len(), 2, "{encoding} {bits:x}");
            assert!(!value.is_finite());
        }
    }
}
