//! AdamW over a model's parameters, in the order of the model's visit.
//!
//! Moments are f32 and keep the parameters' names, so a checkpoint's optimizer part can be read by anybody.
//! Decay is decoupled (Loshchilov and Hutter, 2019) and spares norms, biases, `A_log` and `D`.

use elapid_models::LanguageModel;
use elapid_ops::adamw::{AdamW as Update, cuda};
use elapid_tensor::{DType, Tensor};

use crate::config::OptimizerConfig;
use crate::error::{Error, Result};
use crate::trainer::GpuStep;

struct Slot {
    name: String,
    decay: bool,
    /// What the learning rate of a step is multiplied by.
    lr_factor: f64,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

/// AdamW's moments and step count.
pub struct AdamW {
    config: OptimizerConfig,
    steps: u64,
    slots: Vec<Slot>,
    pub(crate) on_gpu: Option<GpuStep>,
}

impl AdamW {
    /// Zero moments for every parameter of the model, where the model is.
    ///
    /// # Errors
    /// Those of visiting the model.
    pub fn new(config: &OptimizerConfig, model: &mut LanguageModel) -> Result<Self> {
        let mut slots = Vec::new();
        let device = model.device();
        model.visit(&mut |parameter| {
            let shape = parameter.tensor.shape();
            slots.push(Slot {
                name: parameter.name,
                decay: parameter.decay,
                lr_factor: if parameter.kind.sets_retention() {
                    config.recurrence_lr_factor
                } else {
                    1.0
                },
                exp_avg: Tensor::zeros_on(device, DType::F32, shape)?,
                exp_avg_sq: Tensor::zeros_on(device, DType::F32, shape)?,
            });
            Ok(())
        })?;
        Ok(Self { config: config.clone(), steps: 0, slots, on_gpu: None })
    }

    /// Parameter names, in the order in which [`AdamW::step`] takes gradients.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.slots.iter().map(|slot| slot.name.as_str())
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Numbers of elements of the parameters.
    pub(crate) fn lengths(&self) -> Vec<usize> {
        self.slots.iter().map(|slot| slot.exp_avg.elements()).collect()
    }

    /// The constants of the next step, but for each parameter's weight decay and factor of the learning rate.
    pub(crate) fn update(&self, lr: f64) -> Update {
        Update {
            learning_rate: lr,
            beta1: self.config.betas[0],
            beta2: self.config.betas[1],
            epsilon: self.config.eps,
            weight_decay: 0.0,
        }
    }

    /// Counts a step that a GPU has done.
    pub(crate) fn count_step(&mut self) {
        self.steps += 1;
    }

    /// One step at learning rate `lr` (times `recurrence_lr_factor` for what decides how long a state is
    /// kept); gradients (in visit order) are multiplied by `scale` first.
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
                learning_rate: lr * slot.lr_factor,
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

    /// Writes down for a GPU where parameters, gradients (in visit order) and moments are.
    ///
    /// # Errors
    /// If a parameter has no gradient or one of another shape, type or device.
    pub fn bind(
        &mut self,
        model: &mut LanguageModel,
        gradients: &[Option<Tensor>],
        step: &mut cuda::Step,
    ) -> Result<()> {
        let weight_decay = self.config.weight_decay;
        let mut tensors = Vec::with_capacity(self.slots.len());
        model.visit(&mut |parameter| {
            // Taken out, so that nobody shares the values and they are changed in place.
            let tensor = std::mem::replace(parameter.tensor, Tensor::scalar(0f32));
            tensors.push((parameter.name, tensor));
            Ok(())
        })?;
        let mut parameters = Vec::with_capacity(tensors.len());
        let mut missing = None;
        for (((name, p), slot), g) in tensors.iter_mut().zip(&mut self.slots).zip(gradients) {
            let Some(g) = g else {
                missing = Some(name.clone());
                continue;
            };
            parameters.push(cuda::Parameter {
                p,
                g,
                m: &mut slot.exp_avg,
                v: &mut slot.exp_avg_sq,
                weight_decay: if slot.decay { weight_decay } else { 0.0 },
                rate: slot.lr_factor,
            });
        }
        let bound = match missing {
            None => step.bind(&mut parameters).map_err(Error::from),
            Some(name) => {
                Err(elapid_tensor::Error::argument("adamw", format!("{name} has no gradient"))
                    .into())
            }
        };
        let mut tensors = tensors.into_iter();
        model.visit(&mut |parameter| {
            if let Some((_, tensor)) = tensors.next() {
                *parameter.tensor = tensor;
            }
            Ok(())
        })?;
        bound
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
                *moment = found.to(moment.device())?;
            }
        }
        self.steps = steps;
        Ok(())
    }
}
