//! Synthetic tasks of the Mamba paper (arXiv 2312.00752, section 4.1): endless fresh samples, each a pure
//! function of (seed, length, step, index in the batch), with a loss on the answer only.

mod induction_heads;
mod selective_copying;

use elapid_tensor::rng;

pub use induction_heads::InductionHeads;
pub use selective_copying::SelectiveCopying;

/// Random draws of one sample.
#[derive(Debug, Clone, Copy)]
struct Draws {
    seed: u64,
    stream: u64,
    id: u64,
}

impl Draws {
    fn new(seed: u64, task: u64, length: usize, id: u64) -> Self {
        Self { seed, stream: task.wrapping_add((length as u64) << 24), id }
    }

    /// Uniform in `0..bound` for draw `place`, which must not be used twice for other purposes. The bias,
    /// at most `bound / 2^64`, is beyond measure.
    fn below(self, place: u64, bound: u64) -> u64 {
        let [a, b, ..] = rng::draw(self.seed, self.stream, self.id, place);
        let bits = u64::from(a) << 32 | u64::from(b);
        ((u128::from(bits) * u128::from(bound)) >> 64) as u64
    }
}

/// The id of sample `index` of step `step`, the same in batches of any size up to 2^24.
fn sample_id(step: u64, index: usize) -> u64 {
    step << 24 | index as u64
}
