//! The report for people: limits, figures, and what does not fit into a table.

use std::fmt::Write as _;

use super::Report;
use crate::output::{bytes, rate};

/// A time with three or four digits.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.3} s"),
        s if s >= 1e-3 => format!("{:.3} ms", s * 1e3),
        s => format!("{:.1} us", s * 1e6),
    }
}

/// A share as people read it.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// The whole report.
pub fn text(report: &Report) -> String {
    let mut limits = vec![["limit", "one thread", "all threads"].map(String::from)];
    for survey in &report.limits {
        let show = |rate: &super::limits::Rate| survey.limit.show(rate.median);
        limits.push([
            survey.limit.name().into(),
            show(&survey.one_thread),
            show(&survey.all_threads),
        ]);
    }
    let mut text = columns(&limits);
    if !report.figures.is_empty() {
        let peaks = report.figures.iter().any(|figure| figure.process_peak_bytes.is_some());
        let peak = if peaks { "peak memory" } else { "" };
        let head = ["name", "time", "tokens/s", "rate", "limit", "share", "of floor", peak];
        let mut figures = vec![head.map(String::from)];
        for figure in &report.figures {
            figures.push([
                format!("{} ({})", figure.name, figure.shape),
                duration(figure.seconds),
                rate(figure.tokens_per_second),
                figure.bound_by.show(figure.rate),
                figure.bound_by.show(figure.limit),
                percent(figure.share),
                percent(figure.share_of_floor),
                figure.process_peak_bytes.map_or_else(String::new, bytes),
            ]);
        }
        let _ = write!(text, "\n{}", columns(&figures));
        text.push_str(
            "share: of the one resource that bounds it; of floor: products and state updates added up\n",
        );
        if peaks {
            text.push_str("peak memory: of the process, weights included\n");
        }
    }
    if let Some(scaling) = &report.scan_scaling {
        let head = ["one sequence of", "time", "a token"].map(String::from);
        let mut points = vec![head];
        points.extend(scaling.points.iter().map(|point| {
            let token = duration(point.seconds / point.length as f64);
            [format!("{} tokens", point.length), duration(point.seconds), token]
        }));
        let _ = writeln!(
            text,
            "\n{}selective_scan forward, E {}, N {}: time grows as length to the power {:.3}",
            columns(&points),
            scaling.channels,
            scaling.states,
            scaling.slope
        );
    }
    if let Some(training) = &report.training {
        let process = training.process_peak_bytes.map_or("unknown".into(), bytes);
        let _ = writeln!(
            text,
            "training step: peak memory {} in tensors, {process} in the process",
            bytes(training.tensor_peak_bytes as u64)
        );
    }
    for inference in &report.inference {
        let peak = inference.process_peak_bytes.map_or("unknown".into(), bytes);
        let _ = writeln!(
            text,
            "{} in {}: {} of weights and {} of state a sequence, peak memory {peak}",
            inference.model,
            inference.weights,
            bytes(inference.weight_bytes as u64),
            bytes(inference.state_bytes as u64)
        );
    }
    text
}

/// Rows under their heads: the first column to the left, the others to the right.
pub fn columns<const K: usize>(rows: &[[String; K]]) -> String {
    let mut widths = [0; K];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        for (i, (cell, width)) in row.iter().zip(widths).enumerate() {
            let _ = match i {
                0 => write!(text, "{cell:width$}"),
                _ => write!(text, "  {cell:>width$}"),
            };
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_columns() {
        assert_eq!(duration(2.5), "2.500 s");
        assert_eq!(duration(0.0123456), "12.346 ms");
        assert_eq!(duration(12.34e-6), "12.3 us");
        let rows = [["a", "10"], ["long", "9"]].map(|row| row.map(String::from));
        assert_eq!(columns(&rows), "a     10\nlong   9\n");
    }
}
