//! Sums and maxima in f64. An array is read as `[outer, count, inner]`, and `count` is reduced.

/// `out[o, i] = Σ_c x[o, c, i]`.
pub(super) fn sum(x: &[f64], [outer, count, inner]: [usize; 3]) -> Vec<f64> {
    let mut out = vec![0.0; outer * inner];
    for o in 0..outer {
        for c in 0..count {
            for i in 0..inner {
                out[o * inner + i] += x[(o * count + c) * inner + i];
            }
        }
    }
    out
}

/// The largest value and where along `count` it stands first; NaN is larger than everything.
pub(super) fn max(x: &[f64], [outer, count, inner]: [usize; 3]) -> (Vec<f64>, Vec<usize>) {
    let mut values = vec![f64::NEG_INFINITY; outer * inner];
    let mut places = vec![0; outer * inner];
    for o in 0..outer {
        for c in 0..count {
            for i in 0..inner {
                let value = x[(o * count + c) * inner + i];
                let at = o * inner + i;
                if value > values[at] || (value.is_nan() && !values[at].is_nan()) {
                    (values[at], places[at]) = (value, c);
                }
            }
        }
    }
    (values, places)
}
