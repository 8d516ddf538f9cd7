//! Files that PyTorch and NumPy wrote: every protocol, both containers, shared, transposed and partial tensors.
//! The fixtures hold small known values.

use std::path::{Path, PathBuf};

use elapid_formats::{Format, ModelSource, Weights};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Shape, file type and values.
fn tensor(weights: &Weights, name: &str) -> (Vec<usize>, String, Vec<f32>) {
    let tensor = &weights.tensors[name];
    let mut values = vec![0.0; tensor.elements()];
    tensor.read_f32(&mut values).unwrap();
    (tensor.shape.clone(), tensor.type_name(), values)
}

fn refusal(name: &str) -> String {
    Weights::open(&fixture(name)).err().expect("refused").to_string()
}

#[test]
fn every_protocol_and_both_containers() {
    let files = ["zip_2", "zip_3", "zip_4", "zip_5", "legacy_2", "legacy_4", "wrapped"];
    for file in files {
        let weights = Weights::open(&fixture(&format!("pytorch/{file}.pt"))).unwrap();
        assert_eq!(weights.format, Format::PyTorch);
        assert_eq!(weights.tensors.len(), 10, "{file}");
        let whole: Vec<f32> = (0..24).map(|i| i as f32 / 8.0).collect();
        let at = |row: usize, column: usize| whole[6 * row + column];
        let transposed: Vec<f32> = (0..24).map(|i| at(i % 4, i / 4)).collect();
        let part = vec![at(1, 2), at(1, 3), at(1, 4), at(2, 2), at(2, 3), at(2, 4)];
        let f32s = "F32".to_owned();
        assert_eq!(tensor(&weights, "whole"), (vec![4, 6], f32s.clone(), whole.clone()));
        assert_eq!(tensor(&weights, "tied"), (vec![4, 6], f32s.clone(), whole.clone()));
        assert_eq!(tensor(&weights, "transposed"), (vec![6, 4], f32s.clone(), transposed));
        assert_eq!(tensor(&weights, "part"), (vec![2, 3], f32s.clone(), part));
        assert_eq!(tensor(&weights, "parameter"), (vec![2], f32s.clone(), vec![3.0, 4.0]));
        assert_eq!(tensor(&weights, "scalar"), (vec![], f32s.clone(), vec![7.0]));
        assert_eq!(tensor(&weights, "empty"), (vec![0, 3], f32s, vec![]));
        let bf16 = tensor(&weights, "bf16");
        assert_eq!((bf16.1.as_str(), bf16.2[1]), ("BF16", -2.25));
        assert_eq!(tensor(&weights, "f16").2, [1.5, -2.25, 65504.0]);
        assert_eq!(tensor(&weights, "f64"), (vec![2, 1], "F64".into(), vec![1.5, 0.1]));
        let [whole, tied, transposed] =
            ["whole", "tied", "transposed"].map(|name| &weights.tensors[name].bytes);
        assert!(whole.is_same_place(tied) && whole.is_mapped(), "{file}");
        assert!(!transposed.is_mapped(), "{file}");
    }
}

#[test]
fn what_is_no_weight_is_refused_by_name() {
    for file in ["calls", "calls_legacy"] {
        let error = refusal(&format!("pytorch/{file}.pt"));
        assert!(error.contains("posix.system") || error.contains("os.system"), "{error}");
        assert!(error.contains("refused") && error.contains(file), "{error}");
    }
    let error = refusal("pytorch/integers.pt");
    assert!(error.contains("ids") && error.contains("I64"), "{error}");
}

#[test]
fn archives_of_numpy() {
    let weights = Weights::open(&fixture("numpy/arrays.npz")).unwrap();
    assert_eq!(weights.format, Format::Npz);
    let values: Vec<f32> = (0..6).map(|i| i as f32).collect();
    assert_eq!(tensor(&weights, "a"), (vec![2, 3], "F32".into(), values.clone()));
    assert_eq!(tensor(&weights, "f"), (vec![2, 3], "F32".into(), values));
    assert_eq!(tensor(&weights, "h"), (vec![2], "F16".into(), vec![1.5, -2.0]));
    assert_eq!(tensor(&weights, "d"), (vec![1, 1], "F64".into(), vec![0.1]));
    let (shape, kind, values) = tensor(&weights, "b");
    assert_eq!((shape, kind.as_str(), values[1]), (vec![3], "BF16", -2.25));
    let weights = Weights::open(&fixture("numpy/compressed.npz")).unwrap();
    let expected: Vec<f32> = (0..20).map(|i| i as f32 * 0.37).collect();
    assert_eq!(tensor(&weights, "a"), (vec![4, 5], "F32".into(), expected));
}

/// The fixtures have every size and offset in the fields that archives beyond 4 GiB need.
#[test]
fn archives_with_wide_fields_are_those_without() {
    for (wide, narrow) in
        [("pytorch/zip64.pt", "pytorch/zip_2.pt"), ("numpy/zip64.npz", "numpy/arrays.npz")]
    {
        let bytes = std::fs::read(fixture(wide)).unwrap();
        assert!(bytes.windows(4).any(|window| window == b"PK\x06\x06"), "{wide} is no zip64");
        let [wide, narrow] = [wide, narrow].map(|name| Weights::open(&fixture(name)).unwrap());
        assert!(wide.tensors.keys().eq(narrow.tensors.keys()));
        for name in narrow.tensors.keys() {
            assert_eq!(tensor(&wide, name), tensor(&narrow, name), "{name}");
        }
    }
}

#[test]
fn shards_of_pytorch() {
    let folder = fixture("pytorch/sharded");
    let source = ModelSource::open(&folder).unwrap();
    assert_eq!((source.format(), source.files().len()), (Format::PyTorch, 2));
    let model = &mut source.load().unwrap();
    assert_eq!((model.config().n_layer, model.config().d_inner()), (1, 16));
    let weights = Weights::open(&folder.join("pytorch_model.bin.index.json")).unwrap();
    // Tensor k of the file's order has ((7 i + 13 k) mod 64) / 32 - 1 at i.
    for (k, name) in
        [(0, "embeddings.weight"), (7, "layers.0.mixer.x_proj.weight"), (11, "norm_f.weight")]
    {
        let (_, _, values) = tensor(&weights, &format!("backbone.{name}"));
        for (i, value) in values.into_iter().enumerate() {
            assert_eq!(value, ((7 * i + 13 * k) % 64) as f32 / 32.0 - 1.0, "{name}, {i}");
        }
    }
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
        std::fs::copy(&entry, copy.path().join(entry.file_name().unwrap())).unwrap();
    }
    std::fs::remove_file(copy.path().join("pytorch_model-00002-of-00002.bin")).unwrap();
    let error = ModelSource::open(copy.path()).err().expect("a shard is missing").to_string();
    assert!(error.contains("pytorch_model-00002-of-00002.bin"), "{error}");
}
