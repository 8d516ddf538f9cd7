//! From a path to named tensors: which files hold a model's weights, what format they have (told by their
//! first bytes, never by their names), and the names of the Hugging Face layout for all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use elapid_models::MambaConfig;
use elapid_ops::blocks::Encoding;
use elapid_tensor::DType;

use super::{Bytes, Format, Index, Layout, StoredTensor};
use crate::hf::{CONFIG_FILE, EMBEDDINGS, HEAD, INDEX_FILE, ORIGINAL_EMBEDDINGS, WEIGHTS_FILE};
use crate::zip::Archive;
use crate::{Error, Result, TensorFile, gguf, json, npz, pytorch};

/// The file name of PyTorch weights.
pub const PYTORCH_FILE: &str = "pytorch_model.bin";
/// The file name of the list of PyTorch shards.
pub const PYTORCH_INDEX_FILE: &str = "pytorch_model.bin.index.json";

/// What one file holds.
pub(crate) struct Contents {
    /// Tensors under the file's own names or, where a format has others, those of the Hugging Face layout.
    pub tensors: Vec<(String, StoredTensor)>,
    /// Text beside them.
    pub metadata: BTreeMap<String, String>,
    /// The configuration, if the format holds one.
    pub config: Option<MambaConfig>,
}

/// The tensors of a model, of one file or of several, before they are checked against a configuration.
pub struct Weights {
    /// The file, or the index of the shards: for errors.
    pub path: PathBuf,
    /// The files that were read.
    pub files: Vec<PathBuf>,
    /// Their format.
    pub format: Format,
    /// Whose names they had.
    pub layout: Layout,
    /// By Hugging Face name.
    pub tensors: BTreeMap<String, StoredTensor>,
    /// Text beside them.
    pub metadata: BTreeMap<String, String>,
    /// The configuration, if the files hold one.
    pub config: Option<MambaConfig>,
}

impl Weights {
    /// Opens the weights of a folder, or one file.
    ///
    /// # Errors
    /// If there are none in a form that is read here, or a file is damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let path = locate(path)?;
        if is_index(&path) {
            return Self::of_index(&path, &json::read_bytes(&path)?, &mut |file| Bytes::map(file));
        }
        let bytes = Bytes::map(&path)?;
        Self::of_file(&path, bytes)
    }

    /// The weights that the text of an index lists; `path` is where it lies, and `open` gives the bytes of a shard
    /// beside it.
    ///
    /// # Errors
    /// As [`Weights::open`], and those of `open`.
    pub fn of_index(
        path: &Path,
        text: &[u8],
        open: &mut dyn FnMut(&Path) -> Result<Bytes>,
    ) -> Result<Self> {
        let index = Index::parse(path, text)?;
        let mut files = Vec::new();
        for (shard, names) in &index.shards {
            let file = folder_of(path).join(shard);
            let (format, contents) = read_file(&file, open(&file)?)?;
            let held: BTreeSet<&str> =
                contents.tensors.iter().map(|(name, _)| name.as_str()).collect();
            if let Some(name) = names.iter().find(|name| !held.contains(name.as_str())) {
                return Err(Error::format(path, format!("{name} is not in its shard {shard:?}")));
            }
            files.push((file, format, contents));
        }
        Self::gather(path.into(), files)
    }

    /// The weights that one file's bytes hold; `path` is for errors.
    ///
    /// # Errors
    /// As [`Weights::open`].
    pub fn of_file(path: &Path, bytes: Bytes) -> Result<Self> {
        let (format, contents) = read_file(path, bytes)?;
        Self::gather(path.into(), vec![(path.into(), format, contents)])
    }

    fn gather(path: PathBuf, files: Vec<(PathBuf, Format, Contents)>) -> Result<Self> {
        let Some(&(_, format, _)) = files.first() else {
            return Err(Error::format(&path, "lists no file"));
        };
        let mut weights = Self {
            path,
            files: Vec::new(),
            format,
            layout: Layout::HuggingFace,
            tensors: BTreeMap::new(),
            metadata: BTreeMap::new(),
            config: None,
        };
        for (file, _, contents) in files {
            for (own, tensor) in contents.tensors {
                let original = own == ORIGINAL_EMBEDDINGS;
                let name = if original { EMBEDDINGS.to_owned() } else { own.clone() };
                if original {
                    weights.layout = Layout::Original;
                }
                if weights.tensors.insert(name, tensor).is_some() {
                    return Err(Error::format(&file, format!("{own} is there twice")));
                }
            }
            weights.metadata.extend(contents.metadata);
            weights.config = weights.config.or(contents.config);
            weights.files.push(file);
        }
        Ok(weights)
    }

    /// The configuration that belongs to these weights: the file's own, or `config.json` beside it.
    ///
    /// # Errors
    /// If there is none, or it describes another kind of model.
    pub fn read_config(&self) -> Result<MambaConfig> {
        match &self.config {
            Some(config) => Ok(config.clone()),
            None => crate::hf::load_config(folder_of(&self.path)),
        }
    }

    /// Where a configuration beside these weights lies, if there is one.
    pub fn config_file(&self) -> PathBuf {
        folder_of(&self.path).join(CONFIG_FILE)
    }

    /// True if there is a head whose values are not those of the embedding.
    pub fn has_own_head(&self) -> bool {
        let (Some(embedding), Some(head)) = (self.tensors.get(EMBEDDINGS), self.tensors.get(HEAD))
        else {
            return false;
        };
        embedding.shape != head.shape
            || embedding.encoding != head.encoding
            || (!embedding.bytes.is_same_place(&head.bytes) && *embedding.bytes != *head.bytes)
    }
}

/// The folder that a file lies in.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn is_index(path: &Path) -> bool {
    path.file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.ends_with(".index.json"))
}

/// The file that holds a model's weights, or lists those that do.
fn locate(path: &Path) -> Result<PathBuf> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::format(path, "no such folder or file"));
        }
        Err(error) => return Err(Error::io("open", path)(error)),
    };
    if !metadata.is_dir() {
        let is_config = path.file_name().is_some_and(|name| name == CONFIG_FILE);
        return if is_config { locate(folder_of(path)) } else { Ok(path.into()) };
    }
    let usual = [WEIGHTS_FILE, INDEX_FILE, PYTORCH_FILE, PYTORCH_INDEX_FILE];
    if let Some(file) = usual.iter().map(|name| path.join(name)).find(|file| file.exists()) {
        return Ok(file);
    }
    let others = files_of_weights(path).map_err(Error::io("read", path))?;
    match others.as_slice() {
        [] => Err(Error::format(
            path,
            format!("has neither {} nor another file of weights", usual.join(" nor ")),
        )),
        [file] => Ok(file.clone()),
        several => {
            let names: Vec<String> = several
                .iter()
                .filter_map(|file| Some(file.file_name()?.to_string_lossy().into_owned()))
                .collect();
            let message = format!("has several files of weights; name one: {}", names.join(", "));
            Err(Error::format(path, message))
        }
    }
}

/// The files of a folder that by their names hold weights, in order.
fn files_of_weights(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|file| {
            let extension = file.extension().and_then(|extension| extension.to_str());
            matches!(extension, Some("gguf" | "npz" | "safetensors" | "bin" | "pt" | "pth"))
                && file.is_file()
        })
        .collect();
    files.sort();
    Ok(files)
}

/// True if a folder has a file of weights, whatever its format.
pub fn holds_weights(folder: &Path) -> bool {
    files_of_weights(folder).is_ok_and(|files| !files.is_empty())
}

/// Reads one file of whatever format.
fn read_file(path: &Path, bytes: Bytes) -> Result<(Format, Contents)> {
    if bytes.starts_with(&gguf::MAGIC) {
        return Ok((Format::Gguf, gguf::read_contents(path, bytes)?));
    }
    if bytes.starts_with(b"PK") {
        let archive = Archive::open(&bytes).map_err(|message| Error::format(path, message))?;
        if pytorch::is_archive(&archive) {
            return Ok((Format::PyTorch, pytorch::read_archive(path, &bytes, archive)?));
        }
        if npz::is_archive(&archive) {
            return Ok((Format::Npz, npz::read_archive(path, archive)?));
        }
        let message = "a zip archive with neither PyTorch's data.pkl nor NumPy's .npy files";
        return Err(Error::format(path, message));
    }
    if pytorch::is_legacy(&bytes) {
        return Ok((Format::PyTorch, pytorch::read_legacy(path, &bytes)?));
    }
    let named = path.extension().is_some_and(|extension| extension == "safetensors");
    if !named && !TensorFile::may_be(&bytes) {
        let message =
            "is no file of weights of a known format: safetensors, PyTorch, NumPy's .npz or GGUF";
        return Err(Error::format(path, message));
    }
    Ok((Format::Safetensors, read_safetensors(TensorFile::of_bytes(path, bytes)?)?))
}

fn read_safetensors(file: TensorFile) -> Result<Contents> {
    let path = file.path();
    let mut tensors = Vec::new();
    for name in file.names() {
        let bytes = file.stored_bytes(&name)?;
        let shape = file.shape(&name).unwrap_or_default().to_vec();
        let floats = file.dtype(&name).and_then(|dtype| floats(dtype, shape.clone(), bytes));
        let tensor = match floats {
            Some(tensor) => tensor,
            None => {
                let found = file.dtype_name(&name).unwrap_or_default();
                return Err(not_floats(path, &name, &shape, &found));
            }
        };
        let tensor = tensor.map_err(|e| Error::format(path, format!("{name}: {e}")))?;
        tensors.push((name, tensor));
    }
    let metadata = file
        .metadata_entries()
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    Ok(Contents { tensors, metadata, config: None })
}

/// A tensor of an element type that weights may have; 64-bit floats are given as f32.
pub(crate) fn floats(
    dtype: DType,
    shape: Vec<usize>,
    bytes: Bytes,
) -> Option<Result<StoredTensor, String>> {
    let encoding = match dtype {
        DType::F32 => Encoding::F32,
        DType::BF16 => Encoding::BF16,
        DType::F16 => Encoding::F16,
        DType::F64 => {
            let narrow = Bytes::computed(bytes.len() / 2, move || narrowed(&bytes));
            let tensor = StoredTensor::new(Encoding::F32, shape, narrow);
            return Some(tensor.map(|tensor| tensor.with_file_type("F64")));
        }
        _ => return None,
    };
    Some(StoredTensor::new(encoding, shape, bytes))
}

fn narrowed(bytes: &[u8]) -> Vec<u8> {
    let (chunks, _) = bytes.as_chunks::<8>();
    chunks.iter().flat_map(|&chunk| (f64::from_le_bytes(chunk) as f32).to_le_bytes()).collect()
}

pub(crate) fn not_floats(path: &Path, name: &str, shape: &[usize], found: &str) -> Error {
    let message = format!("{name}: expected F32, BF16, F16 or F64, found {shape:?} {found}");
    Error::format(path, message)
}
