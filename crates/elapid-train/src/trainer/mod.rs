//! A run: model, optimizer, data and their place in time, from the first step to the last.
//!
//! The run folder holds `config.toml` (every default written out), `metrics.jsonl`, TensorBoard events,
//! `loss.svg` and `checkpoints/`. A run that is interrupted (by a signal, a kill or a crash) and resumed
//! goes on from its last checkpoint and ends with the same bits as one that was not: a checkpoint holds
//! parameters, moments, the place in the data, the carried state and every running figure.

mod checkpoint;
mod on_gpu;
mod report;
mod step;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use elapid_data::Batch;
use elapid_models::{LanguageModel, MambaConfig, State};
use elapid_tensor::{DType, Device, Tensor};
use serde_json::Value;

pub(crate) use on_gpu::GpuStep;
pub use step::{NormWatch, StepReport, train_step};

use crate::config::{ProgressMode, RunConfig};
use crate::diagnose::first_bad_tensor;
use crate::error::{Error, Place, Result};
use crate::evaluate::Evaluation;
use crate::feed::{Dataset, Feed};
use crate::metrics::jsonl::MetricsWriter;
use crate::metrics::tensorboard::EventWriter;
use crate::optimizer::AdamW;
use crate::plot::Reference;
use crate::progress::Progress;
use crate::schedule::Schedule;
use step::diverged;

/// The records of a run, within its folder.
const METRICS_FILE: &str = "metrics.jsonl";

/// A training run.
pub struct Trainer {
    config: RunConfig,
    dataset: Dataset,
    model: LanguageModel,
    optimizer: AdamW,
    schedule: Schedule,
    watch: NormWatch,
    carried: Option<State>,
    place: Option<Value>,
    step: u64,
    tokens: u64,
    seconds: f64,
    best: Option<checkpoint::Best>,
    last_evaluation: Option<Evaluation>,
    /// The last step's validation was interrupted.
    validation_due: bool,
    /// The newest checkpoint.
    checkpoint: Option<PathBuf>,
    /// The last step after which the model was seen to give a finite loss.
    sound_at: u64,
}

/// What a run does with the world around it.
#[derive(Default)]
pub struct Hooks<'a> {
    /// Set by a signal handler: the run saves after the current step, or in a validation, and returns.
    pub stop: Option<&'a AtomicBool>,
    /// Makes a sample of so many tokens, to be shown on the way.
    #[allow(clippy::type_complexity)]
    pub sample: Option<Box<dyn FnMut(&LanguageModel, usize) -> String + 'a>>,
    /// Lines to compare with in the plot.
    pub references: Vec<Reference>,
    /// Show no progress, whatever the configuration says.
    pub quiet: bool,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// True if it was told to stop before its last step.
    pub interrupted: bool,
    /// Steps done.
    pub step: u64,
    /// The last validation.
    pub evaluation: Option<Evaluation>,
    /// Training tokens seen.
    pub tokens: u64,
    /// Seconds of training, earlier parts included.
    pub seconds: f64,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
}

impl Trainer {
    /// A run at its first step. The run folder must not hold checkpoints of an earlier run.
    ///
    /// # Errors
    /// A folder in use, a model that cannot be built or loaded, a schedule that does not fit.
    pub fn start(config: RunConfig, dataset: Dataset) -> Result<Self> {
        let folder = config.train.out.join(checkpoint::FOLDER);
        if checkpoint::exists(&folder)? {
            return Err(Error::Checkpoint {
                message: format!(
                    "{} holds the checkpoints of an earlier run: resume it (--resume), or choose another train.out",
                    folder.display()
                ),
            });
        }
        let mut model = match &config.model.init_from {
            Some(path) => {
                elapid_formats::hf::load_model(&elapid_formats::checkpoint::resolve_model(path)?)?
            }
            None => LanguageModel::new(&config.model.mamba()?, config.train.seed)?,
        };
        check_vocabulary(model.config(), &dataset)?;
        place(&mut model, &config)?;
        let schedule = schedule(&config, &dataset)?;
        let optimizer = AdamW::new(&config.optimizer, &mut model)?;
        Ok(Self {
            config,
            dataset,
            model,
            optimizer,
            schedule,
            watch: NormWatch::default(),
            carried: None,
            place: None,
            step: 0,
            tokens: 0,
            seconds: 0.0,
            best: None,
            last_evaluation: None,
            validation_due: false,
            checkpoint: None,
            sound_at: 0,
        })
    }

    /// A run that goes on from the newest sound checkpoint in its folder; damaged ones are named on
    /// `warn` and passed over.
    ///
    /// # Errors
    /// No sound checkpoint, or a configuration that differs from the run's in what decides its result.
    pub fn resume(config: RunConfig, dataset: Dataset, warn: &mut dyn FnMut(&str)) -> Result<Self> {
        let folder = config.train.out.join(checkpoint::FOLDER);
        let found = checkpoint::load_latest(&folder, warn)?;
        checkpoint::check_config(&found.config, &config, &found.path)?;
        let mut model = found.model;
        check_vocabulary(model.config(), &dataset)?;
        place(&mut model, &config)?;
        let schedule = schedule(&config, &dataset)?;
        let mut optimizer = AdamW::new(&config.optimizer, &mut model)?;
        let mut tensors = found.tensors;
        let progress = found.progress;
        optimizer.restore(progress.step, &mut |name| tensors.remove(name))?;
        Ok(Self {
            config,
            dataset,
            model,
            optimizer,
            schedule,
            watch: NormWatch { average: progress.norm_average, seen: progress.norms_seen },
            carried: found.carried,
            place: Some(progress.place),
            step: progress.step,
            tokens: progress.tokens,
            seconds: progress.seconds,
            best: progress.best,
            last_evaluation: progress.evaluation,
            validation_due: progress.validation_due,
            checkpoint: Some(found.path),
            sound_at: progress.step,
        })
    }

    /// The model as it is now.
    pub fn model(&self) -> &LanguageModel {
        &self.model
    }

    /// The data of the run.
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// The run's configuration.
    pub fn config(&self) -> &RunConfig {
        &self.config
    }

    /// Steps done, and steps in all.
    pub fn steps(&self) -> (u64, u64) {
        (self.step, self.schedule.steps)
    }

    /// Trains to the last step, or until told to stop; both leave a checkpoint. A run that has done all its
    /// steps does nothing.
    ///
    /// # Errors
    /// Divergence (the last good checkpoint stays, and is named), or a file that cannot be written.
    pub fn run(&mut self, hooks: &mut Hooks<'_>) -> Result<Outcome> {
        if self.step >= self.schedule.steps && !self.validation_due {
            return Ok(self.outcome(false));
        }
        let mut live = self.open(hooks.quiet)?;
        let result = self.steps_of(&mut live, hooks);
        live.progress.finish();
        let synced = live.metrics.sync();
        let interrupted = match result {
            Err(Error::Diverged { step, what, first_bad, .. }) => {
                let last_good = self.checkpoint.clone();
                return Err(Error::Diverged { step, what, first_bad, last_good });
            }
            result => result?,
        };
        synced?;
        Ok(self.outcome(interrupted))
    }

    /// Opens what the run writes to, and its data at the place where it stands.
    fn open(&mut self, quiet: bool) -> Result<Live> {
        let feed = self.dataset.feed(self.place.as_ref())?;
        let out = &self.config.train.out;
        std::fs::create_dir_all(out).map_err(Error::io("create", out))?;
        let toml = self.config.resolved().to_toml();
        elapid_formats::atomic::write_file(&out.join("config.toml"), |file| {
            file.write_all(toml.as_bytes())
        })?;
        if let Some(best) = self.best.filter(|_| self.config.train.keep_best) {
            checkpoint::restore_best(&out.join(checkpoint::FOLDER), best)?;
        }
        let metrics_path = out.join(METRICS_FILE);
        // Also without a checkpoint there may be records of a run that was killed before its first one.
        let earlier = metrics_path.exists();
        let metrics = if self.step > 0 {
            MetricsWriter::resume(&metrics_path, self.step)?
        } else {
            MetricsWriter::create(&metrics_path)?
        };
        let events = self
            .config
            .log
            .tensorboard
            .then(|| EventWriter::create(out, earlier.then_some(self.step)))
            .transpose()?;
        let mode = if quiet { ProgressMode::Quiet } else { self.config.log.progress };
        let progress = Progress::new(mode, self.schedule.steps, self.step);
        Ok(Live { metrics, events, progress, feed })
    }

    fn outcome(&self, interrupted: bool) -> Outcome {
        Outcome {
            interrupted,
            step: self.step,
            evaluation: self.last_evaluation.clone(),
            tokens: self.tokens,
            seconds: self.seconds,
            checkpoint: self.checkpoint.clone(),
        }
    }

    /// True if it was interrupted.
    fn steps_of(&mut self, live: &mut Live, hooks: &mut Hooks<'_>) -> Result<bool> {
        let every = |interval: u64, step: u64| interval > 0 && step.is_multiple_of(interval);
        let train = self.config.train.clone();
        if self.validation_due {
            let best = self.validate(live, hooks.stop)?;
            if self.validation_due {
                return Ok(true);
            }
            if self.step >= self.schedule.steps || (best && train.keep_best) {
                self.conclude(live, hooks)?;
            }
        }
        while self.step < self.schedule.steps {
            let started = Instant::now();
            let mut batches = Vec::with_capacity(train.accumulation);
            for _ in 0..train.accumulation {
                let (batch, place) = live.feed.next_batch()?;
                batches.push(batch);
                self.place = Some(place);
            }
            let lr = self.schedule.lr(self.step);
            let carry = self.config.data.carry_state.then_some(&mut self.carried);
            let report = train_step(
                &mut self.model,
                &mut self.optimizer,
                &self.config.optimizer,
                &mut self.watch,
                &batches,
                carry,
                lr,
            )?;
            self.step += 1;
            self.tokens += report.tokens as u64;
            let seconds = started.elapsed().as_secs_f64();
            self.seconds += seconds;
            let last = self.step == self.schedule.steps;
            self.record(live, &report, lr, seconds, last)?;

            let mut save = last || every(train.checkpoint_every, self.step);
            if last || every(train.validation_every, self.step) {
                self.check_sound(&batches)?;
                save |= self.validate(live, hooks.stop)? && train.keep_best;
            }
            if every(train.sample_every, self.step)
                && let Some(sample) = &mut hooks.sample
            {
                let text = sample(&self.model, train.sample_tokens);
                live.progress.note(&format!("step {}: {text}", self.step));
            }
            let stop = hooks.stop.is_some_and(|stop| stop.load(Ordering::Relaxed));
            if save || stop {
                self.check_sound(&batches)?;
                self.conclude(live, hooks)?;
            }
            if stop && (!last || self.validation_due) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Saves a checkpoint and all records up to it.
    fn conclude(&mut self, live: &mut Live, hooks: &Hooks<'_>) -> Result<()> {
        live.metrics.sync()?;
        self.save(live)?;
        if self.config.log.plot {
            self.plot(hooks)?;
        }
        Ok(())
    }

    /// Refuses to go on with a model that the last update broke, so that a checkpoint is always one to go
    /// on from: a step's loss is that of the parameters before its update.
    fn check_sound(&mut self, batches: &[Batch]) -> Result<()> {
        let Some(batch) = batches.last().filter(|_| self.sound_at != self.step) else {
            return Ok(());
        };
        let ids = Tensor::from_slice(&batch.ids, [batch.ids.len()])?;
        let (losses, _) =
            self.model.losses(&ids, &batch.targets, &batch.sequences, self.carried.clone())?;
        let loss: f64 = losses.iter().map(|&loss| f64::from(loss)).sum();
        if !loss.is_finite() {
            let found = first_bad_tensor(&mut self.model, batch, self.carried.clone(), &[])?;
            return Err(diverged(self.step, format!("the loss after the update is {loss}"), found));
        }
        self.sound_at = self.step;
        Ok(())
    }

    fn save(&mut self, live: &mut Live) -> Result<()> {
        let progress = checkpoint::RunProgress {
            step: self.step,
            tokens: self.tokens,
            seconds: self.seconds,
            place: self.place.clone().unwrap_or(Value::Null),
            best: self.best,
            evaluation: self.last_evaluation.clone(),
            validation_due: self.validation_due,
            norm_average: self.watch.average,
            norms_seen: self.watch.seen,
        };
        let saved = checkpoint::save(
            &self.config,
            &mut self.model,
            &self.optimizer,
            self.carried.as_ref(),
            &progress,
            self.config.train.keep_best && self.best.is_some_and(|best| best.step == self.step),
        )?;
        live.progress.note(&format!("step {}: saved {}", self.step, saved.display()));
        self.checkpoint = Some(saved);
        Ok(())
    }
}

/// What is open while a run goes on.
struct Live {
    metrics: MetricsWriter,
    events: Option<EventWriter>,
    progress: Progress,
    feed: Feed,
}

/// Moves the model to where the run's configuration says.
fn place(model: &mut LanguageModel, config: &RunConfig) -> Result<()> {
    let device = match &config.train.device {
        Some(device) => device.parse::<Device>()?,
        None => Device::Cpu,
    };
    let compute = DType::from(config.train.dtype);
    if device == Device::Cpu && compute != DType::F32 {
        return Err(Error::BadValue {
            place: Place::Nowhere,
            key: "train.dtype".into(),
            expected: "f32 on cpu (bf16 is for GPUs: --device cuda)".into(),
            found: compute.to_string(),
        });
    }
    model.set_recompute(config.train.recompute);
    if let Some(gpu) = device.gpu()? {
        gpu.allow_tf32(config.train.tf32);
    }
    Ok(model.place(device, compute)?)
}

fn check_vocabulary(model: &MambaConfig, dataset: &Dataset) -> Result<()> {
    if dataset.is_text() && model.vocab_size < 256 {
        return Err(Error::BadValue {
            place: Place::Nowhere,
            key: "model.vocab_size".into(),
            expected: "at least 256, to train on bytes".into(),
            found: model.vocab_size.to_string(),
        });
    }
    Ok(())
}

fn schedule(config: &RunConfig, dataset: &Dataset) -> Result<Schedule> {
    let per_step = (config.tokens_per_batch() * config.train.accumulation) as f64;
    let tokens = match (config.train.tokens, config.train.epochs, dataset.epoch_tokens()) {
        (Some(tokens), _, _) => Some(tokens as f64),
        (None, Some(epochs), Some(tokens)) => Some(epochs * tokens as f64),
        (None, Some(_), None) => {
            return Err(Error::BadValue {
                place: Place::Nowhere,
                key: "train.epochs".into(),
                expected: "train.steps or train.tokens with a synthetic task, which has no end"
                    .into(),
                found: "epochs".into(),
            });
        }
        (None, None, _) => None,
    };
    let steps = match (config.train.steps, tokens) {
        (Some(steps), _) => steps,
        (None, Some(tokens)) => ((tokens / per_step).ceil() as u64).max(1),
        (None, None) => 1,
    };
    Schedule::new(&config.schedule, config.optimizer.lr, steps)
}
