//! The report for people.

use std::fmt::Write as _;

use super::Report;
use super::sampling::Figure;
use super::training::Training;
use crate::bench::table::{columns, duration, percent};
use crate::output::{bytes, rate};

/// The whole report.
pub fn text(report: &Report) -> String {
    let mut limits = vec![["limit", "rate"].map(String::from)];
    for rate in &report.limits {
        let constant = if rate.measured { "" } else { " (a constant of the H200)" };
        let shown = format!("{:.3} {}{constant}", rate.rate / 1e12, rate.limit.unit());
        limits.push([rate.limit.name().into(), shown]);
    }
    let mut text = columns(&limits);
    if !report.figures.is_empty() {
        let peaks = report.figures.iter().any(|figure| figure.peak_bytes.is_some());
        let peak = if peaks { "peak memory" } else { "" };
        let head = ["name", "time", "tokens/s", "bound by", "rate", "share", peak];
        let mut figures = vec![head.map(String::from)];
        figures.extend(report.figures.iter().map(row));
        let _ = write!(text, "\n{}", columns(&figures));
        if peaks {
            text.push_str("peak memory: of the card, in buffers in use, weights included\n");
        }
    }
    for scaling in &report.scan_scaling {
        let head = ["sequences x tokens", "forward", "backward"].map(String::from);
        let mut points = vec![head];
        points.extend(scaling.points.iter().map(|point| {
            let shape = format!("{} x {}", point.sequences, point.length);
            [shape, duration(point.forward), duration(point.backward)]
        }));
        let _ = writeln!(
            text,
            "\n{}selective_scan, {}, E {}, N {}: time grows as length to the power {:.3} forward, {:.3} backward \
             (the longest: {:.3}, {:.3})",
            columns(&points),
            scaling.name,
            scaling.channels,
            scaling.states,
            scaling.forward_slope,
            scaling.backward_slope,
            scaling.longest_forward_slope,
            scaling.longest_backward_slope
        );
    }
    if !report.training.is_empty() {
        let head = ["training step", "time", "tokens/s", "TFLOP/s", "share", "peak memory", "held"];
        let mut steps = vec![head.map(String::from)];
        steps.extend(report.training.iter().map(training));
        let _ = write!(text, "\n{}", columns(&steps));
        text.push_str(
            "peak: in buffers in use; held: taken from the driver, kept for use again included\n",
        );
    }
    if let Some(inference) = &report.inference {
        let _ = writeln!(
            text,
            "\n{}: {} of weights and {} of state a sequence",
            inference.model,
            bytes(inference.weight_bytes as u64),
            bytes(inference.state_bytes as u64)
        );
    }
    text
}

fn row(figure: &Figure) -> [String; 7] {
    [
        format!("{} ({})", figure.name, figure.shape),
        duration(figure.seconds),
        figure.tokens_per_second.map_or_else(String::new, rate),
        figure.bound_by.name().into(),
        format!("{:.3} {}", figure.rate / 1e12, figure.bound_by.unit()),
        percent(figure.share),
        figure.peak_bytes.map_or_else(String::new, |peak| bytes(peak as u64)),
    ]
}

fn training(training: &Training) -> [String; 7] {
    let mut how = if training.recorded { "" } else { ", launch by launch" }.to_owned();
    if !training.recompute {
        how.push_str(", kept");
    }
    let name = format!(
        "{}, {} x {}, {}{how}",
        training.model, training.sequences, training.length, training.dtype
    );
    match &training.steps {
        None => [&name, "does not fit", "", "", "", "", ""].map(String::from),
        Some(steps) => [
            name,
            duration(steps.seconds),
            rate(steps.tokens_per_second),
            format!("{:.1}", steps.flops_per_second / 1e12),
            percent(steps.share),
            bytes(steps.peak_bytes as u64),
            bytes(steps.held_bytes as u64),
        ],
    }
}
