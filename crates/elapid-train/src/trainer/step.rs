//! One optimizer step: forward and backward over the accumulated batches, clipping, AdamW.

use elapid_data::Batch;
use elapid_models::{Context, LanguageModel, State};
use elapid_ops::adamw::global_norm;
use elapid_tensor::autograd::{accumulate, backward};
use elapid_tensor::{Device, Tensor};

use crate::config::OptimizerConfig;
use crate::diagnose::first_bad_tensor;
use crate::error::{Error, Result};
use crate::optimizer::AdamW;
use crate::trainer::on_gpu;

/// What one step saw.
#[derive(Debug, Clone, Copy)]
pub struct StepReport {
    /// Mean cross-entropy over the predicted tokens, in nats.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Real tokens of the step.
    pub tokens: usize,
    /// Predicted tokens of the step.
    pub predicted: usize,
}

/// Watches the gradient norm: its running average tells an explosion from a hard batch.
#[derive(Debug, Clone, Copy, Default)]
pub struct NormWatch {
    /// Exponential average of the norms so far, with decay 0.98.
    pub average: f64,
    /// Norms seen.
    pub seen: u64,
}

impl NormWatch {
    const DECAY: f64 = 0.98;
    /// Norms that must have been seen before any is called an explosion.
    const WARM: u64 = 20;

    /// What is usual: the average, but not less than what clipping leaves alone. A task that is solved has
    /// gradients near zero, and one sample that it still gets wrong is no explosion.
    fn usual(&self, clip_norm: f64) -> f64 {
        self.average.max(clip_norm)
    }

    /// The norm above which a step is an explosion; none while it is too early to tell.
    pub(super) fn limit(&self, config: &OptimizerConfig) -> Option<f64> {
        let factor = config.max_grad_norm_factor;
        (factor > 0.0 && self.seen >= Self::WARM).then(|| factor * self.usual(config.clip_norm))
    }

    fn exploded(&self, norm: f64, config: &OptimizerConfig) -> bool {
        self.limit(config).is_some_and(|limit| norm > limit)
    }

    pub(super) fn observe(&mut self, norm: f64) {
        self.seen += 1;
        // The plain mean until the exponential one has enough to stand on.
        let weight = (1.0 - Self::DECAY).max(1.0 / self.seen as f64);
        self.average += weight * (norm - self.average);
    }
}

/// Forward and backward over `batches` (their gradients add up to those of the mean loss over all their
/// predicted tokens), clipping, and one AdamW step at `lr`. With `carried`, the state after each batch
/// (without gradient) is where the next one's continued sequences go on.
///
/// # Errors
/// [`Error::Diverged`] if the loss or the gradient norm is not finite or the norm explodes, with the first
/// bad tensor's name; the model and the optimizer are then as before the step.
pub fn train_step(
    model: &mut LanguageModel,
    optimizer: &mut AdamW,
    config: &OptimizerConfig,
    watch: &mut NormWatch,
    batches: &[Batch],
    mut carried: Option<&mut Option<State>>,
    lr: f64,
) -> Result<StepReport> {
    if model.device() != Device::Cpu {
        return on_gpu::train_step(model, optimizer, config, watch, batches, carried, lr);
    }
    let predicted: usize = batches.iter().map(|batch| batch.predicted).sum();
    let mut report = StepReport { loss: 0.0, grad_norm: 0.0, tokens: 0, predicted };
    let mut gradients: Vec<Option<Tensor>> = Vec::new();
    let mut before = None;
    for batch in batches {
        before = carried.as_ref().and_then(|state| (**state).clone());
        let mut parameters = Vec::new();
        model.visit(&mut |parameter| {
            parameters.push(parameter.tensor.clone());
            Ok(())
        })?;
        let ids = Tensor::from_slice(&batch.ids, [batch.ids.len()])?;
        let (loss, state) = model.loss(
            &ids,
            &batch.targets,
            &batch.sequences,
            before.clone(),
            &mut Context::new(),
        )?;
        if let Some(carried) = &mut carried {
            **carried = Some(state.detach());
        }
        drop(state);
        let share = batch.predicted as f64 / predicted.max(1) as f64;
        report.loss += f64::from(loss.item::<f32>()?) * share;
        report.tokens += batch.real_tokens;
        let found = backward(
            &[(&loss, Some(Tensor::scalar(share as f32)))],
            &parameters.iter().collect::<Vec<_>>(),
        )?;
        drop(parameters);
        drop(loss);
        if gradients.is_empty() {
            gradients = found;
        } else {
            for (sum, term) in gradients.iter_mut().zip(found) {
                match (sum, term) {
                    (Some(sum), Some(term)) => accumulate(sum, &term)?,
                    (sum, term) => *sum = sum.take().or(term),
                }
            }
        }
        if !report.loss.is_finite() {
            let bad = first_bad_tensor(model, batch, before, &gradients)?;
            return Err(diverged(
                optimizer.steps() + 1,
                format!("the loss is {}", report.loss),
                bad,
            ));
        }
    }
    report.grad_norm = {
        let whole: Vec<Tensor> = gradients
            .iter()
            .flatten()
            .map(Tensor::contiguous)
            .collect::<elapid_tensor::Result<_>>()?;
        let slices = whole.iter().map(|gradient| gradient.data::<f32>());
        global_norm(&slices.collect::<elapid_tensor::Result<Vec<_>>>()?)
    };
    let norm = report.grad_norm;
    let step = optimizer.steps() + 1;
    if !norm.is_finite() {
        let bad = match batches.last() {
            Some(batch) => first_bad_tensor(model, batch, before, &gradients)?,
            None => None,
        };
        return Err(diverged(step, format!("the gradient norm is {norm}"), bad));
    }
    if watch.exploded(norm, config) {
        return Err(exploded(step, norm, watch, config, largest(optimizer, &gradients)));
    }
    watch.observe(norm);
    let scale = if config.clip_norm > 0.0 && norm > config.clip_norm {
        config.clip_norm / norm
    } else {
        1.0
    };
    optimizer.step(model, &gradients, lr, scale)?;
    Ok(report)
}

/// [`Error::Diverged`] for a norm far above what is usual.
pub(super) fn exploded(
    step: u64,
    norm: f64,
    watch: &NormWatch,
    config: &OptimizerConfig,
    largest: Option<String>,
) -> Error {
    let (factor, usual) = (config.max_grad_norm_factor, watch.usual(config.clip_norm));
    let what = format!(
        "the gradient norm {norm:.3e} is over {factor} times the usual {usual:.3e} (its average, or clip_norm)"
    );
    diverged(step, what, largest)
}

/// [`Error::Diverged`]; the checkpoint is named by who knows it.
pub(super) fn diverged(step: u64, what: String, first_bad: Option<String>) -> Error {
    Error::Diverged {
        step,
        what,
        first_bad: first_bad.unwrap_or_else(|| "none found".into()),
        last_good: None,
    }
}

/// The gradient with the largest norm, for an explosion in which all is finite.
pub(super) fn largest(optimizer: &AdamW, gradients: &[Option<Tensor>]) -> Option<String> {
    let norms = optimizer.names().zip(gradients).filter_map(|(name, gradient)| {
        let values = gradient.as_ref()?.to_vec::<f32>().ok()?;
        let norm = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt();
        Some((name, norm))
    });
    norms
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .map(|(name, norm)| format!("gradient of {name} (norm {norm:.3e})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_sample_after_many_right_ones_is_no_explosion() {
        let mut watch = NormWatch::default();
        (0..1000).for_each(|_| watch.observe(1e-5));
        let config = OptimizerConfig::default();
        assert!(!watch.exploded(900.0, &config));
        assert!(watch.exploded(1100.0, &config));
        // Nothing bounds a step without clipping, so the average alone counts.
        let unclipped = OptimizerConfig { clip_norm: 0.0, ..config };
        assert!(watch.exploded(0.1, &unclipped));
        assert!(!watch.exploded(0.001, &unclipped));
    }
}
