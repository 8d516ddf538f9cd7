//! Time of the scan against the length of one sequence: the slope of the logarithms is 1 if it is linear.

use std::time::Instant;

use anyhow::Result;
use elapid_ops::selective_scan::{Inputs as Scan, selective_scan};
use elapid_tensor::autograd::no_grad;
use elapid_tensor::{Sequences, Tensor};
use serde::Serialize;

use super::Bench;
use super::inputs::Inputs;
use super::sampling::median;

/// Times of the forward scan at doubling lengths.
#[derive(Debug, Serialize)]
pub struct Scaling {
    /// E.
    pub channels: usize,
    /// N.
    pub states: usize,
    /// Least-squares slope of ln(seconds) over ln(length).
    pub slope: f64,
    /// Shortest first.
    pub points: Vec<Point>,
}

/// The scan of one sequence.
#[derive(Debug, Serialize)]
pub struct Point {
    /// L.
    pub length: usize,
    /// Median time of one run in seconds.
    pub seconds: f64,
    /// A sample is the mean of this many runs, so that short ones are long enough to time.
    pub runs_per_sample: usize,
    /// Seconds.
    pub samples: Vec<f64>,
}

/// Measures.
pub fn run(bench: &Bench) -> Result<Scaling> {
    let (channels, longest) = if bench.quick { (64, 12) } else { (256, 17) };
    let lengths: Vec<usize> = (9..=longest).map(|power| 1 << power).collect();
    let states = 16;
    let mut inputs = Inputs::new();
    let tokens = 1 << longest;
    let u = inputs.uniform([tokens, channels], -1.0, 1.0)?;
    let delta = inputs.uniform([tokens, channels], -4.0, -2.0)?;
    let maps = inputs.uniform([tokens, 2 * states], -1.0, 1.0)?;
    let rates: Vec<f32> = (0..channels * states).map(|i| -((i % states) as f32 + 1.0)).collect();
    let a = Tensor::from_slice(&rates, [channels, states])?;
    let d = inputs.uniform([channels], 0.0, 1.0)?;
    let run_at = |first: usize, length: usize| -> Result<()> {
        let maps = maps.narrow(0, first, length)?;
        let scan = Scan {
            u: &u.narrow(0, first, length)?,
            delta: &delta.narrow(0, first, length)?,
            a: &a,
            b: &maps.narrow(1, 0, states)?.unsqueeze(1)?,
            c: &maps.narrow(1, states, states)?.unsqueeze(1)?,
            d: Some(&d),
            z: None,
            delta_bias: None,
            delta_softplus: true,
            state: None,
        };
        no_grad(|| selective_scan(&scan, &Sequences::uniform(1, length)))?;
        Ok(())
    };
    // Each run takes the next tokens, so that short sequences come from memory as long ones do.
    let mean = |length: usize, runs: usize| -> Result<f64> {
        let start = Instant::now();
        for run in 0..runs {
            run_at(run * length % tokens, length)?;
        }
        Ok(start.elapsed().as_secs_f64() / runs as f64)
    };

    // Every sample takes about as long as the longest run, so that other work on the machine, which comes in
    // slices of milliseconds, disturbs all lengths alike.
    mean(tokens, 1)?;
    let aim = mean(tokens, 1)?.min(0.5);
    let mut points = Vec::with_capacity(lengths.len());
    for &length in &lengths {
        mean(length, 1)?;
        let runs_per_sample = (aim / mean(length, 3)?).round().clamp(1.0, 1e4) as usize;
        points.push(Point { length, seconds: 0.0, runs_per_sample, samples: Vec::new() });
    }
    // Round after round over all lengths, so that a slow moment does not bend the line. A run outside of the
    // clock before each sample: the first output of a length is fresh memory from the system, which only the
    // longest lengths, one run a sample, would pay for.
    for _ in 0..bench.repeats.max(5) {
        for point in &mut points {
            mean(point.length, 1)?;
            point.samples.push(mean(point.length, point.runs_per_sample)?);
        }
    }
    for point in &mut points {
        point.seconds = median(&point.samples);
        eprintln!("  scan of {} tokens: {:.3} ms", point.length, point.seconds * 1e3);
    }
    let slope = slope(points.iter().map(|p| ((p.length as f64).ln(), p.seconds.ln())));
    eprintln!("  slope {slope:.3}");
    Ok(Scaling { channels, states, slope, points })
}

/// Slope of the least-squares line through the points.
pub fn slope(points: impl Iterator<Item = (f64, f64)> + Clone) -> f64 {
    let count = points.clone().count() as f64;
    let (x, y) = points.clone().fold((0.0, 0.0), |sum, p| (sum.0 + p.0, sum.1 + p.1));
    let (x, y) = (x / count, y / count);
    let (xy, xx) = points
        .fold((0.0, 0.0), |sum, p| (sum.0 + (p.0 - x) * (p.1 - y), sum.1 + (p.0 - x) * (p.0 - x)));
    xy / xx
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slope_of_a_power_is_its_exponent() {
        let points = (1..6).map(|i| (f64::from(i).ln(), (3.0 * f64::from(i).powf(1.5)).ln()));
        assert!((slope(points) - 1.5).abs() < 1e-12);
        assert!((slope([(0.0, 1.0), (1.0, 0.0), (2.0, 2.0)].into_iter()) - 0.5).abs() < 1e-12);
    }
}
