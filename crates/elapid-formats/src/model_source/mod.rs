//! A model on disk, whatever its format: [`ModelSource`] gives its configuration and its tensors under the
//! names and shapes of the Hugging Face layout, as the file has them.
//!
//! Opening reads headers only and checks every name, shape and size against the configuration; weights stay
//! in the memory map until they are used. A path is a folder or one file:
//!
//! | format | files |
//! |---|---|
//! | safetensors | `model.safetensors`, or shards with `model.safetensors.index.json` |
//! | PyTorch | `pytorch_model.bin`, or shards with `pytorch_model.bin.index.json`; `.pt`, `.pth` |
//! | NumPy | `.npz` |
//! | GGUF | `.gguf` |
//!
//! The format is told by a file's first bytes. The configuration is the file's own or `config.json` beside it,
//! in the layout of transformers or the original one, told apart by its keys; likewise the tensors' names.

mod bytes;
mod check;
mod index;
mod stored_tensor;
mod weights;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use elapid_models::{LanguageModel, MambaConfig};
use elapid_tensor::Device;

pub use bytes::Bytes;
pub(crate) use check::stored_shape;
pub(crate) use index::Index;
pub use stored_tensor::StoredTensor;
pub(crate) use weights::{Contents, floats, not_floats};
pub use weights::{PYTORCH_FILE, PYTORCH_INDEX_FILE, Weights, holds_weights};

use crate::Result;
use crate::hf::HEAD;

/// A file format of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// safetensors.
    Safetensors,
    /// PyTorch's pickles.
    PyTorch,
    /// NumPy's archives of arrays.
    Npz,
    /// llama.cpp's GGUF.
    Gguf,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Safetensors => "safetensors",
            Self::PyTorch => "PyTorch",
            Self::Npz => "NumPy",
            Self::Gguf => "GGUF",
        })
    }
}

/// Whose names the tensors have in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Those of transformers.
    HuggingFace,
    /// Those of the original code: `backbone.embedding.weight`.
    Original,
}

/// A model on disk.
pub struct ModelSource {
    weights: Weights,
    config: MambaConfig,
}

impl ModelSource {
    /// Opens a model folder or file, reads its headers and checks them.
    ///
    /// A head that is stored beside the embedding though the configuration ties them is left out if it has
    /// the same values; else the model gets a head of its own, as in transformers.
    ///
    /// # Errors
    /// If a file is missing or damaged, the model is not a Mamba, or a tensor is missing, unexpected or of
    /// another shape or type than the configuration says.
    pub fn open(path: &Path) -> Result<Self> {
        // Without weights, say so, even if the configuration is not readable either.
        let mut weights = Weights::open(path)?;
        let config = weights.read_config()?;
        let tie_embeddings = config.tie_embeddings && !weights.has_own_head();
        let config = MambaConfig { tie_embeddings, ..config };
        check::check(&weights, &config)?;
        if tie_embeddings {
            weights.tensors.remove(HEAD);
        }
        Ok(Self { weights, config })
    }

    /// The file of the weights, or the index of the shards.
    pub fn path(&self) -> &Path {
        &self.weights.path
    }

    /// The files that hold the weights.
    pub fn files(&self) -> &[PathBuf] {
        &self.weights.files
    }

    /// The model's shape.
    pub fn config(&self) -> &MambaConfig {
        &self.config
    }

    /// The format of the weights.
    pub fn format(&self) -> Format {
        self.weights.format
    }

    /// Whose names the tensors have in the file.
    pub fn layout(&self) -> Layout {
        self.weights.layout
    }

    /// Text that the files hold beside the tensors.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.weights.metadata
    }

    /// The names of all tensors, those of the Hugging Face layout; exactly the parameters of the model.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.weights.tensors.keys().map(String::as_str)
    }

    /// A tensor by its name in the Hugging Face layout.
    pub fn get(&self, name: &str) -> Option<&StoredTensor> {
        self.weights.tensors.get(name)
    }

    /// The model in f32, on the host.
    ///
    /// # Errors
    /// If a weight is infinite or no number, naming its tensor, or there is no memory.
    pub fn load(&self) -> Result<LanguageModel> {
        self.load_on(Device::Cpu)
    }

    /// The model in f32, on a device. On a GPU one parameter at a time passes through the host's memory.
    ///
    /// # Errors
    /// As [`ModelSource::load`], and if the device cannot be used or is full.
    pub fn load_on(&self, device: Device) -> Result<LanguageModel> {
        let mut model = LanguageModel::empty(&self.config)?;
        check::fill(&self.weights, &mut model, device)?;
        Ok(model)
    }
}

/// Reads a model folder or file into an f32 model on the host.
///
/// # Errors
/// As [`ModelSource::open`] and [`ModelSource::load`].
pub fn load_model(path: &Path) -> Result<LanguageModel> {
    ModelSource::open(path)?.load()
}

/// Reads the weights of a model folder or file into a model that exists.
///
/// # Errors
/// As [`load_model`]; the model may then be partly overwritten.
pub fn load_weights(path: &Path, model: &mut LanguageModel) -> Result<()> {
    let weights = Weights::open(path)?;
    check::check(&weights, model.config())?;
    check::fill(&weights, model, Device::Cpu)
}
