//! One figure: the median time of a piece of work, beside the limits that bound it.
//!
//! A round takes one sample of every limit that matters and then one of the work, so that both see the same
//! machine. The limit of memory reads far more than the caches hold; the work therefore starts with nothing
//! in cache, as it does in a model whose layers do not fit there together. The first runs, which get their
//! memory from the system, are thrown away.

use std::time::Instant;

use anyhow::Result;
use serde::Serialize;

use super::limits::{Limit, Meter};

/// What must be done at least, whoever does it.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Work {
    /// Bytes read or written, each once.
    pub bytes: f64,
    /// Multiplications and additions of matrix products.
    pub flops: f64,
    /// Scan state updates.
    pub updates: f64,
}

impl Work {
    fn of(&self, limit: Limit) -> f64 {
        match limit {
            Limit::MemoryRead => self.bytes,
            Limit::MatrixF32 => self.flops,
            Limit::StateUpdates => self.updates,
        }
    }
}

/// What is measured.
#[derive(Debug, Clone)]
pub struct Task {
    /// Name, unique in a report.
    pub name: &'static str,
    /// Sizes.
    pub shape: String,
    /// Tokens of one run.
    pub tokens: usize,
    /// Least work of one run.
    pub work: Work,
    /// How that work is counted.
    pub counted: String,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Figure {
    /// Name of the task.
    pub name: &'static str,
    /// Sizes.
    pub shape: String,
    /// Median time of one run in seconds.
    pub seconds: f64,
    /// Tokens of one run over its median time.
    pub tokens_per_second: f64,
    /// The resource that would take longest.
    pub bound_by: Limit,
    /// Use of that resource, a second.
    pub rate: f64,
    /// Most of it that the machine gave, a second: the median of the samples taken between the runs.
    pub limit: f64,
    /// `rate / limit`.
    pub share: f64,
    /// Least time of the whole work over the median time. Products and state updates use the same units of
    /// the processor, so their times add up; memory works beside them.
    pub share_of_floor: f64,
    /// Least work of one run.
    pub work: Work,
    /// How that work is counted.
    pub counted: String,
    /// Most memory of the process during one run by itself, the weights included, where it was taken and the system tells
    /// it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process_peak_bytes: Option<u64>,
    /// Times of all runs in seconds.
    pub samples: Vec<f64>,
    /// All samples of the limits.
    pub limit_samples: Vec<(Limit, Vec<f64>)>,
}

/// The middle of the values, or the mean of the two in the middle; NaN of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[half],
        _ => (sorted[half - 1] + sorted[half]) / 2.0,
    }
}

/// Times `run` on what `prepare` made, `repeats` times. Neither preparing nor dropping the result is timed.
pub fn measure<P, R>(
    meter: &mut Meter,
    repeats: usize,
    task: Task,
    mut prepare: impl FnMut() -> Result<P>,
    mut run: impl FnMut(P) -> Result<R>,
) -> Result<Figure> {
    for _ in 0..2 {
        run(prepare()?)?;
    }
    let mut limit_samples: Vec<(Limit, Vec<f64>)> = Limit::ALL
        .into_iter()
        .filter(|&limit| task.work.of(limit) > 0.0)
        .map(|limit| (limit, Vec::with_capacity(repeats)))
        .collect();
    let mut samples = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        let prepared = prepare()?;
        for (limit, samples) in &mut limit_samples {
            samples.push(meter.sample(*limit));
        }
        let start = Instant::now();
        let result = run(prepared)?;
        samples.push(start.elapsed().as_secs_f64());
        drop(result);
    }
    Ok(figure(task, samples, limit_samples))
}

fn figure(task: Task, samples: Vec<f64>, limit_samples: Vec<(Limit, Vec<f64>)>) -> Figure {
    let seconds = median(&samples);
    let least = |limit: Limit| {
        let rates = limit_samples.iter().find(|(own, _)| *own == limit);
        rates.map_or(0.0, |(_, rates)| task.work.of(limit) / median(rates))
    };
    let bound_by = Limit::ALL
        .into_iter()
        .max_by(|&a, &b| least(a).total_cmp(&least(b)))
        .unwrap_or(Limit::MemoryRead);
    let floor = least(Limit::MemoryRead).max(least(Limit::MatrixF32) + least(Limit::StateUpdates));
    let amount = task.work.of(bound_by);
    Figure {
        name: task.name,
        shape: task.shape,
        seconds,
        tokens_per_second: task.tokens as f64 / seconds,
        bound_by,
        rate: amount / seconds,
        limit: amount / least(bound_by),
        share: least(bound_by) / seconds,
        share_of_floor: floor / seconds,
        work: task.work,
        counted: task.counted,
        process_peak_bytes: None,
        samples,
        limit_samples,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert!(median(&[]).is_nan());
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn the_slowest_resource_bounds_and_arithmetic_adds_up() {
        let task = Task {
            name: "task",
            shape: String::new(),
            tokens: 10,
            work: Work { bytes: 100.0, flops: 300.0, updates: 20.0 },
            counted: String::new(),
        };
        let limits = vec![
            (Limit::MemoryRead, vec![100.0]),
            (Limit::MatrixF32, vec![100.0, 100.0, 1.0]),
            (Limit::StateUpdates, vec![20.0]),
        ];
        let figure = figure(task, vec![5.0, 8.0, 10.0], limits);
        assert_eq!((figure.seconds, figure.tokens_per_second), (8.0, 1.25));
        assert_eq!(figure.bound_by, Limit::MatrixF32);
        assert_eq!((figure.rate, figure.limit), (37.5, 100.0));
        assert_eq!((figure.share, figure.share_of_floor), (0.375, 0.5));
    }
}
