//! Sigmoid, SiLU and softplus with their derivatives.

use pulp::Simd;

use super::exponential::exp_of_negative;
use super::{clamp_above, clamp_below, polynomial};

/// Above this, softplus is the identity and its derivative 1, as in the kernels of Mamba.
pub const SOFTPLUS_THRESHOLD: f32 = 20.0;

/// (2 atanh s - 2 s) / s^3 in powers of s^2 on 0 <= s <= 1/3, relative error of 2 atanh s 4.6e-9.
const ATANH: [f32; 4] = [0.666_664_1, 0.400_217, 0.279_991_4, 0.280_244_65];

/// `w = e^-|x|` and `1 / (1 + w)`, of which sigmoid is made without overflow and with one division.
#[inline(always)]
fn halves<S: Simd>(simd: S, x: S::f32s) -> (S::f32s, S::f32s) {
    let w = exp_of_negative(simd, simd.neg_f32s(simd.abs_f32s(x)));
    let one = simd.splat_f32s(1.0);
    (w, simd.div_f32s(one, simd.add_f32s(one, w)))
}

/// `1 / (1 + e^-x)` within 3 ulp; 0 below -87.7, where the value would be subnormal.
#[inline(always)]
pub fn sigmoid<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let (w, r) = halves(simd, x);
    let negative = simd.less_than_f32s(x, simd.splat_f32s(0.0));
    simd.select_f32s(negative, simd.mul_f32s(w, r), r)
}

/// Derivative of [`sigmoid`], `s (1 - s)`.
#[inline(always)]
pub fn sigmoid_derivative<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let (w, r) = halves(simd, x);
    simd.mul_f32s(simd.mul_f32s(w, r), r)
}

/// `x sigmoid(x)` within 3.5 ulp; -0 at -inf, inf at inf.
#[inline(always)]
pub fn silu<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    simd.mul_f32s(clamp_below(simd, x, -110.0), sigmoid(simd, x))
}

/// [`silu`] and its derivative `s (1 + x (1 - s))` with `s = sigmoid(x)`; the derivative is 0 at -inf, 1 at inf.
#[inline(always)]
pub fn silu_with_derivative<S: Simd>(simd: S, x: S::f32s) -> (S::f32s, S::f32s) {
    let low = clamp_below(simd, x, -110.0);
    let (w, r) = halves(simd, x);
    let rest = simd.mul_f32s(w, r);
    let negative = simd.less_than_f32s(x, simd.splat_f32s(0.0));
    // 1 - s is the other of the two, so that it does not cancel where s is near 1.
    let s = simd.select_f32s(negative, rest, r);
    let other = simd.select_f32s(negative, r, rest);
    let bounded = clamp_above(simd, low, 110.0);
    let slope = simd.mul_add_e_f32s(bounded, other, simd.splat_f32s(1.0));
    (simd.mul_f32s(low, s), simd.mul_f32s(s, slope))
}

/// Derivative of [`silu`], see [`silu_with_derivative`].
#[inline(always)]
pub fn silu_derivative<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    silu_with_derivative(simd, x).1
}

/// `ln(1 + e^x)` within 3 ulp (0 where it would be below 2^-126.5), and `x` itself above [`SOFTPLUS_THRESHOLD`].
#[inline(always)]
pub fn softplus<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // max(x, 0) + ln(1 + w) with w = e^-|x| in 0..=1, and ln(1 + w) = 2 atanh(w / (2 + w)).
    let w = exp_of_negative(simd, simd.neg_f32s(simd.abs_f32s(x)));
    let s = simd.div_f32s(w, simd.add_f32s(w, simd.splat_f32s(2.0)));
    let q = simd.mul_f32s(s, s);
    let tail = simd.mul_f32s(simd.mul_f32s(s, q), polynomial(simd, q, ATANH));
    let ln = simd.add_f32s(simd.add_f32s(s, s), tail);
    let sum = simd.add_f32s(clamp_below(simd, x, 0.0), ln);
    let identity = simd.less_than_f32s(simd.splat_f32s(SOFTPLUS_THRESHOLD), x);
    simd.select_f32s(identity, x, sum)
}

/// Derivative of [`softplus`]: the sigmoid, and 1 above [`SOFTPLUS_THRESHOLD`].
#[inline(always)]
pub fn softplus_derivative<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let identity = simd.less_than_f32s(simd.splat_f32s(SOFTPLUS_THRESHOLD), x);
    simd.select_f32s(identity, simd.splat_f32s(1.0), sigmoid(simd, x))
}
