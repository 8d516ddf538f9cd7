//! Fingerprints: 128-bit XXH3 hashes by which states, models and files are told apart. They find damage and
//! mix-ups, not forgery.

use std::io::{self, Write};
use std::path::Path;

use elapid_models::{LanguageModel, MambaConfig, NormKind, State, parameter_outlines};
use elapid_ops::blocks::dequantize;
use elapid_tensor::{DType, Tensor};
use serde_json::json;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::tensor_file::tensor_bytes;
use crate::{Error, ModelSource, Result, atomic};

/// What tells one model from another: its shape, and its weights if they were hashed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    /// The configuration values that the computation depends on, as JSON with sorted keys.
    pub config: String,
    /// Hash of all parameters as f32: names, shapes, values.
    pub weights: Option<u128>,
}

impl Fingerprint {
    /// The fingerprint of every model of that shape. Values that only matter for initialisation and the
    /// head, which no state depends on, have no part in it.
    pub fn of_config(config: &MambaConfig) -> Self {
        let norm = match config.norm {
            NormKind::Rms => "rms",
            NormKind::Layer => "layer",
        };
        let mut value = json!({
            "model": "mamba",
            "d_model": config.d_model,
            "n_layer": config.n_layer,
            "vocab_rows": config.padded_vocab_size(),
            "d_state": config.d_state,
            "d_conv": config.d_conv,
            "d_inner": config.d_inner(),
            "dt_rank": config.dt_rank(),
            "conv_bias": config.conv_bias,
            "bias": config.bias,
            "norm": norm,
            "norm_eps": config.norm_eps,
        });
        // Absent in models without these norms, whose states were written before there was such a key.
        if let Some(eps) = config.mixer_rms_eps {
            value["mixer_rms_eps"] = json!(eps);
        }
        Self { config: value.to_string(), weights: None }
    }

    /// The fingerprint of this very model. Reads every parameter once.
    ///
    /// # Errors
    /// If a parameter cannot be read.
    pub fn of_model(model: &mut LanguageModel) -> Result<Self> {
        let mut hash = Xxh3::new();
        let mut failed = None;
        model.visit(&mut |parameter| {
            let added = hash_tensor(&mut hash, &parameter.name, parameter.tensor);
            failed = failed.take().or(added.err());
            Ok(())
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        let config = model.config();
        Ok(Self { weights: Some(hash.digest128()), ..Self::of_config(config) })
    }

    /// The fingerprint that the model of this file has once it is loaded. Reads every weight once and holds some of
    /// them at a time.
    ///
    /// # Errors
    /// If a weight cannot be read.
    pub fn of_source(source: &ModelSource) -> Result<Self> {
        /// Elements at a time; a multiple of every block's length.
        const PIECE: usize = 1 << 14;
        let config = source.config();
        let mut hash = Xxh3::new();
        let mut values = Vec::new();
        let mut bytes = Vec::new();
        for outline in parameter_outlines(config) {
            let tensor = source.get(&outline.name).ok_or_else(|| {
                Error::format(source.path(), format!("{}: no such tensor", outline.name))
            })?;
            hash_head(&mut hash, &outline.name, DType::F32, &outline.shape);
            let encoding = tensor.encoding;
            for part in tensor.bytes.chunks(encoding.row_bytes(PIECE)?) {
                values.resize(part.len() / encoding.block_bytes() * encoding.block_len(), 0.0);
                dequantize(encoding, part, &mut values)?;
                bytes.clear();
                bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                hash.update(&bytes);
            }
        }
        Ok(Self { weights: Some(hash.digest128()), ..Self::of_config(config) })
    }

    /// Hash of the configuration.
    pub fn config_hash(&self) -> u128 {
        xxh3_128(self.config.as_bytes())
    }
}

/// Hash of a state: layers, names, shapes, element types, values and positions. Equal states have equal
/// hashes, whatever the order of a layer's tensors.
///
/// # Errors
/// If a tensor cannot be read.
pub fn state_hash(state: &State) -> Result<u128> {
    let mut hash = Xxh3::new();
    hash.update(&(state.layers.len() as u64).to_le_bytes());
    for layer in &state.layers {
        let mut tensors: Vec<(&str, &Tensor)> = layer.iter().collect();
        tensors.sort_unstable_by_key(|&(name, _)| name);
        hash.update(&(tensors.len() as u64).to_le_bytes());
        for (name, tensor) in tensors {
            hash_tensor(&mut hash, name, tensor)?;
        }
    }
    hash.update(&(state.positions.len() as u64).to_le_bytes());
    for position in &state.positions {
        hash.update(&position.to_le_bytes());
    }
    Ok(hash.digest128())
}

/// Every part goes in with its length, so that no two different tensors give the same bytes.
fn hash_tensor(hash: &mut Xxh3, name: &str, tensor: &Tensor) -> Result<()> {
    hash_head(hash, name, tensor.dtype(), &tensor.shape());
    tensor_bytes(tensor, |bytes| hash.update(bytes)).map_err(|error| {
        elapid_tensor::Error::argument("fingerprint", format!("{name}: {error}")).into()
    })
}

fn hash_head(hash: &mut Xxh3, name: &str, dtype: DType, shape: &[usize]) {
    hash.update(&(name.len() as u64).to_le_bytes());
    hash.update(name.as_bytes());
    hash.update(dtype.name().as_bytes());
    hash.update(&(shape.len() as u64).to_le_bytes());
    for &extent in shape {
        hash.update(&(extent as u64).to_le_bytes());
    }
}

/// A hash as 32 hexadecimal digits.
pub(crate) fn hex(hash: u128) -> String {
    format!("{hash:032x}")
}

/// The hash that 32 hexadecimal digits stand for.
pub(crate) fn from_hex(text: &str) -> Option<u128> {
    let digits = text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    digits.then(|| u128::from_str_radix(text, 16).ok()).flatten()
}

/// Writes a file atomically; its length and the hash of its bytes.
pub(crate) fn write_hashed(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(u64, u128)> {
    atomic::write_file(path, |out| {
        let mut out = Hashing { inner: out, hash: Xxh3::new(), bytes: 0 };
        write(&mut out)?;
        Ok((out.bytes, out.hash.digest128()))
    })
}

/// Passes bytes on and hashes and counts them.
struct Hashing<'a> {
    inner: &'a mut dyn Write,
    hash: Xxh3,
    bytes: u64,
}

impl Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
