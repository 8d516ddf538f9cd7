//! A and its logarithm. Files hold A = -exp(A_log) in f32; the models here have A_log.
//!
//! Near A = -1 a step of A is many steps of A_log, which is near 0 there. Where the logarithm of what the file
//! holds would be more than two units in the last place away from A_log, the file gets the exact value among its
//! metadata ([`INDEX_KEY`], [`VALUE_KEY`]), which other programs ignore; it counts as long as it agrees with A.

use std::collections::BTreeMap;

use super::read::GgufFile;
use super::value::{Array, Value};
use crate::Result;

/// Positions of exact values: layer times elements of a layer plus element, ascending.
pub(super) const INDEX_KEY: &str = "elapid.a_log.index";
/// The exact values of A_log there.
pub(super) const VALUE_KEY: &str = "elapid.a_log.value";

/// The largest distance, in units in the last place, that is left as it is.
const TOLERANCE: u32 = 2;

/// A = -exp(A_log).
pub(super) fn a_from_log(a_log: f32) -> f32 {
    -f64::from(a_log).exp() as f32
}

/// A_log = log(-A); no number for A that is not negative.
pub(super) fn log_from_a(a: f32) -> f32 {
    (-f64::from(a)).ln() as f32
}

/// Distance in units in the last place.
fn distance(x: f32, y: f32) -> u32 {
    // Maps floats to integers so that neighbours differ by one, the two zeros not at all.
    let ordered = |v: f32| {
        let bits = v.to_bits() as i32;
        i64::from(if bits < 0 { i32::MIN.wrapping_sub(bits) } else { bits })
    };
    u32::try_from(ordered(x).abs_diff(ordered(y))).unwrap_or(u32::MAX)
}

/// Exact values that a file needs beside its A.
#[derive(Default)]
pub(super) struct Exact {
    index: Vec<u64>,
    value: Vec<f32>,
}

impl Exact {
    /// Adds what the layer whose A_log begins at `first` needs.
    pub(super) fn add(&mut self, first: u64, a_log: &[f32]) {
        for (i, &value) in a_log.iter().enumerate() {
            if value.is_finite() && distance(log_from_a(a_from_log(value)), value) > TOLERANCE {
                self.index.push(first + i as u64);
                self.value.push(value);
            }
        }
    }

    /// As metadata; none if nothing is needed.
    pub(super) fn into_metadata(self) -> Vec<(String, Value)> {
        if self.index.is_empty() {
            return Vec::new();
        }
        vec![
            (INDEX_KEY.into(), Value::Array(Array::U64(self.index))),
            (VALUE_KEY.into(), Value::Array(Array::F32(self.value))),
        ]
    }

    /// The exact values in a file, by position.
    ///
    /// # Errors
    /// If the two lists are of other types or different lengths.
    pub(super) fn of_file(file: &GgufFile) -> Result<BTreeMap<u64, f32>> {
        let index = file.value(INDEX_KEY, "an array of u64", |value| match value {
            Value::Array(Array::U64(items)) => Some(items.as_slice()),
            _ => None,
        })?;
        let value = file.value(VALUE_KEY, "an array of f32", |value| match value {
            Value::Array(Array::F32(items)) => Some(items.as_slice()),
            _ => None,
        })?;
        let (index, value) = (index.unwrap_or_default(), value.unwrap_or_default());
        if index.len() != value.len() {
            let expected = format!("{} items as {INDEX_KEY}", index.len());
            return Err(file.error(VALUE_KEY, &expected, value.len()));
        }
        Ok(index.iter().copied().zip(value.iter().copied()).collect())
    }
}

/// A_log for the A of a layer, with the exact values where they agree with A.
pub(super) fn logs(a: &[f32], exact: &BTreeMap<u64, f32>, first: u64) -> Vec<f32> {
    let mut logs: Vec<f32> = a.iter().map(|&a| log_from_a(a)).collect();
    for (position, &value) in exact.range(first..first.saturating_add(a.len() as u64)) {
        let i = (position - first) as usize;
        // Another machine's exponential may round to a neighbour.
        if distance(a_from_log(value), a[i]) <= 1 {
            logs[i] = value;
        }
    }
    logs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        assert_eq!(distance(1.0, 1.0f32.next_up()), 1);
        assert_eq!(distance(-0.0, 0.0), 0);
        assert_eq!(distance(f32::MIN_POSITIVE * -1e-7, 0.0), 1);
        assert_eq!(distance(-1.0, (-1.0f32).next_up().next_up()), 2);
        assert_eq!(distance(-1.0, 1.0), 2 * 0x3f80_0000);
    }

    #[test]
    fn logarithms_are_near_or_exact() {
        let a_log: Vec<f32> =
            (-3000..3000).map(|i| (i as f32 * 0.37).sin() * 2f32.powi(i % 20 - 15)).collect();
        let mut exact = Exact::default();
        exact.add(100, &a_log);
        assert!(!exact.index.is_empty() && exact.index.len() < a_log.len());
        let exact: BTreeMap<u64, f32> = exact.index.into_iter().zip(exact.value).collect();
        let a: Vec<f32> = a_log.iter().map(|&v| a_from_log(v)).collect();
        for (found, expected) in logs(&a, &exact, 100).iter().zip(&a_log) {
            assert!(distance(*found, *expected) <= TOLERANCE, "{expected} came back as {found}");
        }
        // Values for another A do not count.
        let doubled: Vec<f32> = a.iter().map(|a| 2.0 * a).collect();
        assert_eq!(
            logs(&doubled, &exact, 100),
            doubled.iter().map(|&a| log_from_a(a)).collect::<Vec<_>>()
        );
        // Nor do those of other layers.
        assert_eq!(logs(&a, &exact, 0)[0], log_from_a(a[0]));
        assert!(logs(&[1.0, f32::NAN], &exact, 0).iter().all(|v| v.is_nan()));
    }
}
