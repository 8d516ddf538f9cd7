//! One figure: the median time of a piece of work by the card's own clock, beside the limit that bounds it.
//!
//! A sample is the mean of several runs in a row where a run is short, so that launches queue up and the host's time to
//! make one does not count. The first runs, which compile kernels and take memory from the driver, are thrown away.

use anyhow::Result;
use elapid_tensor::cuda::Gpu;
use serde::Serialize;

use super::limits::{Limit, Limits};
use crate::bench::sampling::median;

/// Milliseconds that a sample takes at least.
const SAMPLE: f64 = 2.0;
/// Most runs of a sample.
const MOST_RUNS: f64 = 64.0;

/// Samples of a piece of work.
#[derive(Debug)]
pub struct Times {
    /// Seconds of one run.
    pub samples: Vec<f64>,
    /// Runs that each sample is the mean of.
    pub runs_per_sample: usize,
}

/// Times `run`, which is given the number of the call, between two events; tiny work (`quick`) once a sample.
pub fn time(
    gpu: &Gpu,
    repeats: usize,
    quick: bool,
    mut run: impl FnMut(usize) -> Result<()>,
) -> Result<Times> {
    let mut call = 0;
    let mut several = |runs: usize| -> Result<f64> {
        let begin = gpu.event()?;
        for _ in 0..runs {
            run(call)?;
            call += 1;
        }
        Ok(gpu.event()?.since(&begin)? / runs as f64)
    };
    let mut runs_per_sample = 1;
    if quick {
        several(1)?;
    } else {
        several(3)?;
        runs_per_sample = (SAMPLE / several(3)?.max(1e-6)).ceil().clamp(1.0, MOST_RUNS) as usize;
    }
    let samples: Result<Vec<f64>> =
        (0..repeats).map(|_| Ok(several(runs_per_sample)? / 1e3)).collect();
    Ok(Times { samples: samples?, runs_per_sample })
}

/// What must be done at least, whoever does it.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Work {
    /// Bytes read or written, each once.
    pub bytes: f64,
    /// Multiplications and additions of bf16 products.
    pub bf16_flops: f64,
    /// Multiplications and additions of f32 products.
    pub f32_flops: f64,
    /// State updates of forward scans.
    pub forward_updates: f64,
    /// State updates of backward scans.
    pub backward_updates: f64,
}

impl Work {
    /// Bytes alone.
    pub fn bytes(bytes: f64) -> Self {
        Self { bytes, ..Self::default() }
    }

    /// Products alone.
    pub fn flops(limit: Limit, flops: f64) -> Self {
        match limit {
            Limit::MatrixBf16 => Self { bf16_flops: flops, ..Self::default() },
            _ => Self { f32_flops: flops, ..Self::default() },
        }
    }

    fn of(&self, limit: Limit) -> f64 {
        match limit {
            Limit::Copy => self.bytes,
            Limit::MatrixBf16 => self.bf16_flops,
            Limit::MatrixF32 => self.f32_flops,
            Limit::Exp2 => 0.0,
            Limit::ForwardUpdates => self.forward_updates,
            Limit::BackwardUpdates => self.backward_updates,
        }
    }

    /// The resource that takes longest, and how much of it is needed.
    fn bound(&self, rate: impl Fn(Limit) -> f64) -> (Limit, f64) {
        let seconds = |limit: Limit| match self.of(limit) {
            0.0 => 0.0,
            amount => amount / rate(limit),
        };
        let slowest = Limit::ALL.into_iter().max_by(|&a, &b| seconds(a).total_cmp(&seconds(b)));
        let limit = slowest.unwrap_or(Limit::Copy);
        (limit, self.of(limit))
    }
}

/// What is measured.
#[derive(Debug, Clone)]
pub struct Task {
    /// Name; with the sizes unique in a report.
    pub name: &'static str,
    /// Sizes.
    pub shape: String,
    /// Tokens of one run; none if it has none.
    pub tokens: Option<usize>,
    /// Least work of one run.
    pub work: Work,
    /// How that work is counted.
    pub counted: &'static str,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Figure {
    /// Name of the task.
    pub name: &'static str,
    /// Sizes.
    pub shape: String,
    /// Tokens of the prompt that was read, or after which tokens were made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tokens: Option<usize>,
    /// Most bytes of the card that buffers in use held at once, the weights included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<usize>,
    /// Median time of one run in seconds.
    pub seconds: f64,
    /// Tokens of one run over its median time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// The resource that would take longest.
    pub bound_by: Limit,
    /// Use of that resource, a second.
    pub rate: f64,
    /// Most of it that the card gives, a second.
    pub limit: f64,
    /// `rate / limit`.
    pub share: f64,
    /// Least work of one run.
    pub work: Work,
    /// How that work is counted.
    pub counted: &'static str,
    /// Runs that each sample is the mean of.
    pub runs_per_sample: usize,
    /// Seconds of one run.
    pub samples: Vec<f64>,
}

impl Figure {
    /// A task's times beside its limit.
    pub fn new(task: Task, times: Times, limits: &Limits) -> Self {
        let seconds = median(&times.samples);
        let (bound_by, amount) = task.work.bound(|limit| limits.rate(limit));
        let limit = limits.rate(bound_by);
        Self {
            name: task.name,
            shape: task.shape,
            prompt_tokens: None,
            peak_bytes: None,
            seconds,
            tokens_per_second: task.tokens.map(|tokens| tokens as f64 / seconds),
            bound_by,
            rate: amount / seconds,
            limit,
            share: amount / limit / seconds,
            work: task.work,
            counted: task.counted,
            runs_per_sample: times.runs_per_sample,
            samples: times.samples,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_resource_that_takes_longest_bounds() {
        let work = Work { bytes: 10.0, bf16_flops: 300.0, forward_updates: 8.0, ..Work::default() };
        let rate = |limit| match limit {
            Limit::Copy => 5.0,
            Limit::MatrixBf16 => 100.0,
            Limit::ForwardUpdates => 2.0,
            _ => f64::NAN,
        };
        assert_eq!(work.bound(rate), (Limit::ForwardUpdates, 8.0));
        assert_eq!(Work::bytes(3.0).bound(rate), (Limit::Copy, 3.0));
    }
}
