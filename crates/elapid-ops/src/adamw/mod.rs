//! The AdamW update over slices, and the global norm of gradients for clipping.
//!
//! Everything of a step happens in one pass: gradient scale, decoupled weight decay, both moments with bias
//! correction, the update. Optimizers in `elapid-train` call it parameter by parameter; there is no graph here.

mod cpu;
pub mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_cuda;

use elapid_tensor::{Error, Result};

/// The constants of AdamW, with PyTorch's meaning.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Step size of this step (schedules change it from step to step).
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the corrected second moment.
    pub epsilon: f64,
    /// The parameter shrinks by `learning_rate * weight_decay` of itself, apart from the gradient.
    pub weight_decay: f64,
}

impl Default for AdamW {
    /// PyTorch's defaults.
    fn default() -> Self {
        Self { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 1e-2 }
    }
}

impl AdamW {
    /// Updates parameters `p` and moments `m`, `v` in place from the gradient `grad_scale g`:
    ///
    /// ```text
    /// p = p - lr weight_decay p
    /// m = beta1 m + (1 - beta1) g
    /// v = beta2 v + (1 - beta2) g²
    /// p = p - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + epsilon)
    /// ```
    ///
    /// `step` counts from 1 (Loshchilov and Hutter, ICLR 2019, algorithm 2; the decay is scaled by the learning
    /// rate as in PyTorch). `grad_scale` is 1, or the factor that clips the norm.
    ///
    /// # Errors
    /// If the slices differ in length or `step` is 0.
    pub fn step(
        &self,
        p: &mut [f32],
        g: &[f32],
        m: &mut [f32],
        v: &mut [f32],
        step: u64,
        grad_scale: f32,
    ) -> Result<()> {
        const OP: &str = "adamw";
        for (name, len) in [("g", g.len()), ("m", m.len()), ("v", v.len())] {
            if len != p.len() {
                return Err(Error::argument(
                    OP,
                    format!("{name} has {len} elements, expected {} as p", p.len()),
                ));
            }
        }
        if step == 0 {
            return Err(Error::argument(OP, "step is 0, expected 1 or more"));
        }
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        let factors = cpu::Factors {
            keep: (1.0 - self.learning_rate * self.weight_decay) as f32,
            beta1: self.beta1 as f32,
            rest1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            rest2: (1.0 - self.beta2) as f32,
            step_size: (self.learning_rate / correction(self.beta1)) as f32,
            root_factor: (1.0 / correction(self.beta2).sqrt()) as f32,
            epsilon: self.epsilon as f32,
            grad_scale,
        };
        cpu::step(factors, p, g, m, v);
        Ok(())
    }
}

/// The Euclidean norm of all gradients together, in f64 and in an order that depends on nothing but their
/// lengths. It is inf or NaN exactly if an element is: a caller that clips must look before it scales.
pub fn global_norm(grads: &[&[f32]]) -> f64 {
    grads.iter().map(|grad| cpu::sum_of_squares(grad)).sum::<f64>().sqrt()
}
