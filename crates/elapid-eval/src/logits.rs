//! From rows of logits to logarithms of probabilities, over the real tokens of the vocabulary.

use elapid_ops::simd::exp_slice;

/// Weights `exp(logit - largest)` of one row, and the logarithm of the sum of its exponentials.
#[derive(Debug, Default)]
pub(crate) struct Softmax {
    weights: Vec<f32>,
    largest: f64,
    total: f64,
}

impl Softmax {
    /// Of `row` [V]. NaN in it, or no number above minus infinity, shows in every result.
    pub fn of(&mut self, row: &[f32]) {
        let mut largest = f32::NEG_INFINITY;
        for &logit in row {
            // A comparison with NaN is false, and so it stays.
            largest = if logit > largest || logit.is_nan() { logit } else { largest };
        }
        self.largest = f64::from(largest);
        self.weights.clear();
        self.weights.extend(row.iter().map(|logit| logit - largest));
        let shifted = std::mem::take(&mut self.weights);
        self.weights.resize(shifted.len(), 0.0);
        exp_slice(&shifted, &mut self.weights);
        self.total = sum(&self.weights, |_, weight| f64::from(weight));
    }

    /// `ln Σ exp(logit)`.
    pub fn log_sum(&self) -> f64 {
        self.largest + self.total.ln()
    }

    /// KL(p ‖ q) in nats, for p the distribution of `row`, of which this is, and q that of `other`, whose
    /// [`Softmax::log_sum`] is `log_sum`.
    pub fn divergence(&self, row: &[f32], other: &[f32], log_sum: f64) -> f64 {
        let mean = sum(&self.weights, |i, weight| {
            // What has no probability under p takes no part, whatever q says.
            if weight == 0.0 {
                0.0
            } else {
                f64::from(weight) * (f64::from(row[i]) - f64::from(other[i]))
            }
        }) / self.total;
        let divergence = mean - self.log_sum() + log_sum;
        // Rounding may leave a crumb below zero; NaN stays.
        if divergence < 0.0 { 0.0 } else { divergence }
    }
}

/// The sum of `f(i, values[i])`, in eight partial sums that are added in a fixed order.
fn sum(values: &[f32], f: impl Fn(usize, f32) -> f64) -> f64 {
    let mut parts = [0.0f64; 8];
    for (block, chunk) in values.chunks(8).enumerate() {
        for (lane, &value) in chunk.iter().enumerate() {
            parts[lane] += f(block * 8 + lane, value);
        }
    }
    parts.iter().sum()
}

/// The most probable token, the lowest id among equals.
pub(crate) fn best(row: &[f32]) -> usize {
    let mut best = 0;
    for (i, &logit) in row.iter().enumerate() {
        if logit > row[best] {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definitions, in f64.
    fn log_softmax(row: &[f32]) -> Vec<f64> {
        let total: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
        row.iter().map(|&logit| f64::from(logit) - total.ln()).collect()
    }

    fn divergence(p: &[f32], q: &[f32]) -> f64 {
        let (lp, lq) = (log_softmax(p), log_softmax(q));
        lp.iter().zip(&lq).map(|(a, b)| a.exp() * (a - b)).sum()
    }

    proptest! {
        #[test]
        fn as_the_definitions_say(
            rows in prop::collection::vec((-12f32..12.0, -12f32..12.0), 1..70),
        ) {
            let (p, q): (Vec<f32>, Vec<f32>) = rows.into_iter().unzip();
            let (mut of_p, mut of_q) = (Softmax::default(), Softmax::default());
            of_p.of(&p);
            of_q.of(&q);
            let expected = f64::from(p[0]) - log_softmax(&p)[0];
            prop_assert!((of_p.log_sum() - expected).abs() < 1e-6);
            let found = of_p.divergence(&p, &q, of_q.log_sum());
            let expected = divergence(&p, &q);
            prop_assert!((found - expected).abs() < 1e-5 * (1.0 + expected), "{} {}", found, expected);
            prop_assert_eq!(of_p.divergence(&p, &p, of_p.log_sum()), 0.0);
        }
    }

    #[test]
    fn damage_shows_and_impossible_tokens_do_not_matter() {
        let mut softmax = Softmax::default();
        softmax.of(&[0.0, f32::NAN, 1.0]);
        assert!(softmax.log_sum().is_nan());
        softmax.of(&[f32::NEG_INFINITY; 3]);
        assert!(softmax.log_sum().is_nan());
        let row = [0.0, f32::NEG_INFINITY, 1.0];
        softmax.of(&row);
        assert!((softmax.log_sum() - (1.0 + 1f64.exp()).ln()).abs() < 1e-6);
        assert_eq!(softmax.divergence(&row, &row, softmax.log_sum()), 0.0);
        assert_eq!(best(&[1.0, 3.0, 3.0]), 1);
    }
}
