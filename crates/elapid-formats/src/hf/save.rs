//! A model into a folder that transformers opens.

use std::fs;
use std::path::Path;

use elapid_models::LanguageModel;
use elapid_tensor::DType;

use super::{CONFIG_FILE, WEIGHTS_FILE, config_to_json};
use crate::fingerprint::write_hashed;
use crate::model_source::stored_shape;
use crate::tensor_file::{Entry, Metadata, write_tensors};
use crate::{Error, Result, atomic};

/// Writes `config.json` and `model.safetensors` with weights of type f32, bf16 or f16, rounded to nearest.
/// A folder that does not exist appears whole; in one that does, each of the two files is replaced whole.
///
/// # Errors
/// If `dtype` is another, or the system refuses.
pub fn save_model(folder: &Path, model: &mut LanguageModel, dtype: DType) -> Result<()> {
    if !matches!(dtype, DType::F32 | DType::BF16 | DType::F16) {
        return Err(Error::format(
            folder,
            format!("expected to write f32, bf16 or f16, found {dtype}"),
        ));
    }
    if folder.exists() {
        if !fs::metadata(folder).map_err(Error::io("open", folder))?.is_dir() {
            return Err(Error::format(folder, "expected a folder to write, found a file"));
        }
        write_model_files(folder, model, dtype)?;
    } else {
        atomic::write_folder(folder, |inside| write_model_files(inside, model, dtype))?;
    }
    Ok(())
}

/// Name, length and hash of a file just written.
pub(crate) type Written = (&'static str, u64, u128);

/// Writes the two files of a model folder.
pub(crate) fn write_model_files(
    folder: &Path,
    model: &mut LanguageModel,
    dtype: DType,
) -> Result<[Written; 2]> {
    let mut entries = Vec::new();
    model.visit(&mut |parameter| {
        let shape = stored_shape(parameter.kind, &parameter.tensor.shape());
        entries.push(Entry { shape, dtype, ..Entry::new(parameter.name, parameter.tensor) });
        Ok(())
    })?;
    let metadata = Metadata::from([("format".into(), "pt".into())]);
    let (bytes, hash) =
        write_hashed(&folder.join(WEIGHTS_FILE), |out| write_tensors(out, &metadata, entries))?;
    let text = format!("{:#}\n", config_to_json(model.config(), dtype));
    let (config_bytes, config_hash) =
        write_hashed(&folder.join(CONFIG_FILE), |out| out.write_all(text.as_bytes()))?;
    Ok([(WEIGHTS_FILE, bytes, hash), (CONFIG_FILE, config_bytes, config_hash)])
}
