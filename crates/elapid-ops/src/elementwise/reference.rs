//! The elementwise functions and their derivatives in f64: the definition, and what f64 tensors use.

/// Above this, softplus is the identity and its derivative 1, as in the kernels of Mamba.
const SOFTPLUS_THRESHOLD: f64 = 20.0;

/// `1 / (1 + e^-x)`.
pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `x sigmoid(x)`.
pub(super) fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

/// `s (1 + x (1 - s))` with `s = sigmoid(x)`.
pub(super) fn silu_derivative(x: f64) -> f64 {
    let s = sigmoid(x);
    s * (1.0 + x * (1.0 - s))
}

/// `ln(1 + e^x)`; the identity above 20.
pub(super) fn softplus(x: f64) -> f64 {
    if x > SOFTPLUS_THRESHOLD { x } else { x.exp().ln_1p() }
}

/// The sigmoid; 1 above 20.
pub(super) fn softplus_derivative(x: f64) -> f64 {
    if x > SOFTPLUS_THRESHOLD { 1.0 } else { sigmoid(x) }
}
