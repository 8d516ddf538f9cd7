//! Files that PyTorch and NumPy wrote: every protocol, both containers, shared, transposed and partial tensors.
//! The fixtures hold small known values.

use std::path::{Path, PathBuf};

use elapid_formats::{Format, Weights};

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
