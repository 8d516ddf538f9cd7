//! A GGUF file as a model's weights: names and shapes of the Hugging Face layout, the bytes where they are mapped.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use elapid_ops::blocks::{Encoding, dequantize};

use super::a_log::{Exact, logs};
use super::config::read_config;
use super::names::{MAMBA, MAMBA2, split_layer, to_hugging_face};
use super::read::{GgufFile, TensorInfo};
use crate::model_source::{Bytes, Contents, StoredTensor};
use crate::{Error, Result};

/// What a GGUF file of a Mamba holds.
///
/// # Errors
/// If the file is damaged, holds another architecture, or a tensor has an element type that is not read.
pub(crate) fn read_contents(path: &Path, bytes: Bytes) -> Result<Contents> {
    let file = GgufFile::from_bytes(path, bytes)?;
    match file.architecture()? {
        MAMBA => {}
        MAMBA2 => {
            let found = format!("{MAMBA2:?}: Mamba-2 can be inspected, but not loaded");
            return Err(file.error("general.architecture", "\"mamba\"", found));
        }
        other => return Err(file.error("general.architecture", "\"mamba\"", format!("{other:?}"))),
    }
    let config = read_config(&file)?;
    let layer = config.d_inner() as u64 * config.d_state as u64;
    let exact = Arc::new(Exact::of_file(&file)?);
    let mut tensors = Vec::new();
    for info in file.tensors() {
        let stored = stored(&file, info)?;
        let name = to_hugging_face(MAMBA, &info.name).unwrap_or_else(|| info.name.clone());
        let stored = match split_layer(&info.name, "blk.") {
            Some((index, "ssm_a")) => {
                let first = (index as u64).saturating_mul(layer);
                let bytes = Bytes::computed(4 * stored.elements(), {
                    let (exact, stored) = (exact.clone(), stored.clone());
                    move || log_bytes(&stored, &exact, first)
                });
                StoredTensor::new(Encoding::F32, stored.shape, bytes)
            }
            // Taps are [E, W] in files.
            Some((_, "ssm_conv1d.weight")) if stored.shape.len() == 2 => {
                let shape = vec![stored.shape[0], 1, stored.shape[1]];
                StoredTensor::new(stored.encoding, shape, stored.bytes)
            }
            _ => Ok(stored),
        };
        tensors.push((name, stored.map_err(|error| refuse(&file, info, &error))?));
    }
    let metadata =
        file.metadata().iter().map(|(key, value)| (key.clone(), value.to_string())).collect();
    Ok(Contents { tensors, metadata, config: Some(config) })
}

fn refuse(file: &GgufFile, info: &TensorInfo, message: &str) -> Error {
    Error::format(file.path(), format!("{}: {message}", info.name))
}

fn stored(file: &GgufFile, info: &TensorInfo) -> Result<StoredTensor> {
    let Some(encoding) = info.element.encoding() else {
        let known = Encoding::ALL.map(|encoding| encoding.name().to_uppercase()).join(", ");
        let message = format!("has element type {}, expected one of {known}", info.element);
        return Err(refuse(file, info, &message));
    };
    StoredTensor::new(encoding, info.shape.clone(), file.bytes(info)?)
        .map_err(|error| refuse(file, info, &error))
}

/// The little-endian bytes of A_log for a stored A.
fn log_bytes(a: &StoredTensor, exact: &BTreeMap<u64, f32>, first: u64) -> Vec<u8> {
    let mut values = vec![0.0; a.elements()];
    if dequantize(a.encoding, &a.bytes, &mut values).is_err() {
        // Its size was checked when it was stored; no number is what a reader refuses by name.
        values.fill(f32::NAN);
    }
    a.bytes.release();
    logs(&values, exact, first).iter().flat_map(|value| value.to_le_bytes()).collect()
}
