//! Model files as other programs write them and Elapid does not: in shards with an index, and PyTorch's format before 1.6
//! (pickles, then the storages one after the other).

use std::fs;
use std::path::Path;

use elapid_formats::TensorFile;
use serde_json::{Map, Value, json};

/// A tensor's name, shape, type as in safetensors, and bytes.
pub type Tensor<'a> = (&'a str, &'a [usize], String, &'a [u8]);

/// The name of a file of weights without its end, its end, and the bytes of a file of some tensors.
pub type Writer = fn(&[Tensor<'_>]) -> (&'static str, &'static str, Vec<u8>);

/// Writes the model of a folder with a `model.safetensors` into another folder, in `shards` files.
pub fn save(from: &Path, to: &Path, shards: usize, write: Writer) {
    let file = TensorFile::open(&from.join("model.safetensors")).unwrap();
    let names = file.names();
    let tensors: Vec<Tensor<'_>> = names
        .iter()
        .map(|name| {
            let (shape, dtype) = (file.shape(name).unwrap(), file.dtype_name(name).unwrap());
            (name.as_str(), shape, dtype.to_uppercase(), file.bytes(name).unwrap())
        })
        .collect();
    fs::create_dir(to).unwrap();
    fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
    let mut map = Map::new();
    let mut index = String::new();
    for (i, part) in tensors.chunks(tensors.len().div_ceil(shards)).enumerate() {
        let (stem, end, bytes) = write(part);
        let name = match shards {
            1 => format!("{stem}.{end}"),
            _ => format!("{stem}-{:05}-of-{shards:05}.{end}", i + 1),
        };
        fs::write(to.join(&name), bytes).unwrap();
        map.extend(part.iter().map(|(own, ..)| ((*own).to_owned(), Value::from(name.as_str()))));
        index = format!("{stem}.{end}.index.json");
    }
    if shards > 1 {
        let text = json!({ "metadata": {}, "weight_map": map }).to_string();
        fs::write(to.join(index), text).unwrap();
    }
}

/// A safetensors file.
pub fn safetensors(tensors: &[Tensor<'_>]) -> (&'static str, &'static str, Vec<u8>) {
    let mut header = Map::new();
    let mut data = Vec::new();
    for (name, shape, dtype, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        let info = json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets });
        header.insert((*name).to_owned(), info);
        data.extend_from_slice(bytes);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let length = (header.len() as u64).to_le_bytes();
    ("model", "safetensors", [&length[..], &header, &data].concat())
}

/// PyTorch's format before 1.6: magic number, version, machine, state dict, keys of the storages, storages.
pub fn legacy_pytorch(tensors: &[Tensor<'_>]) -> (&'static str, &'static str, Vec<u8>) {
    let mut file = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.".to_vec();
    file.extend_from_slice(b"\x80\x02M\xe9\x03.");
    file.extend_from_slice(b"\x80\x02}");
    text(&mut file, "little_endian");
    file.extend_from_slice(b"\x88s.");
    file.extend_from_slice(b"\x80\x02}(");
    for (i, (name, shape, dtype, bytes)) in tensors.iter().enumerate() {
        let (storage, size) = match dtype.as_str() {
            "F32" => ("FloatStorage", 4),
            "BF16" => ("BFloat16Storage", 2),
            other => panic!("{name} has type {other}"),
        };
        text(&mut file, name);
        file.extend_from_slice(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut file, "storage");
        file.extend_from_slice(format!("ctorch\n{storage}\n").as_bytes());
        text(&mut file, &i.to_string());
        text(&mut file, "cpu");
        number(&mut file, bytes.len() / size);
        // No view of another storage; its first element.
        file.extend_from_slice(b"NtQK\x00(");
        shape.iter().for_each(|&extent| number(&mut file, extent));
        file.extend_from_slice(b"t(");
        for axis in 0..shape.len() {
            number(&mut file, shape[axis + 1..].iter().product());
        }
        // No gradient, no hooks.
        file.extend_from_slice(b"t\x89ccollections\nOrderedDict\n)RtR");
    }
    file.extend_from_slice(b"u.\x80\x02](");
    (0..tensors.len()).for_each(|i| text(&mut file, &i.to_string()));
    file.extend_from_slice(b"e.");
    for (_, shape, _, bytes) in tensors {
        let elements: usize = shape.iter().product();
        file.extend_from_slice(&(elements as u64).to_le_bytes());
        file.extend_from_slice(bytes);
    }
    ("pytorch_model", "bin", file)
}

/// A text of a pickle.
fn text(pickle: &mut Vec<u8>, text: &str) {
    pickle.push(b'X');
    pickle.extend_from_slice(&(text.len() as u32).to_le_bytes());
    pickle.extend_from_slice(text.as_bytes());
}

/// A whole number of a pickle.
fn number(pickle: &mut Vec<u8>, number: usize) {
    pickle.push(b'J');
    pickle.extend_from_slice(&i32::try_from(number).unwrap().to_le_bytes());
}
