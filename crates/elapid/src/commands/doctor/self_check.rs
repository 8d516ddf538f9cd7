//! The fast code of this machine against plain f64 loops on small inputs: a wrong instruction set, a broken
//! build or faulty hardware shows here before it shows in a model. The loops are the definitions of
//! `elapid-ops`, written once more, so that the two share nothing.

use anyhow::Result;
use elapid_ops::causal_conv1d::{Activation, causal_conv1d};
use elapid_ops::linear_cross_entropy::linear_cross_entropy_per_token;
use elapid_ops::matmul::linear;
use elapid_ops::norm::{layer_norm, rms_norm};
use elapid_ops::selective_scan::{Inputs, selective_scan};
use elapid_tensor::rng::Rng;
use elapid_tensor::{Sequences, Tensor};
use serde::Serialize;

/// The largest difference that rounding explains, relative to the largest value.
const LIMIT: f64 = 2e-5;

/// One operation's result.
#[derive(Debug, Serialize)]
pub struct Check {
    pub operation: &'static str,
    /// Largest difference from the f64 loops, relative to the largest value.
    pub difference: f64,
    pub limit: f64,
    pub passed: bool,
}

/// T, D, E, N, W: odd, so that partial vectors and single columns take part.
const TOKENS: usize = 37;
const WIDTH: usize = 29;
const CHANNELS: usize = 43;
const STATES: usize = 16;
const TAPS: usize = 4;

/// Checks every operation that a forward pass and its loss need.
pub fn run() -> Result<Vec<Check>> {
    let mut numbers = Numbers(Rng::new(1, 0));
    Ok(vec![
        check_linear("linear", TOKENS, &mut numbers)?,
        check_linear("linear, one row", 1, &mut numbers)?,
        check_rms_norm(&mut numbers)?,
        check_layer_norm(&mut numbers)?,
        check_conv(&mut numbers)?,
        check_scan(&mut numbers)?,
        check_loss(&mut numbers)?,
    ])
}

/// Two sequences in one batch, so that borders are checked too.
fn sequences() -> Sequences {
    Sequences::fresh(&[TOKENS - 5, 5])
}

fn check(operation: &'static str, fast: &[f64], exact: &[f64]) -> Check {
    let largest = exact.iter().fold(1e-30, |a: f64, b| a.max(b.abs()));
    let difference = fast.iter().zip(exact).map(|(a, b)| (a - b).abs() / largest).fold(
        0.0,
        // A NaN must not hide behind a maximum.
        |a: f64, b| if b.is_nan() { f64::INFINITY } else { a.max(b) },
    );
    let passed = fast.len() == exact.len() && difference <= LIMIT;
    Check { operation, difference, limit: LIMIT, passed }
}

/// Random values as a tensor and as f64.
struct Numbers(Rng);

impl Numbers {
    fn draw(&mut self, shape: &[usize], scale: f64) -> Result<(Tensor, Vec<f64>)> {
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| (self.0.normal() * scale) as f32).collect();
        let exact = values.iter().map(|&value| f64::from(value)).collect();
        Ok((Tensor::from_slice(&values, shape)?, exact))
    }
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn product(x: &[f64], weight: &[f64], inner: usize) -> Vec<f64> {
    x.chunks(inner)
        .flat_map(|x| {
            weight.chunks(inner).map(move |w| x.iter().zip(w).map(|(a, b)| a * b).sum::<f64>())
        })
        .collect()
}

fn check_linear(name: &'static str, rows: usize, numbers: &mut Numbers) -> Result<Check> {
    let (x, x64) = numbers.draw(&[rows, WIDTH], 1.0)?;
    let (weight, weight64) = numbers.draw(&[CHANNELS, WIDTH], 1.0)?;
    let fast = linear(&x, &weight, None)?.to_f64_vec()?;
    Ok(check(name, &fast, &product(&x64, &weight64, WIDTH)))
}

fn check_rms_norm(numbers: &mut Numbers) -> Result<Check> {
    let (x, x64) = numbers.draw(&[TOKENS, WIDTH], 3.0)?;
    let (weight, weight64) = numbers.draw(&[WIDTH], 1.0)?;
    let fast = rms_norm(&x, Some(&weight), None, 1e-5)?.0.to_f64_vec()?;
    let exact: Vec<f64> = x64
        .chunks(WIDTH)
        .flat_map(|row| {
            let square = row.iter().map(|v| v * v).sum::<f64>() / WIDTH as f64;
            let scale = 1.0 / (square + 1e-5).sqrt();
            row.iter().zip(&weight64).map(move |(v, w)| v * scale * w)
        })
        .collect();
    Ok(check("rms_norm", &fast, &exact))
}

fn check_layer_norm(numbers: &mut Numbers) -> Result<Check> {
    let (x, x64) = numbers.draw(&[TOKENS, WIDTH], 3.0)?;
    let (weight, weight64) = numbers.draw(&[WIDTH], 1.0)?;
    let (bias, bias64) = numbers.draw(&[WIDTH], 1.0)?;
    let fast = layer_norm(&x, Some(&weight), Some(&bias), None, 1e-5)?.0.to_f64_vec()?;
    let exact: Vec<f64> = x64
        .chunks(WIDTH)
        .flat_map(|row| {
            let mean = row.iter().sum::<f64>() / WIDTH as f64;
            let square = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / WIDTH as f64;
            let scale = 1.0 / (square + 1e-5).sqrt();
            row.iter()
                .zip(weight64.iter().zip(&bias64))
                .map(move |(v, (w, b))| (v - mean) * scale * w + b)
        })
        .collect();
    Ok(check("layer_norm", &fast, &exact))
}

fn check_conv(numbers: &mut Numbers) -> Result<Check> {
    let sequences = sequences();
    let (x, x64) = numbers.draw(&[TOKENS, CHANNELS], 1.0)?;
    let (weight, weight64) = numbers.draw(&[CHANNELS, TAPS], 1.0)?;
    let (bias, bias64) = numbers.draw(&[CHANNELS], 1.0)?;
    let (fast, _) = causal_conv1d(&x, &weight, Some(&bias), Activation::Silu, &sequences, None)?;
    let mut exact = vec![0.0; TOKENS * CHANNELS];
    for sequence in &sequences {
        for t in sequence.tokens() {
            for c in 0..CHANNELS {
                // Tap W-1 meets the present token.
                let taps = (0..TAPS).filter(|k| t + k + 1 >= sequence.start + TAPS);
                let sum: f64 = taps
                    .map(|k| weight64[c * TAPS + k] * x64[(t + k + 1 - TAPS) * CHANNELS + c])
                    .sum();
                exact[t * CHANNELS + c] = silu(sum + bias64[c]);
            }
        }
    }
    Ok(check("causal_conv1d", &fast.to_f64_vec()?, &exact))
}

fn check_scan(numbers: &mut Numbers) -> Result<Check> {
    let sequences = sequences();
    let (u, u64s) = numbers.draw(&[TOKENS, CHANNELS], 1.0)?;
    let (delta, delta64) = numbers.draw(&[TOKENS, CHANNELS], 1.0)?;
    let (a_log, a_log64) = numbers.draw(&[CHANNELS, STATES], 1.0)?;
    let (b, b64) = numbers.draw(&[TOKENS, STATES], 1.0)?;
    let (c, c64) = numbers.draw(&[TOKENS, STATES], 1.0)?;
    let (d, d64) = numbers.draw(&[CHANNELS], 1.0)?;
    let (z, z64) = numbers.draw(&[TOKENS, CHANNELS], 1.0)?;
    let inputs = Inputs {
        u: &u,
        delta: &delta,
        a: &elapid_ops::elementwise::neg_exp(&a_log)?,
        b: &b.unsqueeze(1)?,
        c: &c.unsqueeze(1)?,
        d: Some(&d),
        z: Some(&z),
        delta_bias: None,
        delta_softplus: true,
        state: None,
    };
    let (fast, _) = selective_scan(&inputs, &sequences)?;
    let mut exact = vec![0.0; TOKENS * CHANNELS];
    for sequence in &sequences {
        for channel in 0..CHANNELS {
            let mut h = [0.0; STATES];
            for t in sequence.tokens() {
                let at = t * CHANNELS + channel;
                let step = delta64[at].exp().ln_1p();
                let mut y = d64[channel] * u64s[at];
                for (n, h) in h.iter_mut().enumerate() {
                    let decay = (-a_log64[channel * STATES + n].exp() * step).exp();
                    *h = decay * *h + step * b64[t * STATES + n] * u64s[at];
                    y += c64[t * STATES + n] * *h;
                }
                exact[at] = y * silu(z64[at]);
            }
        }
    }
    Ok(check("selective_scan", &fast.to_f64_vec()?, &exact))
}

fn check_loss(numbers: &mut Numbers) -> Result<Check> {
    let (hidden, hidden64) = numbers.draw(&[TOKENS, WIDTH], 1.0)?;
    let (weight, weight64) = numbers.draw(&[CHANNELS, WIDTH], 1.0)?;
    let targets: Vec<i64> = (0..TOKENS).map(|t| (t * 7 % CHANNELS) as i64).collect();
    let classes = Tensor::from_slice(&targets, [targets.len()])?;
    let fast =
        linear_cross_entropy_per_token(&hidden, &weight, &classes, CHANNELS)?.to_f64_vec()?;
    let logits = product(&hidden64, &weight64, WIDTH);
    let exact: Vec<f64> = logits
        .chunks(CHANNELS)
        .zip(&targets)
        .map(|(row, &target)| {
            row.iter().map(|logit| logit.exp()).sum::<f64>().ln() - row[target as usize]
        })
        .collect();
    Ok(check("linear_cross_entropy", &fast, &exact))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_value_and_a_nan_fail() {
        assert!(check("x", &[1.0, 2.0], &[1.0, 2.0]).passed);
        assert!(!check("x", &[1.0, 2.001], &[1.0, 2.0]).passed);
        assert!(!check("x", &[1.0, f64::NAN], &[1.0, 2.0]).passed);
        assert!(!check("x", &[1.0], &[1.0, 2.0]).passed);
    }

    #[test]
    fn this_machine_passes() {
        for check in run().unwrap() {
            assert!(check.passed, "{check:?}");
        }
    }
}
