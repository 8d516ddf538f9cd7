//! What a run tells: its records, validations and plot.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::checkpoint::Best;
use super::step::{StepReport, diverged};
use super::{Hooks, Live, METRICS_FILE, Trainer};
use crate::diagnose::first_bad_tensor;
use crate::error::Result;
use crate::evaluate::{Evaluation, evaluate_bytes, evaluate_synthetic};
use crate::feed::Dataset;
use crate::metrics::jsonl::read_metrics;
use crate::metrics::memory::peak_memory_bytes;
use crate::metrics::{Record, TrainRecord, ValidationRecord};
use crate::plot::LossPlot;
use crate::progress::Status;

impl Trainer {
    /// Shows and writes down a step.
    pub(super) fn record(
        &self,
        live: &mut Live,
        report: &StepReport,
        lr: f64,
        seconds: f64,
        last: bool,
    ) -> Result<()> {
        let bits = self.bits(report.loss);
        let tokens_per_s = report.tokens as f64 / seconds;
        let memory_bytes = match self.model.device().gpu()? {
            Some(gpu) => Some(gpu.usage().peak as u64),
            None => peak_memory_bytes(),
        };
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

    /// Validates, shows and writes down the result; true if it is the best so far. Told to stop, it leaves the
    /// validation to the resumed run.
    pub(super) fn validate(&mut self, live: &mut Live, stop: Option<&AtomicBool>) -> Result<bool> {
        let started = Instant::now();
        let mut stopped = false;
        let progress = &mut live.progress;
        let evaluation = self.evaluate(&mut |share| {
            progress.validating(share);
            stopped = share < 1.0 && stop.is_some_and(|stop| stop.load(Ordering::Relaxed));
            if stopped { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        self.validation_due = stopped;
        let Some(evaluation) = evaluation else { return Ok(false) };
        let loss = evaluation.loss;
        if !loss.is_finite() {
            let found = self.first_bad_in_validation()?;
            return Err(diverged(self.step, format!("the validation loss is {loss}"), found));
        }
        let record = Record::Validation(ValidationRecord {
            step: self.step,
            tokens: self.tokens,
            loss,
            bits_per_byte: self.bits(loss),
            accuracy: evaluation.mean_accuracy(),
            time_s: started.elapsed().as_secs_f64(),
        });
        self.write(live, &record)?;
        let mut note = format!("step {}: validation ", self.step);
        note += &match self.bits(loss) {
            Some(bits) => format!("{bits:.4} bits per byte"),
            None => format!("loss {loss:.4}"),
        };
        for (length, share) in &evaluation.accuracy {
            note += &format!(", {length}: {:.1} %", share * 100.0);
        }
        live.progress.note(&note);
        self.last_evaluation = Some(evaluation);
        let improved = self.best.is_none_or(|best| loss < best.loss);
        if improved {
            self.best = Some(Best { step: self.step, loss });
        }
        Ok(improved)
    }

    fn first_bad_in_validation(&mut self) -> Result<Option<String>> {
        let Dataset::Bytes { validation: Some(validation), .. } = &self.dataset else {
            return Ok(None);
        };
        for batch in validation.batches() {
            let found = first_bad_tensor(&mut self.model, &batch?, None, &[])?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// Validates the model as it is; none if nothing is held out. `progress` is told the share done, and may stop the
    /// work, which then gives none.
    ///
    /// # Errors
    /// Those of the model.
    pub fn evaluate(
        &self,
        progress: &mut dyn FnMut(f64) -> ControlFlow<()>,
    ) -> Result<Option<Evaluation>> {
        match &self.dataset {
            Dataset::Bytes { validation: None, .. } => Ok(None),
            Dataset::Bytes { validation: Some(validation), .. } => {
                evaluate_bytes(&self.model, validation, progress)
            }
            Dataset::Synthetic(task) => evaluate_synthetic(&self.model, task, progress),
        }
    }

    fn bits(&self, loss: f64) -> Option<f64> {
        self.dataset.is_text().then(|| loss / std::f64::consts::LN_2)
    }

    /// Draws the curves so far.
    pub(super) fn plot(&self, hooks: &Hooks<'_>) -> Result<()> {
        let out = &self.config.train.out;
        let records = read_metrics(out.join(METRICS_FILE))?;
        let name = out.file_name().map_or_else(String::new, |name| name.to_string_lossy().into());
        let mut plot = LossPlot::from_records(name, &records);
        plot.references.clone_from(&hooks.references);
        // With sparse records there may be nothing to draw yet.
        if !records.is_empty() {
            plot.save(out.join("loss.svg"))?;
        }
        Ok(())
    }
}
