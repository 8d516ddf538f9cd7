//! One checkpoint: what goes in and what comes out.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use elapid_models::{LanguageModel, MambaConfig, State};
use elapid_tensor::{DType, Tensor};
use serde_json::Value;

use super::manifest::{Manifest, Sum};
use super::{OPTIMIZER_FILE, RUN_CONFIG_FILE, STATE_FILE};
use crate::fingerprint::write_hashed;
use crate::tensor_file::{Entry, Metadata, TensorFile, write_tensors};
use crate::{Error, Fingerprint, Result, atomic, hf, json, state_file};

/// What a checkpoint is made of. Nothing is copied: tensors are written where they are.
pub struct Contents<'a> {
    /// Optimizer steps done.
    pub step: u64,
    /// The model.
    pub model: &'a mut LanguageModel,
    /// The optimizer's tensors with their names (`exp_avg.{parameter}`), of any types.
    pub tensors: &'a [(String, Tensor)],
    /// Recurrent state carried from window to window.
    pub state: Option<&'a State>,
    /// Everything else to go on with: random numbers, data position, best metric. Floats come back bit
    /// for bit; JSON has no NaN and no infinity.
    pub meta: Value,
    /// The resolved configuration of the run.
    pub config_toml: &'a str,
}

/// A verified checkpoint on the disk.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
    config_toml: String,
}

/// Writes the content of one file.
type Written<'a> = Box<dyn FnOnce(&mut dyn Write) -> io::Result<()> + 'a>;

impl Contents<'_> {
    /// Writes a checkpoint folder, atomically.
    ///
    /// # Errors
    /// If the system refuses; nothing is left behind then, and an older folder of that name is in place.
    pub fn save(self, path: &Path) -> Result<()> {
        let Self { step, model, tensors, state, meta, config_toml } = self;
        atomic::write_folder(path, |folder| {
            let mut files = BTreeMap::new();
            for (name, bytes, hash) in hf::write_model_files(folder, model, DType::F32)? {
                files.insert(name.to_owned(), Sum { bytes, hash });
            }
            let mut put = |name: &str, content: Written<'_>| -> Result<()> {
                let (bytes, hash) = write_hashed(&folder.join(name), content)?;
                files.insert(name.to_owned(), Sum { bytes, hash });
                Ok(())
            };
            let entries = tensors.iter().map(|(name, tensor)| Entry::new(name, tensor)).collect();
            put(OPTIMIZER_FILE, Box::new(|out| write_tensors(out, &Metadata::new(), entries)))?;
            if let Some(state) = state {
                let fingerprint = Fingerprint::of_config(model.config());
                let (metadata, entries) = state_file::contents(path, state, &fingerprint)?;
                put(STATE_FILE, Box::new(move |out| write_tensors(out, &metadata, entries)))?;
            }
            put(RUN_CONFIG_FILE, Box::new(|out| out.write_all(config_toml.as_bytes())))?;
            Manifest { step, meta, files }.write(folder)
        })
    }
}

impl Checkpoint {
    /// Opens a checkpoint and verifies every file of it.
    ///
    /// # Errors
    /// That name the file that is missing or damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let manifest = Manifest::read(path)?;
        for required in [hf::CONFIG_FILE, hf::WEIGHTS_FILE, OPTIMIZER_FILE, RUN_CONFIG_FILE] {
            if !manifest.files.contains_key(required) {
                return Err(Error::format(
                    path,
                    format!("the checkpoint does not list {required}"),
                ));
            }
        }
        manifest.verify(path)?;
        let config_toml = json::read_text(&path.join(RUN_CONFIG_FILE))?;
        Ok(Self { path: path.into(), manifest, config_toml })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Optimizer steps done.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// What the trainer put in.
    pub fn meta(&self) -> &Value {
        &self.manifest.meta
    }

    /// The resolved configuration of the run.
    pub fn config_toml(&self) -> &str {
        &self.config_toml
    }

    /// The model's configuration.
    ///
    /// # Errors
    /// As [`hf::load_config`].
    pub fn model_config(&self) -> Result<MambaConfig> {
        hf::load_config(&self.path)
    }

    /// The model.
    ///
    /// # Errors
    /// As [`hf::load_model`].
    pub fn load_model(&self) -> Result<LanguageModel> {
        hf::load_model(&self.path)
    }

    /// The weights into a model that exists.
    ///
    /// # Errors
    /// As [`hf::load_weights`].
    pub fn load_weights(&self, model: &mut LanguageModel) -> Result<()> {
        hf::load_weights(&self.path, model)
    }

    /// The optimizer's tensors, sorted by element size and name.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let file = TensorFile::open(&self.path.join(OPTIMIZER_FILE))?;
        file.names()
            .into_iter()
            .map(|name| {
                let tensor = file.tensor(&name)?;
                Ok((name, tensor))
            })
            .collect()
    }

    /// The recurrent state, if one was saved.
    ///
    /// # Errors
    /// As [`crate::load_state`].
    pub fn state(&self, model: &LanguageModel) -> Result<Option<State>> {
        if !self.manifest.files.contains_key(STATE_FILE) {
            return Ok(None);
        }
        let fingerprint = Fingerprint::of_config(model.config());
        state_file::load_state(&self.path.join(STATE_FILE), model, &fingerprint).map(Some)
    }
}
