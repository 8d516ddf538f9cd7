//! One function a parser, from bytes: the fuzz targets call them, and the tests replay the corpus through them.
//! Each must come back, whatever the bytes are; what it accepts must hold together.

use std::path::Path;

use elapid_formats::gguf::GgufFile;
use elapid_formats::tokenizer::Vocabulary;
use elapid_formats::{Bytes, Error, StateFile, TensorFile, Tokenizer, Weights, hf, pytorch};
use elapid_tensor::DType;

/// The name of a corpus, and the parser that reads it.
pub type Entry = (&'static str, fn(&[u8]));

/// Every parser.
pub const ALL: [Entry; 9] = [
    ("config", config),
    ("gguf", gguf),
    ("index", index),
    ("npz", npz),
    ("pickle", pickle),
    ("pytorch", pytorch),
    ("safetensors", safetensors),
    ("state", state),
    ("tokenizer", tokenizer),
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

/// A GGUF file: header, metadata, vocabulary and the tokenizer it becomes, tensors.
pub fn gguf(data: &[u8]) {
    let path = Path::new("fuzz.gguf");
    if let Ok(file) = GgufFile::from_bytes(path, Bytes::from(data.to_vec()))
        && let Ok(vocabulary) = file.vocabulary()
    {
        if let Ok(Some(tokenizer)) = vocabulary.tokenizer(path) {
            both_ways(&tokenizer);
        }
        let _ = vocabulary.to_json(path);
    }
    weights("fuzz.gguf", data);
}

/// The index of a folder with two shards, of one tensor each, and a damaged third.
pub fn index(data: &[u8]) {
    let mut opened = 0;
    let weights = Weights::of_index(Path::new("model.safetensors.index.json"), data, &mut |file| {
        opened += 1;
        match file.to_str() {
            Some("1.safetensors") => Ok(shard("a", 2)),
            Some("2.safetensors") => Ok(shard("b", 3)),
            Some("3.safetensors") => Ok(Bytes::from(vec![0xff; 9])),
            _ => Err(Error::Format { path: file.into(), message: "no such file".into() }),
        }
    });
    assert!(opened <= 3);
    if let Ok(weights) = weights {
        assert_eq!(weights.tensors.len(), weights.files.len());
        assert!(weights.tensors.keys().all(|name| name == "a" || name == "b"));
    }
}

/// A `tokenizer.json`; what is accepted reads and writes text.
pub fn tokenizer(data: &[u8]) {
    let path = Path::new("tokenizer.json");
    if let Ok(tokenizer) = Tokenizer::from_json(path, data) {
        both_ways(&tokenizer);
    }
    if let Ok(value) = serde_json::from_slice(data)
        && let Ok(Some(lists)) = Vocabulary::from_json(path, &value, 300)
        && let Ok(Some(tokenizer)) = lists.tokenizer(path)
    {
        both_ways(&tokenizer);
    }
}

/// A file of safetensors with one tensor.
fn shard(name: &str, len: usize) -> Bytes {
    let end = 4 * len;
    let header =
        format!(r#"{{"{name}":{{"dtype":"F32","shape":[{len}],"data_offsets":[0,{end}]}}}}"#);
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.resize(bytes.len() + end, 1);
    Bytes::from(bytes)
}

/// Text to tokens and back, at once and one by one.
fn both_ways(tokenizer: &Tokenizer) {
    let ids = match tokenizer.encode("The naïve théorie,\n of 12345 things<|end|>", true) {
        Ok(ids) => ids,
        Err(_) => (0..8).collect(),
    };
    let _ = tokenizer.decode(&ids, true);
    let (mut stream, mut bytes) = (tokenizer.detokenizer(&[]), Vec::new());
    ids.iter().for_each(|&id| stream.push(id, &mut bytes));
    stream.finish(&mut bytes);
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
