//! A model from one format into another, tensor by tensor as it lies in the file: bits stay where the element type
//! stays, and neither the model nor a tensor is in memory as a whole.

use std::fs;
use std::path::Path;

use elapid_ops::blocks::Encoding;
use elapid_tensor::DType;

use crate::hf::{self, CONFIG_FILE, EMBEDDINGS, HEAD, ORIGINAL_EMBEDDINGS, WEIGHTS_FILE};
use crate::outgoing::Outgoing;
use crate::tensor_file::{Entry, Metadata, write_tensors};
use crate::{Error, ModelSource, PYTORCH_FILE, Result, atomic, npz, pytorch};

/// Files of a folder that belong to the model beside configuration and weights; they are copied as they are.
const COMPANIONS: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
];

/// Writes a folder with `config.json` and `model.safetensors` as transformers has them. `dtype` is f32, bf16 or
/// f16; without one every tensor keeps its own, and blocks of integers become f32.
///
/// A folder that does not exist appears whole; in one that does, each file is replaced whole.
///
/// # Errors
/// If a value is too large for f16, or the system refuses.
pub fn save_hugging_face(source: &ModelSource, folder: &Path, dtype: Option<DType>) -> Result<()> {
    let tensors = outgoing(source, dtype)?;
    let config = hf::config_to_json(source.config(), main_type(&tensors));
    in_folder(source, folder, &config, WEIGHTS_FILE, |path| {
        let entries = tensors.into_iter().map(Entry::stored).collect();
        let metadata = Metadata::from([("format".into(), "pt".into())]);
        atomic::write_file(path, |out| write_tensors(out, &metadata, entries))
    })
}

/// Writes a folder with `config.json` as transformers has it and `pytorch_model.bin`, for programs that read no
/// safetensors. A tied head is there too and shares the embedding's storage.
///
/// # Errors
/// As [`save_hugging_face`].
pub fn save_hugging_face_pytorch(
    source: &ModelSource,
    folder: &Path,
    dtype: Option<DType>,
) -> Result<()> {
    let storages = outgoing(source, dtype)?;
    let config = hf::config_to_json(source.config(), main_type(&storages));
    save_state_dict(source, folder, &config, EMBEDDINGS, &storages)
}

/// Writes a folder with `config.json` and `pytorch_model.bin` in the layout of the original code. A tied head is
/// there too and shares the embedding's storage.
///
/// # Errors
/// As [`save_hugging_face`]; if the model has what that layout cannot say.
pub fn save_original(source: &ModelSource, folder: &Path, dtype: Option<DType>) -> Result<()> {
    let config = hf::config_to_original_json(source.config(), folder)?;
    save_state_dict(source, folder, &config, ORIGINAL_EMBEDDINGS, &outgoing(source, dtype)?)
}

/// Writes a folder with a configuration and a state dict, in which the embedding has the name `embeddings`.
fn save_state_dict(
    source: &ModelSource,
    folder: &Path,
    config: &serde_json::Value,
    embeddings: &str,
    storages: &[Outgoing],
) -> Result<()> {
    in_folder(source, folder, config, PYTORCH_FILE, |path| {
        let mut tensors = Vec::new();
        for (storage, from) in storages.iter().enumerate() {
            let shape = from.tensor.shape.as_slice();
            let mut add = |name| tensors.push(pytorch::Tensor { name, shape, storage });
            if from.name != EMBEDDINGS {
                add(&from.name);
                continue;
            }
            add(embeddings);
            if source.config().tie_embeddings {
                add(HEAD);
            }
        }
        atomic::write_file(path, |out| pytorch::write_state_dict(out, &tensors, storages))
    })
}

/// Writes one `.npz` file with all tensors and the configuration.
///
/// # Errors
/// As [`save_hugging_face`].
pub fn save_npz(source: &ModelSource, path: &Path, dtype: Option<DType>) -> Result<()> {
    let tensors = outgoing(source, dtype)?;
    let config = format!("{:#}\n", hf::config_to_json(source.config(), main_type(&tensors)));
    atomic::write_file(path, |out| npz::write_archive(out, &config, &tensors))
}

/// Every tensor under its Hugging Face name, in the order of names.
fn outgoing(source: &ModelSource, dtype: Option<DType>) -> Result<Vec<Outgoing>> {
    let encoding = match dtype {
        None => None,
        Some(DType::F32) => Some(Encoding::F32),
        Some(DType::BF16) => Some(Encoding::BF16),
        Some(DType::F16) => Some(Encoding::F16),
        Some(other) => {
            let message = format!("expected to write f32, bf16 or f16, found {other}");
            return Err(Error::format(source.path(), message));
        }
    };
    let mut tensors = Vec::new();
    for name in source.names() {
        let Some(tensor) = source.get(name) else { continue };
        let tensor = Outgoing::new(name, tensor, encoding);
        tensor.check()?;
        tensors.push(tensor);
    }
    Ok(tensors)
}

/// The type of most bytes, which a configuration names.
fn main_type(tensors: &[Outgoing]) -> DType {
    let bytes = |dtype| -> usize {
        tensors.iter().filter(|tensor| tensor.dtype() == dtype).map(Outgoing::len).sum()
    };
    [DType::F32, DType::BF16, DType::F16]
        .into_iter()
        .max_by_key(|&dtype| bytes(dtype))
        .unwrap_or(DType::F32)
}

/// Writes configuration, weights and what else belongs to the model.
fn in_folder(
    source: &ModelSource,
    folder: &Path,
    config: &serde_json::Value,
    weights: &str,
    write: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let fill = |folder: &Path| {
        write(&folder.join(weights))?;
        let text = format!("{config:#}\n");
        atomic::write_file(&folder.join(CONFIG_FILE), |out| out.write_all(text.as_bytes()))?;
        copy_companions(source, folder)
    };
    if !folder.exists() {
        return atomic::write_folder(folder, fill);
    }
    if !folder.is_dir() {
        return Err(Error::format(folder, "expected a folder to write, found a file"));
    }
    // Weights of another format would be taken for the model's.
    let other = [WEIGHTS_FILE, hf::INDEX_FILE, PYTORCH_FILE, crate::PYTORCH_INDEX_FILE]
        .into_iter()
        .find(|name| *name != weights && folder.join(name).exists());
    match other {
        Some(name) => Err(Error::format(folder, format!("holds another model already: {name}"))),
        None => fill(folder),
    }
}

fn copy_companions(source: &ModelSource, folder: &Path) -> Result<()> {
    let Some(from) = source.path().parent() else { return Ok(()) };
    for name in COMPANIONS {
        let (from, to) = (from.join(name), folder.join(name));
        if from.is_file() && !to.exists() {
            let mut file = fs::File::open(&from).map_err(Error::io("open", &from))?;
            atomic::write_file(&to, |out| std::io::copy(&mut file, out))?;
        }
    }
    Ok(())
}
