//! Where an axis has ticks and how they are written.

use std::ops::Range;

use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};

/// A linear axis with the ticks that it is given.
pub(super) struct Axis {
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) ticks: Vec<f64>,
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let share = (value - self.low) / (self.high - self.low);
        from + (f64::from(to - from) * share).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        // Between the ticks (a second, lighter grid) there is nothing.
        if hint.weight().allow_light_points() { Vec::new() } else { self.ticks.clone() }
    }

    fn range(&self) -> Range<f64> {
        self.low..self.high
    }
}

/// About `count` round values within [low, high]: multiples of 1, 2 or 5 times a power of ten.
pub(super) fn linear_ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    let rough = (high - low) / count as f64;
    if !rough.is_finite() || rough <= 0.0 {
        return vec![low];
    }
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|m| m * power)
        .min_by(|a, b| (a / rough).ln().abs().total_cmp(&(b / rough).ln().abs()))
        .unwrap_or(power);
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    // Dividing by the whole reciprocal keeps 0.3 from becoming 0.30000000000000004.
    let at = |i: i64| if step < 1.0 { i as f64 / (1.0 / step).round() } else { i as f64 * step };
    (first..=last).map(at).collect()
}

/// Ticks of an axis of logarithms to base 10: powers of ten, with 2 and 5 between when there are few.
pub(super) fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let digits: &[f64] = if high - low > 2.5 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let powers = low.floor() as i32..=high.ceil() as i32;
    let all = powers.flat_map(|p| digits.iter().map(move |d| f64::from(p) + d.log10()));
    all.filter(|t| (low - 1e-9..=high + 1e-9).contains(t)).collect()
}

/// A value with as many decimals as a tick distance of `step` needs.
pub(super) fn label(value: f64, step: f64) -> String {
    let decimals = (-step.abs().log10().floor()).clamp(0.0, 9.0) as usize;
    let text = format!("{value:.decimals$}");
    // Rounding may leave a negative zero.
    if text.trim_matches(['-', '0', '.']).is_empty() { text.replace('-', "") } else { text }
}

/// A count in few characters: 950, 1.5k, 200k, 3M.
pub(super) fn compact(value: f64) -> String {
    let (scaled, suffix) = match value.abs() {
        v if v >= 999_999.5 => (value / 1e6, "M"),
        v if v >= 999.5 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let text = format!("{scaled:.2}");
    format!("{}{suffix}", text.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(linear_ticks(0.13, 0.92, 8), [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]);
        assert_eq!(linear_ticks(1.0, 1200.0, 6), [200.0, 400.0, 600.0, 800.0, 1000.0, 1200.0]);
        assert_eq!(linear_ticks(2.0, 2.0, 6), [2.0]);
        let powers = log_ticks(0.0, 3.1);
        assert_eq!(powers, [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(log_ticks(0.0, 1.0).len(), 4, "1, 2, 5, 10");
    }

    #[test]
    fn labels_are_short() {
        assert_eq!(label(2.5, 0.5), "2.5");
        assert_eq!(label(-0.0001, 0.5), "0.0");
        assert_eq!(label(40.0, 20.0), "40");
        let counts = [0.0, 950.0, 1500.0, 200_000.0, 3_000_000.0, 999_999.9, 12_345.0];
        let texts = ["0", "950", "1.5k", "200k", "3M", "1M", "12.35k"];
        assert_eq!(counts.map(compact), texts.map(String::from));
    }
}
