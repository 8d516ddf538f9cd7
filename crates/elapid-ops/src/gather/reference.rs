//! Rows chosen by number, and their gradient, in f64.

/// `out[k] = x[rows[k]]` for rows of `width`.
pub(crate) fn take_rows(x: &[f64], rows: &[usize], width: usize) -> Vec<f64> {
    rows.iter().flat_map(|&row| x[row * width..][..width].iter().copied()).collect()
}

/// `dx[rows[k]] += dy[k]` into `count` rows of zeros.
pub(crate) fn scatter_add(dy: &[f64], rows: &[usize], width: usize, count: usize) -> Vec<f64> {
    let mut dx = vec![0.0; count * width];
    for (k, &row) in rows.iter().enumerate() {
        for c in 0..width {
            dx[row * width + c] += dy[k * width + c];
        }
    }
    dx
}
