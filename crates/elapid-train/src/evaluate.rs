//! Validation: mean cross-entropy over held-out bytes, accuracy on synthetic tasks.

use std::ops::ControlFlow;

use elapid_data::{Batch, IGNORE, Validation};
use elapid_models::{Context, LanguageModel, State};
use elapid_ops::gather::select_rows;
use elapid_tensor::autograd::no_grad;
use elapid_tensor::{Device, Sequence, Sequences, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::feed::Synthetic;

/// Longest stretch of a sequence that runs at once; the state carries over. Memory does not grow with length.
const CHUNK: usize = 4096;

/// What a validation found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Mean cross-entropy of the predicted tokens, in nats.
    pub loss: f64,
    /// Number of predicted tokens.
    pub predicted: u64,
    /// Share of right answers per length, for tasks that have answers.
    pub accuracy: Vec<(usize, f64)>,
}

impl Evaluation {
    /// Mean over the lengths of [`Evaluation::accuracy`].
    pub fn mean_accuracy(&self) -> Option<f64> {
        let n = self.accuracy.len();
        (n > 0).then(|| self.accuracy.iter().map(|(_, share)| share).sum::<f64>() / n as f64)
    }
}

/// Cross-entropy over the held-out windows, each from a fresh state. `progress` is told the share done after each
/// batch and may stop the work, which then gives none.
///
/// # Errors
/// Those of the model.
pub fn evaluate_bytes(
    model: &LanguageModel,
    validation: &Validation,
    progress: &mut dyn FnMut(f64) -> ControlFlow<()>,
) -> Result<Option<Evaluation>> {
    let (mut sum, mut predicted) = (0.0, 0u64);
    let all = validation.predicted().max(1);
    for batch in validation.batches() {
        let batch = batch?;
        let ids = Tensor::from_slice(&batch.ids, [batch.ids.len()])?;
        let (losses, _) = model.losses(&ids, &batch.targets, &batch.sequences, None)?;
        sum += losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
        predicted += batch.predicted as u64;
        if progress(predicted as f64 / all as f64).is_break() {
            return Ok(None);
        }
    }
    Ok(Some(Evaluation { loss: sum / predicted.max(1) as f64, predicted, accuracy: Vec::new() }))
}

/// Accuracy on fresh samples of a synthetic task at each of its lengths. `progress` as in [`evaluate_bytes`].
///
/// # Errors
/// Those of the model.
pub fn evaluate_synthetic(
    model: &LanguageModel,
    task: &Synthetic,
    progress: &mut dyn FnMut(f64) -> ControlFlow<()>,
) -> Result<Option<Evaluation>> {
    let (mut sum, mut predicted) = (0.0, 0u64);
    let mut accuracy = Vec::new();
    let lengths = task.lengths();
    let all: usize = lengths.iter().sum::<usize>() * task.eval_samples();
    let mut done = 0;
    for &length in &lengths {
        let (mut right, mut answers, mut first) = (0usize, 0usize, 0u64);
        let mut left = task.eval_samples();
        while left > 0 {
            // Short samples run together, long ones a few at a time.
            let count = (16 * CHUNK / length).clamp(1, 64).min(left);
            let batch = task.validation(length, first, count)?;
            let found = score(model, &batch)?;
            sum += found.loss;
            right += found.right;
            answers += batch.predicted;
            left -= count;
            first += 1;
            done += count * length;
            if progress(done as f64 / all.max(1) as f64).is_break() {
                return Ok(None);
            }
        }
        predicted += answers as u64;
        accuracy.push((length, right as f64 / answers.max(1) as f64));
    }
    Ok(Some(Evaluation { loss: sum / predicted.max(1) as f64, predicted, accuracy }))
}

struct Score {
    loss: f64,
    right: usize,
}

/// Sum of the losses and number of right answers of a batch of equally long fresh sequences, run in chunks.
fn score(model: &LanguageModel, batch: &Batch) -> Result<Score> {
    let mut score = Score { loss: 0.0, right: 0 };
    let longest = batch.sequences.iter().map(|s| s.len).max().unwrap_or(0);
    let mut state: Option<State> = None;
    let mut start = 0;
    while start < longest {
        let (mut ids, mut targets, mut parts) = (Vec::new(), Vec::new(), Vec::new());
        for sequence in &batch.sequences {
            let len = sequence.len.saturating_sub(start).min(CHUNK);
            let tokens = sequence.start + start..sequence.start + start + len;
            parts.push(Sequence {
                start: ids.len(),
                len,
                continued: start > 0,
                position: start as u64,
                ..*sequence
            });
            ids.extend_from_slice(&batch.ids[tokens.clone()]);
            targets.extend_from_slice(&batch.targets[tokens]);
        }
        let sequences = Sequences::new(parts, batch.sequences.slots())?;
        let tokens = Tensor::from_slice(&ids, [ids.len()])?;
        state = Some(no_grad(|| -> Result<State> {
            let (hidden, state) =
                model.hidden(&tokens, &sequences, state.take(), &mut Context::new())?;
            let rows: Vec<usize> =
                (0..targets.len()).filter(|&row| targets[row] != IGNORE).collect();
            if !rows.is_empty() {
                let logits = model.logits(&select_rows(&hidden, &rows)?)?.to(Device::Cpu)?;
                let view = logits.row_view::<f32>()?;
                for (i, &row) in rows.iter().enumerate() {
                    let answer = targets[row] as usize;
                    let real = &view.row(i)[..model.config().vocab_size];
                    score.loss += cross_entropy(real, answer);
                    let best = (0..real.len()).max_by(|&a, &b| real[a].total_cmp(&real[b]));
                    score.right += usize::from(best == Some(answer));
                }
            }
            Ok(state)
        })?);
        start += CHUNK;
    }
    Ok(score)
}

fn cross_entropy(logits: &[f32], target: usize) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&v| f64::from(v - largest).exp()).sum();
    sum.ln() + f64::from(largest) - logits.get(target).map_or(f64::NAN, |&v| f64::from(v))
}
