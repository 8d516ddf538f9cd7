//! Projection onto the vocabulary and cross entropy in f64, one token after the other.

use crate::softmax::reference::log_sum_exp;

/// `x` `[T, D]`, `weight` `[V, D]` and targets, of which -100 is ignored; only the first `classes` rows of the
/// weight take part.
#[derive(Clone, Copy)]
pub(super) struct Reference<'a> {
    pub(super) x: &'a [f64],
    pub(super) weight: &'a [f64],
    pub(super) targets: &'a [i64],
    pub(super) width: usize,
    pub(super) classes: usize,
}

impl Reference<'_> {
    fn logits(&self, t: usize) -> Vec<f64> {
        let x = &self.x[t * self.width..][..self.width];
        let rows = self.weight.chunks_exact(self.width).take(self.classes);
        rows.map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    }

    /// `ln Σ_v e^{x w_v} - x w_target` of each token; 0 where ignored.
    pub(super) fn per_token(&self) -> Vec<f64> {
        (0..self.targets.len())
            .map(|t| match self.targets[t] {
                -100 => 0.0,
                target => {
                    let logits = self.logits(t);
                    log_sum_exp(&logits) - logits[target as usize]
                }
            })
            .collect()
    }

    /// Gradients of the sum by `x` and `weight`: `dlogits = softmax - 1[target]`, `dx = dlogits W`,
    /// `dW = dlogitsᵀ x`.
    pub(super) fn gradients(&self) -> (Vec<f64>, Vec<f64>) {
        let mut dx = vec![0.0; self.x.len()];
        let mut dweight = vec![0.0; self.weight.len()];
        for (t, &target) in self.targets.iter().enumerate().filter(|&(_, &target)| target != -100) {
            let logits = self.logits(t);
            let lse = log_sum_exp(&logits);
            for (v, logit) in logits.iter().enumerate() {
                let dlogit = (logit - lse).exp() - f64::from(u8::from(v == target as usize));
                for c in 0..self.width {
                    dx[t * self.width + c] += dlogit * self.weight[v * self.width + c];
                    dweight[v * self.width + c] += dlogit * self.x[t * self.width + c];
                }
            }
        }
        (dx, dweight)
    }
}
