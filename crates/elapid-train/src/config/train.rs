//! The tables `[train]`, `[optimizer]`, `[schedule]` and `[log]`: how long, how fast, how seen.

use std::path::PathBuf;

use elapid_tensor::{DType, Device};
use serde::{Deserialize, Serialize};

use super::check::Check;
use crate::error::Result;

/// The `[train]` table. Exactly one of `steps`, `epochs` and `tokens` says when to stop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainConfig {
    /// Optimizer steps to train for.
    pub steps: Option<u64>,
    /// Passes over the training data, fractions allowed.
    pub epochs: Option<f64>,
    /// Tokens to train on (bytes, for a byte-level model).
    pub tokens: Option<u64>,
    /// Sequences of `data.context` tokens in a batch (8, unless `batch_tokens` is given).
    pub batch_size: Option<usize>,
    /// Tokens in a batch, instead of `batch_size`.
    pub batch_tokens: Option<usize>,
    /// Batches whose gradients are summed for one optimizer step.
    pub accumulation: usize,
    /// Seed of initialisation, shuffling and every other draw.
    pub seed: u64,
    /// Where to train: "cpu", "cuda", "cuda:1", or "auto" for the first GPU that can be used (the command line's
    /// default; otherwise "cpu").
    pub device: Option<String>,
    /// Number type of the products: "f32", or on a GPU "bf16". Parameters, norms, scans and the loss stay f32.
    pub dtype: Compute,
    /// Let products of f32 on a GPU round their inputs to TF32: several times as fast, 10 bits instead of 23.
    pub tf32: bool,
    /// Make cheap activations again in backward instead of keeping them: less memory, a little more time, the same
    /// results but for the last bits on a GPU.
    pub recompute: bool,
    /// CPU threads; 0 takes all cores. The same seed and thread count give the same bits.
    pub threads: usize,
    /// Steps between validations; 0 validates at the end only.
    pub validation_every: u64,
    /// Most tokens of the validation data to use each time; 0 takes all.
    pub validation_tokens: u64,
    /// Steps between samples shown on the way; 0 for none.
    pub sample_every: u64,
    /// Tokens in such a sample.
    pub sample_tokens: usize,
    /// Steps between checkpoints; 0 saves at the end (and the best, with `keep_best`).
    pub checkpoint_every: u64,
    /// How many of the latest checkpoints stay.
    pub keep_last: usize,
    /// Also save and keep the model at its lowest validation loss.
    pub keep_best: bool,
    /// Folder of the run: checkpoints, metrics, plot.
    pub out: PathBuf,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: None,
            epochs: None,
            tokens: None,
            batch_size: None,
            batch_tokens: None,
            accumulation: 1,
            seed: 0,
            device: None,
            dtype: Compute::F32,
            tf32: false,
            recompute: true,
            threads: 0,
            validation_every: 250,
            validation_tokens: 1 << 18,
            sample_every: 0,
            sample_tokens: 256,
            checkpoint_every: 500,
            keep_last: 2,
            keep_best: true,
            out: PathBuf::from("runs/train"),
        }
    }
}

impl TrainConfig {
    /// Sequences in a batch when `batch_tokens` does not rule.
    pub const DEFAULT_BATCH_SIZE: usize = 8;

    pub(crate) fn validate(&self, check: &Check<'_>) -> Result<()> {
        let lengths = [
            ("steps", self.steps.is_some()),
            ("epochs", self.epochs.is_some()),
            ("tokens", self.tokens.is_some()),
        ];
        check.at_most_one("train", &lengths)?;
        let any = lengths.iter().any(|(_, given)| *given);
        check.that(any, "train.steps", "one of train.steps, train.epochs, train.tokens", "none")?;
        check.that(self.steps != Some(0), "train.steps", "a whole number above 0", 0)?;
        check.that(self.tokens != Some(0), "train.tokens", "a whole number above 0", 0)?;
        if let Some(epochs) = self.epochs {
            check.positive("train.epochs", epochs)?;
        }
        check.at_most_one(
            "train",
            &[
                ("batch_size", self.batch_size.is_some()),
                ("batch_tokens", self.batch_tokens.is_some()),
            ],
        )?;
        if let Some(size) = self.batch_size {
            check.whole("train.batch_size", size, 1, 1 << 24)?;
        }
        if let Some(tokens) = self.batch_tokens {
            check.whole("train.batch_tokens", tokens, 2, 1 << 31)?;
        }
        check.whole("train.accumulation", self.accumulation, 1, 1 << 20)?;
        // TOML's integers are signed: a larger seed could not be written back.
        let writable = i64::try_from(self.seed).is_ok();
        check.that(writable, "train.seed", "a whole number from 0 to 2^63 - 1", self.seed)?;
        if let Some(device) = &self.device {
            // `auto` would look for a GPU here already.
            let known = device == "auto" || device.parse::<Device>().is_ok();
            check.that(known, "train.device", "cpu, cuda, cuda:N or auto", device)?;
        }
        check.whole("train.threads", self.threads, 0, 4096)?;
        check.whole("train.sample_tokens", self.sample_tokens, 1, 1 << 24)?;
        check.whole("train.keep_last", self.keep_last, 1, 1 << 20)?;
        let named = !self.out.as_os_str().is_empty();
        check.that(named, "train.out", "a folder", "\"\"")
    }
}

/// Number type of the products of a training step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// Single precision.
    #[default]
    F32,
    /// bfloat16, on GPUs.
    Bf16,
}

impl From<Compute> for DType {
    fn from(compute: Compute) -> Self {
        match compute {
            Compute::F32 => DType::F32,
            Compute::Bf16 => DType::BF16,
        }
    }
}

/// The `[optimizer]` table: AdamW; with `weight_decay = 0` it is Adam.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OptimizerConfig {
    /// Peak learning rate.
    pub lr: f64,
    /// Decay of the first and of the second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of matrices; norms, biases, A_log and D are never decayed.
    pub weight_decay: f64,
    /// The learning rate of what decides how long a state is kept (weight and bias of the projection to Δ,
    /// A_log), as a multiple of everything else's.
    pub recurrence_lr_factor: f64,
    /// Scale the gradient down to this global norm; 0 leaves it as it is.
    pub clip_norm: f64,
    /// Stop when the gradient norm exceeds this many times what is usual (its recent average, or `clip_norm` if
    /// that is more); 0 never stops.
    pub max_grad_norm_factor: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.1,
            recurrence_lr_factor: 1.0,
            clip_norm: 1.0,
            max_grad_norm_factor: 1000.0,
        }
    }
}

impl OptimizerConfig {
    pub(crate) fn validate(&self, check: &Check<'_>) -> Result<()> {
        check.positive("optimizer.lr", self.lr)?;
        for beta in self.betas {
            check.fraction("optimizer.betas", beta)?;
        }
        check.positive("optimizer.eps", self.eps)?;
        check.not_negative("optimizer.weight_decay", self.weight_decay)?;
        check.positive("optimizer.recurrence_lr_factor", self.recurrence_lr_factor)?;
        check.not_negative("optimizer.clip_norm", self.clip_norm)?;
        let factor = self.max_grad_norm_factor;
        let sensible = factor == 0.0 || (factor.is_finite() && factor > 1.0);
        check.that(sensible, "optimizer.max_grad_norm_factor", "0 or a number above 1", factor)
    }
}

/// The `[schedule]` table: linear warm-up to `optimizer.lr`, then constant or cosine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ScheduleConfig {
    /// "constant" or "cosine".
    pub kind: ScheduleKind,
    /// Steps of linear warm-up.
    pub warmup_steps: Option<u64>,
    /// Warm-up as a share of all steps, instead of `warmup_steps`.
    pub warmup_fraction: Option<f64>,
    /// Learning rate at the last step (cosine only).
    pub final_lr: Option<f64>,
    /// Final learning rate as a share of `optimizer.lr`, instead of `final_lr` (0.1).
    pub final_lr_fraction: Option<f64>,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self {
            kind: ScheduleKind::Cosine,
            warmup_steps: None,
            warmup_fraction: None,
            final_lr: None,
            final_lr_fraction: None,
        }
    }
}

/// What follows the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// The peak learning rate to the end.
    Constant,
    /// Half a cosine down to the final learning rate.
    Cosine,
}

impl ScheduleConfig {
    pub(crate) fn validate(
        &self,
        check: &Check<'_>,
        peak_lr: f64,
        steps: Option<u64>,
    ) -> Result<()> {
        let warmup = [
            ("warmup_steps", self.warmup_steps.is_some()),
            ("warmup_fraction", self.warmup_fraction.is_some()),
        ];
        check.at_most_one("schedule", &warmup)?;
        let last = [
            ("final_lr", self.final_lr.is_some()),
            ("final_lr_fraction", self.final_lr_fraction.is_some()),
        ];
        check.at_most_one("schedule", &last)?;
        if let (Some(warmup), Some(steps)) = (self.warmup_steps, steps) {
            let expected = format!("fewer than train.steps = {steps}");
            check.that(warmup < steps, "schedule.warmup_steps", &expected, warmup)?;
        }
        if let Some(fraction) = self.warmup_fraction {
            check.fraction("schedule.warmup_fraction", fraction)?;
        }
        if self.kind == ScheduleKind::Constant
            && let Some((key, _)) = last.iter().find(|(_, given)| *given)
        {
            let key = format!("schedule.{key}");
            return check.that(false, &key, "to be left out with kind = \"constant\"", "a value");
        }
        if let Some(lr) = self.final_lr {
            let expected = format!("a number from 0 to optimizer.lr = {peak_lr}");
            check.that((0.0..=peak_lr).contains(&lr), "schedule.final_lr", &expected, lr)?;
        }
        if let Some(fraction) = self.final_lr_fraction {
            let key = "schedule.final_lr_fraction";
            check.that((0.0..=1.0).contains(&fraction), key, "a number from 0 to 1", fraction)?;
        }
        Ok(())
    }
}

/// The `[log]` table: what a run shows and records.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogConfig {
    /// Steps between records in `metrics.jsonl` and the TensorBoard events.
    pub every: u64,
    /// Write TensorBoard event files.
    pub tensorboard: bool,
    /// Draw `loss.svg` at every checkpoint and at the end.
    pub plot: bool,
    /// "auto" (a bar on a terminal, lines elsewhere), "plain" or "quiet".
    pub progress: ProgressMode,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { every: 1, tensorboard: true, plot: true, progress: ProgressMode::Auto }
    }
}

impl LogConfig {
    pub(crate) fn validate(&self, check: &Check<'_>) -> Result<()> {
        check.that(self.every >= 1, "log.every", "a whole number from 1", self.every)
    }
}

/// How progress is shown on stderr.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProgressMode {
    /// A live bar where stderr is a terminal, plain lines elsewhere.
    #[default]
    Auto,
    /// Plain lines without control characters.
    Plain,
    /// Nothing.
    Quiet,
}
