//! AdamW in f64, one parameter after the other (Loshchilov and Hutter, "Decoupled weight decay
//! regularization", ICLR 2019, algorithm 2, with the decay scaled by the learning rate as PyTorch does).

use super::AdamW;

/// One step in place.
pub(super) fn step(
    [p, m, v]: [&mut [f64]; 3],
    g: &[f64],
    options: &AdamW,
    step: u64,
    grad_scale: f64,
) {
    let AdamW { learning_rate, beta1, beta2, epsilon, weight_decay } = *options;
    for i in 0..p.len() {
        let g = g[i] * grad_scale;
        p[i] -= learning_rate * weight_decay * p[i];
        m[i] = beta1 * m[i] + (1.0 - beta1) * g;
        v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
        let m_hat = m[i] / (1.0 - beta1.powi(step as i32));
        let v_hat = v[i] / (1.0 - beta2.powi(step as i32));
        p[i] -= learning_rate * m_hat / (v_hat.sqrt() + epsilon);
    }
}
