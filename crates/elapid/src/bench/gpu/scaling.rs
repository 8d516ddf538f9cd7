//! Time of the scan against length, forward and backward: of one sequence, whose time should grow as its length once it
//! fills the card, and of a batch that always has as many tokens, whose time should not depend on their division.

use std::ops::RangeInclusive;

use anyhow::Result;
use elapid_ops::selective_scan::cuda::{self as scan, Cut, Plan};
use elapid_tensor::Sequences;
use serde::Serialize;

use super::Bench;
use super::kernels::{STATES, ScanInputs};
use super::sampling::Times;
use crate::bench::sampling::median;
use crate::bench::scaling::slope;

/// Most runs of tokens that calls of one length rotate over.
const SETS: usize = 3;
/// Points whose slope is told by itself: there a sequence fills the card.
const LONGEST: usize = 5;

/// Times at doubling lengths.
#[derive(Debug, Serialize)]
pub struct Scaling {
    /// What stays the same.
    pub name: &'static str,
    /// E.
    pub channels: usize,
    /// N.
    pub states: usize,
    /// Least-squares slope of ln(seconds) over ln(length), forward.
    pub forward_slope: f64,
    /// Backward.
    pub backward_slope: f64,
    /// Forward, of the longest five.
    pub longest_forward_slope: f64,
    /// Backward, of the longest five.
    pub longest_backward_slope: f64,
    /// Shortest first.
    pub points: Vec<Point>,
}

/// Scans of one length.
#[derive(Debug, Serialize)]
pub struct Point {
    /// S.
    pub sequences: usize,
    /// L.
    pub length: usize,
    /// Median time of forward in seconds.
    pub forward: f64,
    /// Median time of backward in seconds.
    pub backward: f64,
    forward_samples: Vec<f64>,
    backward_samples: Vec<f64>,
    forward_runs_per_sample: usize,
    backward_runs_per_sample: usize,
}

/// Measures both.
pub fn run(bench: &Bench) -> Result<Vec<Scaling>> {
    let [one, batch] =
        if bench.quick { [(32, 5..=7), (32, 5..=7)] } else { [(64, 9..=20), (512, 9..=17)] };
    Ok(vec![
        series(bench, "one sequence", one, false)?,
        series(bench, "constant number of tokens", batch, true)?,
    ])
}

/// Sequences of 2^power tokens: as many as fit into the longest if `constant`, otherwise one.
fn series(
    bench: &Bench,
    name: &'static str,
    (channels, powers): (usize, RangeInclusive<u32>),
    constant: bool,
) -> Result<Scaling> {
    eprintln!("  {name}, E {channels}");
    let tokens = 1usize << powers.end();
    let inputs = ScanInputs::new(&bench.gpu, 0, tokens, channels)?;
    let mut points = Vec::new();
    for length in powers.map(|power| 1usize << power) {
        let sequences = if constant { tokens / length } else { 1 };
        points.push(point(bench, &inputs, (tokens, channels), sequences, length)?);
    }
    drop(inputs);
    bench.gpu.trim()?;
    let longest = &points[points.len().saturating_sub(LONGEST)..];
    let slopes = |points: &[Point]| {
        let by = |seconds: fn(&Point) -> f64| {
            slope(points.iter().map(|p| ((p.length as f64).ln(), seconds(p).ln())))
        };
        (by(|p| p.forward), by(|p| p.backward))
    };
    let ((forward_slope, backward_slope), (longest_forward_slope, longest_backward_slope)) =
        (slopes(&points), slopes(longest));
    eprintln!("  slopes {forward_slope:.3} forward, {backward_slope:.3} backward");
    Ok(Scaling {
        name,
        channels,
        states: STATES,
        forward_slope,
        backward_slope,
        longest_forward_slope,
        longest_backward_slope,
        points,
    })
}

/// Scans of `sequences` x `length` of the tokens that there are, other ones in each call.
fn point(
    bench: &Bench,
    inputs: &ScanInputs,
    (tokens, channels): (usize, usize),
    sequences: usize,
    length: usize,
) -> Result<Point> {
    let gpu = &bench.gpu;
    let batch = Sequences::uniform(sequences, length);
    let plan = Plan::new(gpu, &batch, (channels, 1, STATES), Cut::Fill)?;
    let own = sequences * length;
    let sets = (tokens / own).clamp(1, SETS);
    // As far from each other as there is room.
    let first = |call: usize| call % sets * (tokens / own / sets) * own;
    let forward = bench
        .time(|call| Ok(scan::forward(gpu, &inputs.from(first(call), &plan), false).map(drop)?))?;
    let saved =
        (0..sets).map(|set| Ok(scan::forward(gpu, &inputs.from(first(set), &plan), true)?.2));
    let saved = saved.collect::<Result<Vec<_>>>()?;
    let backward = bench.time(|call| {
        let Some(chunks) = &saved[call % sets] else { return Ok(()) };
        let (inputs, dy) = (inputs.from(first(call), &plan), inputs.gradient_from(first(call)));
        Ok(scan::backward(gpu, &inputs, chunks, dy, None, None, false).map(drop)?)
    })?;
    let seconds = |times: &Times| median(&times.samples);
    let point = Point {
        sequences,
        length,
        forward: seconds(&forward),
        backward: seconds(&backward),
        forward_runs_per_sample: forward.runs_per_sample,
        backward_runs_per_sample: backward.runs_per_sample,
        forward_samples: forward.samples,
        backward_samples: backward.samples,
    };
    eprintln!(
        "  {sequences} x {length} tokens: {:.4} ms forward, {:.4} ms backward",
        point.forward * 1e3,
        point.backward * 1e3
    );
    Ok(point)
}
