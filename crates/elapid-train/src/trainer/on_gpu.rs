//! A training step on a GPU.
//!
//! What changes from step to step lies in buffers that are written before each step; the host waits once, for the loss
//! and the gradient norm. When a batch is cut like the one before it, all launches of a step are recorded and from then
//! on carried out as one graph. The optimizer's kernel itself leaves everything as it was if the norm is not finite or
//! explodes.

use std::sync::Arc;

use elapid_data::Batch;
use elapid_models::{Context, LanguageModel, State};
use elapid_ops::adamw::cuda::{Numbers, Step};
use elapid_ops::embedding::cuda::TokenIds;
use elapid_ops::linear_cross_entropy::{Reduction, Targets};
use elapid_tensor::autograd::{accumulate, backward};
use elapid_tensor::cuda::{Gpu, Graph};
use elapid_tensor::{Device, Sequences, Tensor};

use super::step::{NormWatch, StepReport, diverged, exploded, largest};
use crate::config::OptimizerConfig;
use crate::diagnose::first_bad_tensor;
use crate::error::Result;
use crate::optimizer::AdamW;

/// What a training step keeps in the memory of a GPU.
pub(crate) struct GpuStep {
    gpu: Gpu,
    update: Step,
    inputs: Vec<Input>,
    recorded: Option<Recorded>,
}

/// One batch of a step.
struct Input {
    ids: Arc<TokenIds>,
    targets: Arc<Targets>,
    sequences: Sequences,
}

/// Launches of a whole step, and where its results are.
struct Recorded {
    graph: Graph,
    work: Work,
}

/// Results of forward and backward.
struct Work {
    losses: Vec<Tensor>,
    gradients: Vec<Option<Tensor>>,
}

/// How the parameters are changed by the gradients.
struct Change<'a> {
    config: &'a OptimizerConfig,
    watch: &'a mut NormWatch,
    lr: f64,
}

/// [`super::train_step`] on a GPU.
pub(super) fn train_step(
    model: &mut LanguageModel,
    optimizer: &mut AdamW,
    config: &OptimizerConfig,
    watch: &mut NormWatch,
    batches: &[Batch],
    carried: Option<&mut Option<State>>,
    lr: f64,
) -> Result<StepReport> {
    let mut step = match optimizer.on_gpu.take() {
        Some(step) if Device::Cuda(step.gpu.id()) == model.device() => step,
        _ => GpuStep::new(model, optimizer)?,
    };
    let result = step.run(model, optimizer, Change { config, watch, lr }, batches, carried);
    if result.is_err() {
        // What was recorded may be of no use for whatever comes next.
        step.recorded = None;
    }
    optimizer.on_gpu = Some(step);
    result
}

impl GpuStep {
    fn new(model: &LanguageModel, optimizer: &AdamW) -> Result<Self> {
        let gpu = model.device().gpu()?.ok_or_else(|| {
            elapid_tensor::Error::argument("train_step", "the model is on cpu, expected a GPU")
        })?;
        let update = Step::new(&gpu, &optimizer.lengths())?;
        Ok(Self { gpu, update, inputs: Vec::new(), recorded: None })
    }

    fn run(
        &mut self,
        model: &mut LanguageModel,
        optimizer: &mut AdamW,
        change: Change<'_>,
        batches: &[Batch],
        mut carried: Option<&mut Option<State>>,
    ) -> Result<StepReport> {
        let Change { config, watch, lr } = change;
        let predicted: usize = batches.iter().map(|batch| batch.predicted).sum();
        let tokens = batches.iter().map(|batch| batch.real_tokens).sum();
        let before = carried.as_ref().and_then(|state| (**state).clone());
        let again = self.write_inputs(model, batches, predicted)?;
        let step = optimizer.steps() + 1;
        self.update.configure(&Numbers {
            update: optimizer.update(lr),
            step,
            clip_norm: config.clip_norm,
            limit: watch.limit(config).unwrap_or(0.0),
        })?;

        // A carried state is in other memory every time.
        if !again || carried.is_some() || self.gpu.is_profiling() {
            self.recorded = None;
        } else if self.recorded.is_none() {
            // What the first step left waiting would stand beside the graph's own memory.
            self.gpu.trim()?;
            let (inputs, update) = (&self.inputs, &self.update);
            let (work, graph) = self.gpu.record(|| -> Result<Work> {
                let work = forward_and_backward(model, inputs, &mut None)?;
                // SAFETY: nothing is carried out before the launch below.
                unsafe { update.launch()? };
                Ok(work)
            })?;
            optimizer.bind(model, &work.gradients, &mut self.update)?;
            self.recorded = Some(Recorded { graph, work });
        }
        let eager;
        let work = match &self.recorded {
            Some(recorded) => {
                // SAFETY: the inputs, the bound parameters and moments are where they were when this was recorded:
                // the model and the optimizer own them, and change them nowhere else.
                unsafe { recorded.graph.launch()? };
                &recorded.work
            }
            None => {
                eager = forward_and_backward(model, &self.inputs, &mut carried)?;
                optimizer.bind(model, &eager.gradients, &mut self.update)?;
                // SAFETY: the tensors were bound just now.
                unsafe { self.update.launch()? };
                &eager
            }
        };

        let outcome = self.update.outcome()?;
        let mut loss = 0.0;
        for part in &work.losses {
            loss += f64::from(part.item::<f32>()?);
        }
        let norm = outcome.norm;
        if !loss.is_finite() || !norm.is_finite() {
            let what = match loss.is_finite() {
                true => format!("the gradient norm is {norm}"),
                false => format!("the loss is {loss}"),
            };
            let bad = match batches.last() {
                Some(batch) => first_bad_tensor(model, batch, before, &work.gradients)?,
                None => None,
            };
            return Err(diverged(step, what, bad));
        }
        if !outcome.taken {
            let largest = largest(optimizer, &work.gradients);
            return Err(exploded(step, norm, watch, config, largest));
        }
        watch.observe(norm);
        optimizer.count_step();
        Ok(StepReport { loss, grad_norm: norm, tokens, predicted })
    }

    /// Puts the batches where the step reads them; true if they are cut like those before, so that recorded launches
    /// are right for them.
    fn write_inputs(
        &mut self,
        model: &LanguageModel,
        batches: &[Batch],
        predicted: usize,
    ) -> Result<bool> {
        let (classes, real) = (model.config().padded_vocab_size(), model.config().vocab_size);
        let kind =
            |batch: &Batch| (Reduction::Mean, batch.predicted as f64 / predicted.max(1) as f64);
        let alike = self.inputs.len() == batches.len()
            && self.inputs.iter().zip(batches).all(|(input, batch)| {
                input.ids.len() == batch.ids.len()
                    && input.ids.classes() == classes
                    && input.sequences.same_layout(&batch.sequences)
            });
        if alike {
            for (input, batch) in self.inputs.iter_mut().zip(batches) {
                let (Some(ids), Some(targets)) =
                    (Arc::get_mut(&mut input.ids), Arc::get_mut(&mut input.targets))
                else {
                    return Err(
                        elapid_tensor::Error::Graph("a step is still going on".into()).into()
                    );
                };
                ids.write(&batch.ids)?;
                targets.write(&batch.targets, kind(batch))?;
            }
            return Ok(true);
        }
        self.recorded = None;
        self.inputs.clear();
        for batch in batches {
            let ids = TokenIds::upload(&self.gpu, &batch.ids, classes);
            let targets = Targets::upload(&self.gpu, &batch.targets, real, kind(batch))?;
            self.inputs.push(Input {
                ids: Arc::new(ids?),
                targets: Arc::new(targets),
                sequences: batch.sequences.clone(),
            });
        }
        Ok(false)
    }
}

/// Each batch's share of the loss, and the gradients of their sum.
fn forward_and_backward(
    model: &mut LanguageModel,
    inputs: &[Input],
    carried: &mut Option<&mut Option<State>>,
) -> Result<Work> {
    let mut parameters = Vec::new();
    model.visit(&mut |parameter| {
        parameters.push(parameter.tensor.clone());
        Ok(())
    })?;
    let parameters: Vec<&Tensor> = parameters.iter().collect();
    let mut work = Work { losses: Vec::new(), gradients: Vec::new() };
    for input in inputs {
        let state = carried.as_ref().and_then(|state| (**state).clone());
        let (loss, state) = model.loss_prepared(
            &input.ids,
            &input.targets,
            &input.sequences,
            state,
            &mut Context::new(),
        )?;
        if let Some(carried) = carried {
            **carried = Some(state.detach());
        }
        drop(state);
        work.losses.push(loss.detach());
        // The shares are in the targets' scale.
        let found = backward(&[(&loss, Some(Tensor::scalar(1f32)))], &parameters)?;
        if work.gradients.is_empty() {
            work.gradients = found;
            continue;
        }
        for (sum, term) in work.gradients.iter_mut().zip(found) {
            match (sum, term) {
                (Some(sum), Some(term)) => accumulate(sum, &term)?,
                (sum, term) => *sum = sum.take().or(term),
            }
        }
    }
    Ok(work)
}
