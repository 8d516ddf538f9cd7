//! Softmax and its logarithm in f64, row by row, with their gradients.

/// `ln Σ e^x`.
pub(crate) fn log_sum_exp(row: &[f64]) -> f64 {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + row.iter().map(|x| (x - max).exp()).sum::<f64>().ln()
}

/// `e^x / Σ e^x` of each row of `width`.
pub(super) fn softmax(x: &[f64], width: usize) -> Vec<f64> {
    log_softmax(x, width).iter().map(|y| y.exp()).collect()
}

/// `x - ln Σ e^x` of each row of `width`.
pub(super) fn log_softmax(x: &[f64], width: usize) -> Vec<f64> {
    x.chunks_exact(width)
        .flat_map(|row| {
            let lse = log_sum_exp(row);
            row.iter().map(move |x| x - lse)
        })
        .collect()
}

/// `dx = y (dy - Σ y dy)` from the result `y`.
pub(super) fn softmax_backward(y: &[f64], dy: &[f64], width: usize) -> Vec<f64> {
    y.chunks_exact(width)
        .zip(dy.chunks_exact(width))
        .flat_map(|(y, dy)| {
            let dot: f64 = y.iter().zip(dy).map(|(y, dy)| y * dy).sum();
            y.iter().zip(dy).map(move |(y, dy)| y * (dy - dot))
        })
        .collect()
}

/// `dx = dy - e^y Σ dy` from the result `y`.
pub(super) fn log_softmax_backward(y: &[f64], dy: &[f64], width: usize) -> Vec<f64> {
    y.chunks_exact(width)
        .zip(dy.chunks_exact(width))
        .flat_map(|(y, dy)| {
            let sum: f64 = dy.iter().sum();
            y.iter().zip(dy).map(move |(y, dy)| dy - y.exp() * sum)
        })
        .collect()
}
