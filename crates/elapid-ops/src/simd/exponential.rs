//! `exp` and `exp2`: split the argument into an integer and a remainder of at most one half (in powers of two),
//! evaluate a polynomial on the remainder, put the integer into the exponent. Adding 1.5 * 2^23 rounds to an
//! integer and leaves it in the low bits of the sum, which saves every conversion between float and integer.
//! The polynomials are minimax fits of the relative error.

use pulp::Simd;

use super::{clamp_above, clamp_below, polynomial, polynomial_each};

/// Adding this to |x| < 2^22 rounds x to the nearest integer, which then stands in the low bits.
const ROUND: f32 = 12_582_912.0;
/// The bias of the exponent field.
const BIAS: f32 = 127.0;
/// First bit of the exponent field.
const EXPONENT_SHIFT: u32 = 23;

/// (2^r - 1) / r on |r| <= 1/2, relative error of 2^r 9.2e-8.
// Its first coefficient is near ln 2 but not ln 2.
#[allow(clippy::approx_constant)]
const EXP2_SHORT: [f32; 5] = [0.693147, 0.24022242, 0.055507336, 0.009671513, 0.0013264724];
/// (2^r - 1) / r on |r| <= 1/2, relative error of 2^r 2.0e-9.
const EXP2_LONG: [f32; 6] =
    [std::f32::consts::LN_2, 0.24022648, 0.055503324, 0.009618437, 0.0013398875, 0.0001535336];
/// (e^r - 1 - r) / r^2 on |r| <= ln(2)/2, relative error of e^r 3.1e-9.
const EXP: [f32; 5] = [0.49999994, 0.16666521, 0.04166839, 0.0083687175, 0.0013814596];

/// ln 2 in two parts, the first with few enough bits that its product with an exponent is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// [`decay_exp2_in_range`] may be used while |x| is at most this.
pub const DECAY_RANGE: f32 = 125.0;

/// Two to the power of the integer in the low bits of `rounded`, which must be in -127 (giving 0) to 128 (inf).
#[inline(always)]
fn power_of_two<S: Simd>(simd: S, biased: S::f32s) -> S::f32s {
    let bits = simd.transmute_u32s_f32s(biased);
    let shift = simd.splat_u32s(EXPONENT_SHIFT);
    simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(bits, shift))
}

/// `p * 2^n` for integral `n` from -252 to 254, in two steps so that results down to the smallest subnormal and
/// up to infinity come out rounded once.
#[inline(always)]
fn scale_by_power<S: Simd>(simd: S, p: S::f32s, n: S::f32s) -> S::f32s {
    let round = simd.splat_f32s(ROUND);
    let half = simd.mul_add_e_f32s(n, simd.splat_f32s(0.5), round);
    let first = simd.sub_f32s(half, round);
    let rest = simd.sub_f32s(n, first);
    let biased = simd.splat_f32s(ROUND + BIAS);
    let a = power_of_two(simd, simd.add_f32s(first, biased));
    let b = power_of_two(simd, simd.add_f32s(rest, biased));
    simd.mul_f32s(simd.mul_f32s(p, a), b)
}

/// `e^x` within 1.1 ulp over the whole range, subnormal results included; inf, 0 and NaN come out as such.
#[inline(always)]
pub fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let x = clamp_above(simd, clamp_below(simd, x, -105.0), 90.0);
    let round = simd.splat_f32s(ROUND);
    let t = simd.mul_add_e_f32s(x, simd.splat_f32s(std::f32::consts::LOG2_E), round);
    let n = simd.sub_f32s(t, round);
    let r = simd.mul_add_e_f32s(n, simd.splat_f32s(-LN2_HIGH), x);
    let r = simd.mul_add_e_f32s(n, simd.splat_f32s(-LN2_LOW), r);
    let q = polynomial(simd, r, EXP);
    let p = simd.mul_add_e_f32s(simd.mul_f32s(r, r), q, r);
    scale_by_power(simd, simd.add_f32s(p, simd.splat_f32s(1.0)), n)
}

/// `e^x` for `x <= 0` or NaN, within 1.1 ulp; results below 2^-126.5 become 0, which saves the second scaling.
/// Step by step for several vectors, see [`decay_exp2_in_range`].
#[inline(always)]
pub(super) fn exp_of_negative_each<S: Simd, const K: usize>(
    simd: S,
    x: [S::f32s; K],
) -> [S::f32s; K] {
    let round = simd.splat_f32s(ROUND + BIAS);
    let (mut r, mut t) = (x, x);
    for (r, t) in r.iter_mut().zip(&mut t) {
        *r = clamp_below(simd, *r, -88.0);
        *t = simd.mul_add_e_f32s(*r, simd.splat_f32s(std::f32::consts::LOG2_E), round);
    }
    for (r, &t) in r.iter_mut().zip(&t) {
        let n = simd.sub_f32s(t, round);
        *r = simd.mul_add_e_f32s(n, simd.splat_f32s(-LN2_HIGH), *r);
        *r = simd.mul_add_e_f32s(n, simd.splat_f32s(-LN2_LOW), *r);
    }
    let mut p = polynomial_each(simd, r, EXP);
    for i in 0..K {
        p[i] = simd.mul_add_e_f32s(simd.mul_f32s(r[i], r[i]), p[i], r[i]);
        p[i] = simd.add_f32s(p[i], simd.splat_f32s(1.0));
        p[i] = simd.mul_f32s(p[i], power_of_two(simd, t[i]));
    }
    p
}

/// `2^x` within 1.2 ulp over the whole range, subnormal results included; inf, 0 and NaN come out as such.
#[inline(always)]
pub fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let x = clamp_above(simd, clamp_below(simd, x, -151.0), 129.0);
    let round = simd.splat_f32s(ROUND);
    let n = simd.sub_f32s(simd.add_f32s(x, round), round);
    let r = simd.sub_f32s(x, n);
    let p = simd.mul_add_e_f32s(polynomial(simd, r, EXP2_LONG), r, simd.splat_f32s(1.0));
    scale_by_power(simd, p, n)
}

/// `2^x` for the decay of a scan: within 2.2 ulp for -126.5 < x < 127.5, exactly 1 at 0, inf above, 0 below,
/// NaN stays NaN. Where |x| <= [`DECAY_RANGE`] its bits are those of [`decay_exp2_in_range`].
#[inline(always)]
pub fn decay_exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let x = clamp_above(simd, clamp_below(simd, x, -127.0), 128.0);
    let round = simd.splat_f32s(ROUND + BIAS);
    let t = simd.add_f32s(x, round);
    let r = simd.sub_f32s(x, simd.sub_f32s(t, round));
    let p = simd.mul_add_e_f32s(polynomial(simd, r, EXP2_SHORT), r, simd.splat_f32s(1.0));
    simd.mul_f32s(p, power_of_two(simd, t))
}

/// The constants of [`decay_exp2_in_range`] as vectors.
pub type DecayConstants<S> = [<S as Simd>::f32s; 7];

/// The constants for [`decay_exp2_in_range`]. Give them to it through [`std::hint::black_box`] of a reference:
/// then they stay operands in memory, where the compiler would otherwise load each one anew for every use.
#[inline(always)]
pub fn decay_constants<S: Simd>(simd: S) -> DecayConstants<S> {
    let [a, b, c, d, e] = EXP2_SHORT;
    let mut constants = [simd.splat_f32s(ROUND); 7];
    // No `map`: the closure would be compiled, and called, without the kernel's instruction set.
    for (constant, value) in constants[1..].iter_mut().zip([e, d, c, b, a, 1.0]) {
        *constant = simd.splat_f32s(value);
    }
    constants
}

/// [`decay_exp2`] of several vectors without its clamps, for |x| <= [`DECAY_RANGE`]: the integer is added to the
/// exponent field, so that neither comparison nor multiplication is spent on it. Outside of that range the
/// result means nothing.
///
/// Step by step for all vectors, because one alone is a chain of some forty cycles and processors look ahead by
/// few such chains.
#[inline(always)]
pub fn decay_exp2_in_range<S: Simd, const K: usize>(
    simd: S,
    constants: &DecayConstants<S>,
    x: [S::f32s; K],
) -> [S::f32s; K] {
    let round = constants[0];
    let mut t = x;
    for t in &mut t {
        *t = simd.add_f32s(*t, round);
    }
    let mut r = x;
    for (r, &t) in r.iter_mut().zip(&t) {
        *r = simd.sub_f32s(*r, simd.sub_f32s(t, round));
    }
    let mut p = [constants[1]; K];
    for &c in &constants[2..] {
        for (p, &r) in p.iter_mut().zip(&r) {
            *p = simd.mul_add_e_f32s(*p, r, c);
        }
    }
    let shift = simd.splat_u32s(EXPONENT_SHIFT);
    for (p, &t) in p.iter_mut().zip(&t) {
        let n = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(t), shift);
        *p = simd.transmute_f32s_u32s(simd.add_u32s(simd.transmute_u32s_f32s(*p), n));
    }
    p
}
