//! The definition, in plain f64 loops.

/// What a normalisation does with a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Definition {
    /// Subtract the mean (LayerNorm) or not (RMSNorm).
    pub center: bool,
    /// Added to the mean square or variance.
    pub eps: f64,
}

/// y [T, C] of r [T, C]:
///
/// - RMSNorm (Zhang and Sennrich, 2019, equation 4): `y = r / sqrt(mean(r²) + eps) · w`
/// - LayerNorm (Ba et al., 2016, equation 3): `y = (r - mean(r)) / sqrt(var(r) + eps) · w + b`
pub fn forward(
    definition: Definition,
    r: &[f64],
    c: usize,
    weight: Option<&[f64]>,
    bias: Option<&[f64]>,
) -> Vec<f64> {
    let mut y = Vec::with_capacity(r.len());
    for row in r.chunks_exact(c.max(1)) {
        let (mean, scale) = statistics(definition, row);
        for (i, value) in row.iter().enumerate() {
            let normed = (value - mean) * scale;
            y.push(normed * weight.map_or(1.0, |w| w[i]) + bias.map_or(0.0, |b| b[i]));
        }
    }
    y
}

/// Gradients by r, the weight and the bias, given those of y.
pub fn backward(
    definition: Definition,
    r: &[f64],
    c: usize,
    weight: Option<&[f64]>,
    dy: &[f64],
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut dr, mut dweight, mut dbias) =
        (Vec::with_capacity(r.len()), vec![0.0; c], vec![0.0; c]);
    for (row, dy) in r.chunks_exact(c.max(1)).zip(dy.chunks_exact(c.max(1))) {
        let (mean, scale) = statistics(definition, row);
        let normed: Vec<f64> = row.iter().map(|value| (value - mean) * scale).collect();
        let g: Vec<f64> =
            dy.iter().enumerate().map(|(i, d)| d * weight.map_or(1.0, |w| w[i])).collect();
        let along = g.iter().zip(&normed).map(|(g, n)| g * n).sum::<f64>() / c as f64;
        let middle = if definition.center { g.iter().sum::<f64>() / c as f64 } else { 0.0 };
        for i in 0..c {
            dr.push(scale * (g[i] - middle - normed[i] * along));
            dweight[i] += dy[i] * normed[i];
            dbias[i] += dy[i];
        }
    }
    (dr, dweight, dbias)
}

fn statistics(definition: Definition, row: &[f64]) -> (f64, f64) {
    let c = row.len() as f64;
    let mean = if definition.center { row.iter().sum::<f64>() / c } else { 0.0 };
    let square = row.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / c;
    (mean, 1.0 / (square + definition.eps).sqrt())
}
