//! Sigmoid, SiLU and softplus with their derivatives.
//!
//! Each is a chain of some eighty cycles, of which a processor that looks ahead by a few hundred instructions
//! overlaps two or three. The forms ending in `_each` therefore work on several vectors step by step; the others
//! are these with one vector, so their bits are the same.

use pulp::Simd;

use super::exponential::exp_of_negative_each;
use super::{clamp_above, clamp_below, polynomial_each};

/// Above this, softplus is the identity and its derivative 1, as in the kernels of Mamba.
pub const SOFTPLUS_THRESHOLD: f32 = 20.0;

/// (2 atanh s - 2 s) / s^3 in powers of s^2 on 0 <= s <= 1/3, relative error of 2 atanh s 4.6e-9.
const ATANH: [f32; 4] = [0.666_664_1, 0.400_217, 0.279_991_4, 0.280_244_65];

/// `w = e^-|x|`, of which everything here is made without overflow.
#[inline(always)]
fn exp_of_size_each<S: Simd, const K: usize>(simd: S, x: [S::f32s; K]) -> [S::f32s; K] {
    let mut w = x;
    for w in &mut w {
        *w = simd.neg_f32s(simd.abs_f32s(*w));
    }
    exp_of_negative_each(simd, w)
}

/// `1 / (1 + w)`
#[inline(always)]
fn reciprocals<S: Simd, const K: usize>(simd: S, w: [S::f32s; K]) -> [S::f32s; K] {
    let one = simd.splat_f32s(1.0);
    let mut r = w;
    for r in &mut r {
        *r = simd.div_f32s(one, simd.add_f32s(one, *r));
    }
    r
}

/// The sigmoid from `w = e^-|x|` and `r = 1 / (1 + w)`.
#[inline(always)]
fn sigmoid_from<S: Simd, const K: usize>(
    simd: S,
    x: [S::f32s; K],
    w: [S::f32s; K],
    r: [S::f32s; K],
) -> [S::f32s; K] {
    let mut s = r;
    for i in 0..K {
        let negative = simd.less_than_f32s(x[i], simd.splat_f32s(0.0));
        s[i] = simd.select_f32s(negative, simd.mul_f32s(w[i], r[i]), r[i]);
    }
    s
}

/// [`sigmoid`] of several vectors.
#[inline(always)]
pub fn sigmoid_each<S: Simd, const K: usize>(simd: S, x: [S::f32s; K]) -> [S::f32s; K] {
    let w = exp_of_size_each(simd, x);
    sigmoid_from(simd, x, w, reciprocals(simd, w))
}

/// `1 / (1 + e^-x)` within 3 ulp; 0 below -87.7, where the value would be subnormal.
#[inline(always)]
pub fn sigmoid<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let [s] = sigmoid_each(simd, [x]);
    s
}

/// Derivative of [`sigmoid`], `s (1 - s)`.
#[inline(always)]
pub fn sigmoid_derivative<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let [w] = exp_of_size_each(simd, [x]);
    let [r] = reciprocals(simd, [w]);
    simd.mul_f32s(simd.mul_f32s(w, r), r)
}

/// [`silu`] of several vectors.
#[inline(always)]
pub fn silu_each<S: Simd, const K: usize>(simd: S, x: [S::f32s; K]) -> [S::f32s; K] {
    let mut y = sigmoid_each(simd, x);
    for (y, x) in y.iter_mut().zip(x) {
        *y = simd.mul_f32s(clamp_below(simd, x, -110.0), *y);
    }
    y
}

/// `x sigmoid(x)` within 3.5 ulp; -0 at -inf, inf at inf.
#[inline(always)]
pub fn silu<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let [y] = silu_each(simd, [x]);
    y
}

/// [`silu_with_derivative`] of several vectors.
#[inline(always)]
pub fn silu_with_derivative_each<S: Simd, const K: usize>(
    simd: S,
    x: [S::f32s; K],
) -> ([S::f32s; K], [S::f32s; K]) {
    let w = exp_of_size_each(simd, x);
    let r = reciprocals(simd, w);
    let (mut value, mut derivative) = (r, r);
    for i in 0..K {
        let low = clamp_below(simd, x[i], -110.0);
        let rest = simd.mul_f32s(w[i], r[i]);
        let negative = simd.less_than_f32s(x[i], simd.splat_f32s(0.0));
        // 1 - s is the other of the two, so that it does not cancel where s is near 1.
        let s = simd.select_f32s(negative, rest, r[i]);
        let other = simd.select_f32s(negative, r[i], rest);
        let bounded = clamp_above(simd, low, 110.0);
        let slope = simd.mul_add_e_f32s(bounded, other, simd.splat_f32s(1.0));
        value[i] = simd.mul_f32s(low, s);
        derivative[i] = simd.mul_f32s(s, slope);
    }
    (value, derivative)
}

/// [`silu`] and its derivative `s (1 + x (1 - s))` with `s = sigmoid(x)`; the derivative is 0 at -inf, 1 at inf.
#[inline(always)]
pub fn silu_with_derivative<S: Simd>(simd: S, x: S::f32s) -> (S::f32s, S::f32s) {
    let ([value], [derivative]) = silu_with_derivative_each(simd, [x]);
    (value, derivative)
}

/// Derivative of [`silu`], see [`silu_with_derivative`].
#[inline(always)]
pub fn silu_derivative<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    silu_with_derivative(simd, x).1
}

/// Softplus from `w = e^-|x|`.
#[inline(always)]
fn softplus_from<S: Simd, const K: usize>(
    simd: S,
    x: [S::f32s; K],
    w: [S::f32s; K],
) -> [S::f32s; K] {
    // max(x, 0) + ln(1 + w) with w in 0..=1, and ln(1 + w) = 2 atanh(w / (2 + w)).
    let mut s = w;
    for s in &mut s {
        *s = simd.div_f32s(*s, simd.add_f32s(*s, simd.splat_f32s(2.0)));
    }
    let mut q = s;
    for q in &mut q {
        *q = simd.mul_f32s(*q, *q);
    }
    let mut y = polynomial_each(simd, q, ATANH);
    for i in 0..K {
        let tail = simd.mul_f32s(simd.mul_f32s(s[i], q[i]), y[i]);
        let ln = simd.add_f32s(simd.add_f32s(s[i], s[i]), tail);
        let sum = simd.add_f32s(clamp_below(simd, x[i], 0.0), ln);
        let identity = simd.less_than_f32s(simd.splat_f32s(SOFTPLUS_THRESHOLD), x[i]);
        y[i] = simd.select_f32s(identity, x[i], sum);
    }
    y
}

/// [`softplus`] of several vectors.
#[inline(always)]
pub fn softplus_each<S: Simd, const K: usize>(simd: S, x: [S::f32s; K]) -> [S::f32s; K] {
    softplus_from(simd, x, exp_of_size_each(simd, x))
}

/// [`softplus_each`] and the derivatives, which share the exponential.
#[inline(always)]
pub fn softplus_with_derivative_each<S: Simd, const K: usize>(
    simd: S,
    x: [S::f32s; K],
) -> ([S::f32s; K], [S::f32s; K]) {
    let w = exp_of_size_each(simd, x);
    let mut derivative = sigmoid_from(simd, x, w, reciprocals(simd, w));
    for (derivative, x) in derivative.iter_mut().zip(x) {
        let identity = simd.less_than_f32s(simd.splat_f32s(SOFTPLUS_THRESHOLD), x);
        *derivative = simd.select_f32s(identity, simd.splat_f32s(1.0), *derivative);
    }
    (softplus_from(simd, x, w), derivative)
}

/// `ln(1 + e^x)` within 3 ulp (0 where it would be below 2^-126.5), and `x` itself above [`SOFTPLUS_THRESHOLD`].
#[inline(always)]
pub fn softplus<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let [y] = softplus_each(simd, [x]);
    y
}

/// Derivative of [`softplus`]: the sigmoid, and 1 above [`SOFTPLUS_THRESHOLD`].
#[inline(always)]
pub fn softplus_derivative<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let (_, [derivative]) = softplus_with_derivative_each(simd, [x]);
    derivative
}
