//! AdamW over a model's parameters, in the order of the model's visit.
//!
//! Moments are f32 and keep the parameters' names, so a checkpoint's optimizer part can be read by anybody.
//! Decay is decoupled (Loshchilov and Hutter, 2019) and spares norms, biases, `A_log` and `D`.

use elapid_models::LanguageModel;
use elapid_ops::adamw::AdamW as Update;
use elapid_tensor::Tensor;

use crate::config::OptimizerConfig;
use crate::error::{Error, Result};

struct Slot {
    name: String,
    decay: bool,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

/// AdamW's moments and step count.
pub struct AdamW {
    config: OptimizerConfig,
    steps: u64,
    slots: Vec<Slot>,
}

impl AdamW {
    /// Zero moments for every parameter of the model.
    ///
    /// # Errors
    /// Those of visiting the model.
    pub fn new(config: &OptimizerConfig, model: &mut LanguageModel) -> Result<Self> {
        let mut slots = Vec::new();
        model.visit(&mut |parameter| {
            let shape = parameter.tensor.shape();
            slots.push(Slot {
                name: parameter.name,
                decay: parameter.decay,
                exp_avg: Tensor::zeros::<f32>(shape),
                exp_avg_sq: Tensor::zeros::<f32>(shape),
            });
            Ok(())
        })?;
        Ok(Self { config: config.clone(), steps: 0, slots })
    }

    /// Parameter names, in the order in which [`AdamW::step`] takes gradients.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.slots.iter().map(|slot| slot.name.as_str())
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// One step at learning rate `lr`; gradients (in visit order) are multiplied by `scale` first.
    /// A parameter without a gradient is left alone.
    ///
    /// # Errors
    /// If a gradient has another shape or type than its parameter.
    pub fn step(
        &mut self,
        model: &mut LanguageModel,
        gradients: &[Option<Tensor>],
        lr: f64,
        scale: f64,
    ) -> Result<()> {
        self.steps += 1;
        let (config, steps, slots) = (&self.config, self.steps, &mut self.slots);
        let mut pairs = slots.iter_mut().zip(gradients);
        model.visit(&mut |parameter| {
            let Some((slot, Some(gradient))) = pairs.next() else { return Ok(()) };
            gradient.expect_shape("adamw", &parameter.name, &parameter.tensor.shape())?;
            let update = Update {
                learning_rate: lr,
                beta1: config.betas[0],
                beta2: config.betas[1],
                epsilon: config.eps,
                weight_decay: if slot.decay { config.weight_decay } else { 0.0 },
            };
            update.step(
                parameter.tensor.data_mut::<f32>()?,
                gradient.contiguous()?.data::<f32>()?,
                slot.exp_avg.data_mut::<f32>()?,
                slot.exp_avg_sq.data_mut::<f32>()?,
                steps,
                scale as f32,
            )?;
            Ok(())
        })?;
        Ok(())
    }

    /// The moments under `exp_avg.{parameter}` and `exp_avg_sq.{parameter}`, as PyTorch calls them.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        self.slots
            .iter()
            .flat_map(|slot| {
                [
                    (format!("exp_avg.{}", slot.name), slot.exp_avg.clone()),
                    (format!("exp_avg_sq.{}", slot.name), slot.exp_avg_sq.clone()),
                ]
            })
            .collect()
    }

    /// Takes over moments that [`AdamW::tensors`] gave, and the number of steps.
    ///
    /// # Errors
    /// If a moment is missing or has another shape.
    pub fn restore(
        &mut self,
        steps: u64,
        take: &mut dyn FnMut(&str) -> Option<Tensor>,
    ) -> Result<()> {
        for slot in &mut self.slots {
            for (kind, moment) in
                [("exp_avg", &mut slot.exp_avg), ("exp_avg_sq", &mut slot.exp_avg_sq)]
            {
                let name = format!("{kind}.{}", slot.name);
                let found = take(&name).ok_or_else(|| Error::Checkpoint {
                    message: format!("the optimizer's tensor `{name}` is missing"),
                })?;
                found.expect_shape("optimizer", &name, &moment.shape())?;
                *moment = found;
            }
        }
        self.steps = steps;
        Ok(())
    }
}
