//! The weights of a model folder: one file or several shards, looked up under the Hugging Face names.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use elapid_models::MambaConfig;

use super::{EMBEDDINGS, HEAD, INDEX_FILE, WEIGHTS_FILE};
use crate::{Error, Result, TensorFile, json};

const ORIGINAL_EMBEDDINGS: &str = "backbone.embedding.weight";

/// Weights by name.
pub(super) struct Weights {
    /// The file, or the index of the shards: for errors.
    pub path: PathBuf,
    files: Vec<TensorFile>,
    /// Hugging Face name to file and the name there.
    places: BTreeMap<String, (usize, String)>,
}

impl Weights {
    /// Opens the weights of a folder.
    ///
    /// # Errors
    /// If there are none in a form that is read here, or a file is damaged.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let single = folder.join(WEIGHTS_FILE);
        let index = folder.join(INDEX_FILE);
        let (path, files) = if single.exists() {
            let file = TensorFile::open(&single)?;
            (single, vec![file])
        } else if index.exists() {
            let files = open_shards(folder, &index)?;
            (index, files)
        } else {
            return Err(no_weights(folder));
        };
        let mut places = BTreeMap::new();
        for (number, file) in files.iter().enumerate() {
            for own in file.names() {
                let name =
                    if own == ORIGINAL_EMBEDDINGS { EMBEDDINGS.to_owned() } else { own.clone() };
                if places.insert(name, (number, own.clone())).is_some() {
                    return Err(Error::format(file.path(), format!("{own} is there twice")));
                }
            }
        }
        Ok(Self { path, files, places })
    }

    /// File and name there.
    pub(super) fn find(&self, name: &str) -> Option<(&TensorFile, &str)> {
        self.places.get(name).map(|(file, own)| (&self.files[*file], own.as_str()))
    }

    /// All names.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// True if there is a head whose values are not those of the embedding.
    ///
    /// # Errors
    /// If one of the two cannot be read.
    pub(super) fn has_own_head(&self) -> Result<bool> {
        let (Some((a, embedding)), Some((b, head))) = (self.find(EMBEDDINGS), self.find(HEAD))
        else {
            return Ok(false);
        };
        Ok(a.shape(embedding) != b.shape(head)
            || a.dtype_name(embedding) != b.dtype_name(head)
            || a.bytes(embedding)? != b.bytes(head)?)
    }

    /// Refuses a configuration that needs far more memory than the files can fill, before any is taken.
    pub(super) fn check_size(&self, config: &MambaConfig) -> Result<()> {
        let layers = self.names().filter_map(layer_index).max().map_or(0, |last| last + 1);
        if config.n_layer > layers {
            return Err(Error::Mismatch {
                path: self.path.clone(),
                what: "number of layers",
                expected: format!("{} as in the configuration", config.n_layer),
                found: layers.to_string(),
            });
        }
        let wide = |n: usize| n as u128;
        let (d, inner) = (wide(config.d_model), wide(config.expand) * wide(config.d_model));
        let per_channel = wide(config.d_conv)
            + 3 * d
            + 3 * wide(config.d_state)
            + 2 * wide(config.dt_rank.unwrap_or(config.d_model.div_ceil(16)));
        let rows = wide(config.padded_vocab_size());
        let needed = rows * d + wide(config.n_layer) * inner * per_channel;
        let held: u128 = self.files.iter().map(|file| wide(file.data_len()) / 2).sum();
        if needed > 2 * held + (1 << 14) {
            let shape = self.find(EMBEDDINGS).and_then(|(file, own)| file.shape(own));
            return Err(Error::Mismatch {
                path: self.path.clone(),
                what: "number of parameters",
                expected: format!(
                    "about {needed} as in the configuration (embedding [{rows}, {d}])"
                ),
                found: format!("at most {held} (embedding {:?})", shape.unwrap_or_default()),
            });
        }
        Ok(())
    }
}

/// The 7 of `backbone.layers.7.norm.weight`.
fn layer_index(name: &str) -> Option<usize> {
    let rest = name.strip_prefix("backbone.layers.")?;
    rest.split_once('.')?.0.parse::<usize>().ok().filter(|&index| index < usize::MAX)
}

fn open_shards(folder: &Path, index: &Path) -> Result<Vec<TensorFile>> {
    let object = json::read_object(index)?;
    let Some(map) = object.get("weight_map").and_then(|map| map.as_object()) else {
        return Err(Error::format(index, "has no \"weight_map\""));
    };
    let mut shards = BTreeSet::new();
    for (name, file) in map {
        // A shard lies in the folder itself, whatever the index says.
        let plain = file.as_str().filter(|file| {
            let mut parts = Path::new(file).components();
            matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
        });
        let Some(file) = plain else {
            return Err(Error::format(
                index,
                format!("{name}: expected a file name, found {file}"),
            ));
        };
        shards.insert(file);
    }
    let files: Vec<TensorFile> =
        shards.iter().map(|file| TensorFile::open(&folder.join(file))).collect::<Result<_>>()?;
    for (name, file) in map {
        let there = files.iter().any(|shard| {
            shard.contains(name)
                && shard.path().file_name().is_some_and(|own| *file == *own.to_string_lossy())
        });
        if !there {
            return Err(Error::format(index, format!("{name} is not in its shard {file}")));
        }
    }
    Ok(files)
}

fn no_weights(folder: &Path) -> Error {
    if !folder.is_dir() {
        let message = if folder.exists() {
            "expected a model folder, found a file"
        } else {
            "no such folder"
        };
        return Error::format(folder, message);
    }
    let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json"]
        .into_iter()
        .find(|name| folder.join(name).exists());
    match pickled {
        Some(name) => Error::format(
            &folder.join(name),
            format!(
                "PyTorch's pickle format is not read; save the model as {WEIGHTS_FILE} first, in Python: \
                 safetensors.torch.save_model(model, \"{WEIGHTS_FILE}\"), or in transformers: \
                 model.save_pretrained(folder)"
            ),
        ),
        None => Error::format(folder, format!("has neither {WEIGHTS_FILE} nor {INDEX_FILE}")),
    }
}
