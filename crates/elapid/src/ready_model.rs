//! A model that is ready to run: on the CPU the decode engine over the weights as the file has them, on a GPU the
//! language model, or its decode engine where `--weights` or the command asks for it. What trains or needs gradients takes a
//! [`LanguageModel`] instead.

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use elapid_formats::{Fingerprint, ModelSource};
use elapid_infer::{CpuEngine, GpuEngine, Loading, ModelRunner, Reading, Rows, Runner};
use elapid_models::{LanguageModel, MambaConfig};
use elapid_ops::blocks::Encoding;
use elapid_ops::decode_step;
use elapid_tensor::{DType, Device};

use crate::cli::Placement;
use crate::exit::Usage;
use crate::model_folder;
use crate::progress::{Bar, Unit};
use crate::text_of::TextOf;

/// Loading that takes longer shows its progress.
const PATIENCE: Duration = Duration::from_millis(700);

/// A model and what runs it.
pub struct ReadyModel {
    engine: Engine,
    source: ModelSource,
    folder: PathBuf,
}

enum Engine {
    Cpu(Box<CpuEngine>),
    Gpu {
        model: Box<LanguageModel>,
        /// Whether decode steps have kernels and weights of their own.
        decodes: bool,
        /// How they keep the weights; none: as they are stored.
        weights: Option<decode_step::Encoding>,
        state: DType,
        check: bool,
    },
}

impl ReadyModel {
    /// Loads what stands behind `--model`.
    ///
    /// # Errors
    /// If the model or the device cannot be used, or the device does not take `weights`.
    pub fn open(path: &Path, placement: &Placement, weights: Option<Encoding>) -> Result<Self> {
        check_weights(weights, placement)?;
        let (source, folder) = model_folder::open(path)?;
        Self::of_source(source, folder, placement, weights)
    }

    /// The same, and what its tokens mean; a large tokenizer takes as long to read as a model, so both are read at
    /// once.
    ///
    /// # Errors
    /// As [`ReadyModel::open`] and [`TextOf::model`].
    pub fn open_with_text(
        path: &Path,
        placement: &Placement,
        weights: Option<Encoding>,
        tokenizer: Option<&Path>,
    ) -> Result<(Self, TextOf)> {
        check_weights(weights, placement)?;
        let (source, folder) = model_folder::open(path)?;
        let (of_text, config) = (folder.clone(), source.config().clone());
        thread::scope(|scope| {
            let text = scope.spawn(move || TextOf::model(&of_text, &config, tokenizer));
            let ready = Self::of_source(source, folder, placement, weights);
            let text = text.join().unwrap_or_else(|panic| resume_unwind(panic));
            Ok((ready?, text?))
        })
    }

    /// Loads an open model.
    ///
    /// # Errors
    /// As [`ReadyModel::open`].
    pub fn of_source(
        source: ModelSource,
        folder: PathBuf,
        placement: &Placement,
        weights: Option<Encoding>,
    ) -> Result<Self> {
        let engine = if placement.device == Device::Cpu {
            let engine = on_cpu(&source, weights, placement)
                .with_context(|| format!("cannot use the model {}", folder.display()))?;
            Engine::Cpu(Box::new(engine))
        } else {
            let model = Box::new(placement.load(&source)?);
            let weights = weights.map(on_gpu).transpose().map_err(anyhow::Error::msg)?;
            let (decodes, check) = (weights.is_some(), placement.self_check);
            Engine::Gpu { model, decodes, weights, state: DType::F32, check }
        };
        Ok(Self { engine, source, folder })
    }

    /// The model with the decode engine of a GPU that computes in bf16, even if it was not asked for by a type of weights.
    pub fn for_decoding(mut self) -> Self {
        if let Engine::Gpu { model, decodes, .. } = &mut self.engine {
            *decodes |= model.compute() == DType::BF16;
        }
        self
    }

    /// The model with the recurrent state of its decode steps kept in a type: see [`check_state`].
    pub fn with_state(mut self, dtype: DType) -> Self {
        if let Engine::Gpu { state, .. } = &mut self.engine {
            *state = dtype;
        }
        self
    }

    /// The model's shape.
    pub fn config(&self) -> &MambaConfig {
        self.source.config()
    }

    /// How prompts are read best.
    pub fn reading(&self) -> Reading {
        match &self.engine {
            Engine::Cpu(engine) => engine.reading(),
            Engine::Gpu { model, .. } => ModelRunner::new(model).reading(),
        }
    }

    /// The folder or file that it came from.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// How products are computed on a GPU, or how projections and embedding are held.
    pub fn dtype(&self) -> String {
        match &self.engine {
            Engine::Cpu(engine) => engine.encoding().to_string(),
            Engine::Gpu { decodes: true, weights, .. } => {
                GpuEngine::encoding_of(&self.source, *weights).to_string()
            }
            Engine::Gpu { model, .. } => model.compute().to_string(),
        }
    }

    /// What tells the model from others. Reads every weight.
    ///
    /// # Errors
    /// If a weight cannot be read.
    pub fn fingerprint(&self) -> Result<Fingerprint> {
        Ok(Fingerprint::of_source(&self.source)?)
    }

    /// Does something with what runs it.
    ///
    /// # Errors
    /// Those of `run`, and those of the GPU's engine, which is made for it.
    pub fn with<R>(&mut self, run: impl FnOnce(&mut dyn Runner) -> Result<R>) -> Result<R> {
        match &mut self.engine {
            Engine::Cpu(engine) => run(&mut **engine),
            Engine::Gpu { model, decodes: false, .. } => {
                model.run_only()?;
                run(&mut ModelRunner::new(model))
            }
            Engine::Gpu { model, weights, state, check, .. } => {
                let engine = GpuEngine::of_source(model, &self.source, *weights)?;
                let mut engine = engine.with_state(*state)?;
                if *check {
                    engine.check().context("the model's decode steps cannot be trusted")?;
                }
                run(&mut engine)
            }
        }
    }
}

fn on_cpu(
    source: &ModelSource,
    encoding: Option<Encoding>,
    placement: &Placement,
) -> Result<CpuEngine> {
    let started = Instant::now();
    let mut bar = None;
    let mut progress = |done, all| {
        if started.elapsed() > PATIENCE {
            bar.get_or_insert_with(|| Bar::new("loading", Unit::Bytes, done, all)).of(done, all);
        }
    };
    let loading = Loading {
        encoding,
        threads: rayon::current_num_threads(),
        check: placement.self_check.then_some(Rows::AT_LOAD),
        progress: &mut progress,
    };
    Ok(CpuEngine::load(source, loading)?.0)
}

/// Refuses weights that the engine of the device does not take.
fn check_weights(weights: Option<Encoding>, placement: &Placement) -> Result<()> {
    let Some(weights) = weights else { return Ok(()) };
    if placement.device == Device::Cpu {
        return Ok(());
    }
    if let Err(message) = on_gpu(weights) {
        return Err(Usage::new(format!("--weights {message}")).into());
    }
    if placement.dtype != DType::BF16 {
        let message = format!("--weights on {} needs --dtype bf16", placement.device);
        return Err(Usage::new(message).into());
    }
    Ok(())
}

/// Refuses a type of weights for what only reads text, which on a GPU is done by the model itself.
///
/// # Errors
/// If there is one, and the device is a GPU.
pub fn check_reading(weights: Option<Encoding>, placement: &Placement) -> Result<(), Usage> {
    match weights {
        Some(_) if placement.device != Device::Cpu => Err(Usage::new(format!(
            "--weights: on {} text is read in the type of --dtype; only the decode steps of generate hold weights \
             of their own (--device cpu takes every type)",
            placement.device
        ))),
        _ => Ok(()),
    }
}

/// Refuses a type of the recurrent state where no decode steps keep one.
///
/// # Errors
/// If the device has no decode engine that keeps its state in a type.
pub fn check_state(placement: &Placement) -> Result<(), Usage> {
    if placement.device == Device::Cpu {
        return Err(Usage::new("--state-dtype is for a GPU: add --device cuda --dtype bf16"));
    }
    if placement.dtype != DType::BF16 {
        let message = format!("--state-dtype on {} needs --dtype bf16", placement.device);
        return Err(Usage::new(message));
    }
    Ok(())
}

fn on_gpu(weights: Encoding) -> Result<decode_step::Encoding, String> {
    weights.to_string().parse()
}
