//! Made-up tensors. Their values do not matter as long as nothing overflows or becomes subnormal, so large
//! ones repeat a short random run.

use anyhow::Result;
use elapid_tensor::rng::Rng;
use elapid_tensor::{Buffer, Shape, Tensor};

/// Length of the run of random values: a prime, so that rows do not repeat.
const RUN: usize = 65_521;

/// Source of the tensors of one run of the program.
pub struct Inputs(Rng);

impl Inputs {
    /// The same values every time.
    pub fn new() -> Self {
        Self(Rng::new(0, 0))
    }

    /// Values between `low` and `high`.
    pub fn uniform(&mut self, shape: impl Into<Shape>, low: f64, high: f64) -> Result<Tensor> {
        let shape = shape.into();
        let elements = shape.iter().product();
        let run: Vec<f32> = (0..RUN.min(elements))
            .map(|_| (low + (high - low) * self.0.uniform()) as f32)
            .collect();
        let mut values = Buffer::<f32>::scratch(elements);
        for part in values.chunks_mut(RUN) {
            part.copy_from_slice(&run[..part.len()]);
        }
        Ok(Tensor::from_buffer(values, shape)?)
    }

    /// Token ids below `vocabulary`.
    pub fn tokens(&mut self, count: usize, vocabulary: usize) -> Vec<u32> {
        (0..count).map(|_| self.0.below(vocabulary as u64) as u32).collect()
    }
}
