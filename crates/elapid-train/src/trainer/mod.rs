//! A run: model, optimizer, data and their place in time, from the first step to the last.
//!
//! The run folder holds `config.toml` (every default written out), `metrics.jsonl`, TensorBoard events,
//! `loss.svg` and `checkpoints/`. A run that is interrupted (by a signal, a kill or a crash) and resumed
//! goes on from its last checkpoint and ends with the same bits as one that was not: a checkpoint holds
//! parameters, moments, the place in the data, the carried state and every running figure.

mod checkpoint;
mod step;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use elapid_models::{LanguageModel, MambaConfig, State};
use serde_json::Value;

pub use step::{NormWatch, StepReport, train_step};

use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::evaluate::{Evaluation, evaluate_bytes, evaluate_synthetic};
use crate::feed::{Dataset, Feed};
use crate::metrics::jsonl::{MetricsWriter, read_metrics};
use crate::metrics::memory::peak_memory_bytes;
use crate::metrics::tensorboard::EventWriter;
use crate::metrics::{Record, TrainRecord, ValidationRecord};
use crate::optimizer::AdamW;
use crate::plot::{LossPlot, Reference};
use crate::progress::{Progress, Status};
use crate::schedule::Schedule;

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
    best: Option<f64>,
    last_evaluation: Option<Evaluation>,
}

/// What a run does with the world around it.
#[derive(Default)]
pub struct Hooks<'a> {
    /// Set by a signal handler: the run saves after the current step and returns.
    pub stop: Option<&'a AtomicBool>,
    /// Makes a sample of so many tokens, to be shown on the way.
    #[allow(clippy::type_complexity)]
    pub sample: Option<Box<dyn FnMut(&LanguageModel, usize) -> String + 'a>>,
    /// Lines to compare with in the plot.
    pub references: Vec<Reference>,
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
            last_evaluation: None,
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

    /// Trains to the last step, or until told to stop; both leave a checkpoint.
    ///
    /// # Errors
    /// Divergence (the last good checkpoint stays, and is named), or a file that cannot be written.
    pub fn run(&mut self, hooks: &mut Hooks<'_>) -> Result<Outcome> {
        let out = self.config.train.out.clone();
        std::fs::create_dir_all(&out).map_err(Error::io("create", &out))?;
        let resumed = self.step > 0;
        let toml = self.config.resolved().to_toml();
        elapid_formats::atomic::write_file(&out.join("config.toml"), |file| {
            file.write_all(toml.as_bytes())
        })?;
        let metrics_path = out.join("metrics.jsonl");
        let metrics = if resumed {
            MetricsWriter::resume(&metrics_path, self.step)?
        } else {
            MetricsWriter::create(&metrics_path)?
        };
        let events = self
            .config
            .log
            .tensorboard
            .then(|| EventWriter::create(&out, resumed.then_some(self.step)))
            .transpose()?;
        let progress = Progress::new(self.config.log.progress, self.schedule.steps, self.step);
        let feed = self.dataset.feed(self.place.as_ref())?;
        let mut live = Live { metrics, events, progress, feed, checkpoint: None };
        let result = self.steps_of(&mut live, hooks);
        live.progress.finish();
        live.metrics.sync()?;
        let interrupted = match result {
            Ok(interrupted) => interrupted,
            Err(Error::Diverged { step, what, first_bad, .. }) => {
                let folder = out.join(checkpoint::FOLDER);
                let last_good = live.checkpoint.or_else(|| checkpoint::newest(&folder));
                return Err(Error::Diverged { step, what, first_bad, last_good });
            }
            Err(other) => return Err(other),
        };
        if self.config.log.plot {
            self.plot(hooks)?;
        }
        Ok(Outcome {
            interrupted,
            step: self.step,
            evaluation: self.last_evaluation.clone(),
            tokens: self.tokens,
            seconds: self.seconds,
            checkpoint: live.checkpoint,
        })
    }

    /// True if it was interrupted.
    fn steps_of(&mut self, live: &mut Live, hooks: &mut Hooks<'_>) -> Result<bool> {
        let every = |interval: u64, step: u64| interval > 0 && step.is_multiple_of(interval);
        let mut saved = self.step;
        while self.step < self.schedule.steps {
            let started = Instant::now();
            let mut batches = Vec::with_capacity(self.config.train.accumulation);
            let mut place = Value::Null;
            for _ in 0..self.config.train.accumulation {
                let (batch, after) = live.feed.next_batch()?;
                batches.push(batch);
                place = after;
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
            self.place = Some(place);
            self.step += 1;
            self.tokens += report.tokens as u64;
            let seconds = started.elapsed().as_secs_f64();
            self.seconds += seconds;
            let last = self.step == self.schedule.steps;
            self.record(live, &report, lr, seconds, last)?;

            if last || every(self.config.train.validation_every, self.step) {
                self.validate(live)?;
            }
            if every(self.config.train.sample_every, self.step)
                && let Some(sample) = &mut hooks.sample
            {
                let text = sample(&self.model, self.config.train.sample_tokens);
                live.progress.note(&format!("step {}: {text}", self.step));
            }
            let stop = hooks.stop.is_some_and(|stop| stop.load(Ordering::Relaxed));
            if last || stop || every(self.config.train.checkpoint_every, self.step) {
                live.metrics.sync()?;
                live.checkpoint = Some(self.save(live)?);
                saved = self.step;
                if self.config.log.plot {
                    self.plot(hooks)?;
                }
            }
            if stop && !last {
                return Ok(true);
            }
        }
        if saved == self.step && live.checkpoint.is_none() {
            live.checkpoint = checkpoint::newest(&self.config.train.out.join(checkpoint::FOLDER));
        }
        Ok(false)
    }

    fn record(
        &self,
        live: &mut Live,
        report: &StepReport,
        lr: f64,
        seconds: f64,
        last: bool,
    ) -> Result<()> {
        let bits = self.bits(report.loss);
        let tokens_per_s = report.tokens as f64 / seconds;
        let memory_bytes = peak_memory_bytes();
        live.progress.update(&Status {
            step: self.step,
            loss: report.loss,
            bits_per_byte: bits,
            tokens_per_s,
            memory_bytes,
        });
        if !last && self.step != 1 && !self.step.is_multiple_of(self.config.log.every) {
            return Ok(());
        }
        let record = Record::Train(TrainRecord {
            step: self.step,
            tokens: self.tokens,
            loss: report.loss,
            bits_per_byte: bits,
            lr,
            grad_norm: report.grad_norm,
            padding_rate: 1.0
                - report.tokens as f64
                    / (self.config.tokens_per_batch() * self.config.train.accumulation) as f64,
            tokens_per_s,
            time_s: self.seconds,
            memory_bytes,
        });
        self.write(live, &record)
    }

    fn write(&self, live: &mut Live, record: &Record) -> Result<()> {
        live.metrics.write(record)?;
        match &mut live.events {
            Some(events) => events.record(record),
            None => Ok(()),
        }
    }

    fn validate(&mut self, live: &mut Live) -> Result<()> {
        let started = Instant::now();
        let Some(evaluation) = self.evaluate(&mut |_| {})? else { return Ok(()) };
        let record = Record::Validation(ValidationRecord {
            step: self.step,
            tokens: self.tokens,
            loss: evaluation.loss,
            bits_per_byte: self.bits(evaluation.loss),
            accuracy: evaluation.mean_accuracy(),
            time_s: started.elapsed().as_secs_f64(),
        });
        self.write(live, &record)?;
        let mut note = format!("step {}: validation ", self.step);
        note += &match self.bits(evaluation.loss) {
            Some(bits) => format!("{bits:.4} bits per byte"),
            None => format!("loss {:.4}", evaluation.loss),
        };
        for (length, share) in &evaluation.accuracy {
            note += &format!(", {length}: {:.1} %", share * 100.0);
        }
        live.progress.note(&note);
        self.last_evaluation = Some(evaluation);
        Ok(())
    }

    /// Validates the model as it is; none if nothing is held out. `progress` is told the share done.
    ///
    /// # Errors
    /// Those of the model.
    pub fn evaluate(&self, progress: &mut dyn FnMut(f64)) -> Result<Option<Evaluation>> {
        match &self.dataset {
            Dataset::Bytes { validation: None, .. } => Ok(None),
            Dataset::Bytes { validation: Some(validation), .. } => {
                evaluate_bytes(&self.model, validation, progress).map(Some)
            }
            Dataset::Synthetic(task) => evaluate_synthetic(&self.model, task, progress).map(Some),
        }
    }

    fn bits(&self, loss: f64) -> Option<f64> {
        self.dataset.is_text().then(|| loss / std::f64::consts::LN_2)
    }

    fn save(&mut self, live: &mut Live) -> Result<PathBuf> {
        let loss = self.last_evaluation.as_ref().map(|evaluation| evaluation.loss);
        let improved = loss.is_some_and(|loss| self.best.is_none_or(|best| loss < best));
        if improved {
            self.best = loss;
        }
        let progress = checkpoint::RunProgress {
            step: self.step,
            tokens: self.tokens,
            seconds: self.seconds,
            place: self.place.clone().unwrap_or(Value::Null),
            best: self.best,
            validation_loss: loss,
            norm_average: self.watch.average,
            norms_seen: self.watch.seen,
        };
        let saved = checkpoint::save(
            &self.config,
            &mut self.model,
            &self.optimizer,
            self.carried.as_ref(),
            &progress,
            improved && self.config.train.keep_best,
        )?;
        live.progress.note(&format!("step {}: saved {}", self.step, saved.display()));
        Ok(saved)
    }

    fn plot(&self, hooks: &Hooks<'_>) -> Result<()> {
        let out = &self.config.train.out;
        let records = read_metrics(out.join("metrics.jsonl"))?;
        let name = out.file_name().map_or_else(String::new, |name| name.to_string_lossy().into());
        let mut plot = LossPlot::from_records(name, &records);
        plot.references.clone_from(&hooks.references);
        if records.iter().any(|record| match record {
            Record::Train(record) => record.loss.is_finite(),
            Record::Validation(record) => record.loss.is_finite(),
        }) {
            plot.save(out.join("loss.svg"))?;
        }
        Ok(())
    }
}

/// What is open while a run goes on.
struct Live {
    metrics: MetricsWriter,
    events: Option<EventWriter>,
    progress: Progress,
    feed: Feed,
    checkpoint: Option<PathBuf>,
}

/// The configuration of the run in a folder, as it was written when the run began.
///
/// # Errors
/// The folder holds no run.
pub fn run_config(folder: &Path, overrides: &[String]) -> Result<RunConfig> {
    RunConfig::load(&folder.join("config.toml"), overrides)
}

fn check_vocabulary(model: &MambaConfig, dataset: &Dataset) -> Result<()> {
    if dataset.is_text() && model.vocab_size < 256 {
        return Err(Error::BadValue {
            place: crate::error::Place::Nowhere,
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
                place: crate::error::Place::Nowhere,
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
