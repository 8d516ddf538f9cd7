//! The definition in f64, and the exact value of what is computed from rounded inputs.

use elapid_tensor::Result;

use super::Weight;
use crate::blocks::dequantize;

/// `x Wᵀ` [T, rows] in f64 for `x` [T, columns], with the values that the weight's bytes stand for.
///
/// # Errors
/// Those of [`dequantize`].
pub fn reference(x: &[f32], weight: &Weight<'_>) -> Result<Vec<f64>> {
    let mut y = vec![0.0; x.len() / weight.columns().max(1) * weight.rows()];
    let mut values = vec![0.0f32; weight.columns()];
    for row in 0..weight.rows() {
        dequantize(weight.encoding(), weight.row(row), &mut values)?;
        for (token, x) in x.chunks_exact(weight.columns()).enumerate() {
            y[token * weight.rows() + row] =
                x.iter().zip(&values).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
        }
    }
    Ok(y)
}
