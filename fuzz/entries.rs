//! One function a parser, from bytes: the fuzz targets call them, and the tests replay the corpus through them.
//! Each must come back, whatever the bytes are; what it accepts must hold together.

use std::path::Path;

use elapid_formats::gguf::GgufFile;
use elapid_formats::{Bytes, StateFile, TensorFile, Weights, hf, pytorch};
use elapid_tensor::DType;

/// The name of a corpus, and the parser that reads it.
pub type Entry = (&'static str, fn(&[u8]));

/// Every parser.
pub const ALL: [Entry; 7] = [
    ("config", config),
    ("gguf", gguf),
    ("npz", npz),
    ("pickle", pickle),
    ("pytorch", pytorch),
    ("safetensors", safetensors),
    ("state", state),
];

/// Header and every tensor of a safetensors file.
pub fn safetensors(data: &[u8]) {
    let path = Path::new("fuzz.safetensors");
    if let Ok(file) = TensorFile::of_bytes(path, Bytes::from(data.to_vec())) {
        for name in file.names() {
            let bytes = file.bytes(&name).map(<[u8]>::len);
            if let Ok(tensor) = file.tensor(&name) {
                assert_eq!(tensor.elements() * tensor.dtype().size(), bytes.unwrap());
            }
        }
    }
    weights("fuzz.safetensors", data);
}

/// A PyTorch file, zip or legacy.
pub fn pytorch(data: &[u8]) {
    weights("fuzz.pt", data);
}

/// A pickle by itself.
pub fn pickle(data: &[u8]) {
    let _ = pytorch::check_pickle(data);
}

/// A NumPy archive.
pub fn npz(data: &[u8]) {
    weights("fuzz.npz", data);
}

/// A GGUF file: header, metadata, vocabulary, tensors.
pub fn gguf(data: &[u8]) {
    if let Ok(file) = GgufFile::from_bytes(Path::new("fuzz.gguf"), Bytes::from(data.to_vec())) {
        let _ = file.vocabulary();
    }
    weights("fuzz.gguf", data);
}

/// A config.json; what is accepted must survive being written.
pub fn config(data: &[u8]) {
    let path = Path::new("config.json");
    if let Ok(config) = hf::parse_config(path, data) {
        assert!(config.validate().is_ok());
        let text = hf::config_to_json(&config, DType::F32).to_string();
        let again = hf::parse_config(path, text.as_bytes()).unwrap();
        assert_eq!(again.parameter_count(), config.parameter_count());
    }
}

/// A file of a recurrent state.
pub fn state(data: &[u8]) {
    let file = TensorFile::of_bytes(Path::new("fuzz.state"), Bytes::from(data.to_vec()));
    let _ = file.and_then(StateFile::of_file);
}

/// Opens a file of tensors and reads every one.
fn weights(name: &str, data: &[u8]) {
    if let Ok(weights) = Weights::of_file(Path::new(name), Bytes::from(data.to_vec())) {
        for tensor in weights.tensors.values() {
            let mut values = vec![0.0; tensor.elements()];
            tensor.read_f32(&mut values).unwrap();
            let first = tensor.first_not_finite().unwrap().map(|(at, _)| at);
            assert_eq!(first, values.iter().position(|value| !value.is_finite()));
        }
        let _ = weights.read_config();
    }
}
