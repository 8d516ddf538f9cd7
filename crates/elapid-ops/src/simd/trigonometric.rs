//! Sine and cosine together, for the rotation of complex states.

use pulp::Simd;

use super::polynomial;

const ROUND: f32 = 12_582_912.0;
/// pi/2 in three parts, the first two with few enough bits that products with a quadrant number are exact.
const HALF_PI: [f32; 3] = [1.570_312_5, 4.837_513e-4, 7.549_79e-8];
/// (sin x / x - 1) / x^2 in powers of x^2 on |x| <= pi/4.
const SIN: [f32; 3] = [-0.166_666_55, 0.008_332_173, -0.000_195_166_55];
/// (cos x - 1 + x^2 / 2) / x^4 in powers of x^2 on |x| <= pi/4.
const COS: [f32; 3] = [0.041_666_646, -0.001_388_736_2, 2.443_772_8e-5];

/// Sine and cosine of `x`, absolute error below 1.5e-7 for |x| <= 10,000 (it grows with |x| beyond); NaN and inf
/// give NaN.
#[inline(always)]
pub fn sin_cos<S: Simd>(simd: S, x: S::f32s) -> (S::f32s, S::f32s) {
    let round = simd.splat_f32s(ROUND);
    let t = simd.mul_add_e_f32s(x, simd.splat_f32s(std::f32::consts::FRAC_2_PI), round);
    let n = simd.sub_f32s(t, round);
    let mut r = x;
    for part in HALF_PI {
        r = simd.mul_add_e_f32s(n, simd.splat_f32s(-part), r);
    }
    let q = simd.mul_f32s(r, r);
    let sin = simd.mul_add_e_f32s(simd.mul_f32s(r, q), polynomial(simd, q, SIN), r);
    let half = simd.mul_add_e_f32s(q, simd.splat_f32s(-0.5), simd.splat_f32s(1.0));
    let cos = simd.mul_add_e_f32s(simd.mul_f32s(q, q), polynomial(simd, q, COS), half);

    // Odd quadrants swap the two; sine is negative in quadrants 2 and 3, cosine in 1 and 2.
    let quadrant = simd.transmute_u32s_f32s(t);
    let one = simd.splat_u32s(1);
    let two = simd.splat_u32s(2);
    let to_sign = simd.splat_u32s(30);
    let swap = simd.equal_u32s(simd.and_u32s(quadrant, one), one);
    let sin_sign = simd.wrapping_dyn_shl_u32s(simd.and_u32s(quadrant, two), to_sign);
    let cos_sign =
        simd.wrapping_dyn_shl_u32s(simd.and_u32s(simd.add_u32s(quadrant, one), two), to_sign);
    let flip = |value: S::f32s, sign: S::u32s| {
        simd.transmute_f32s_u32s(simd.xor_u32s(simd.transmute_u32s_f32s(value), sign))
    };
    (
        flip(simd.select_f32s(swap, cos, sin), sin_sign),
        flip(simd.select_f32s(swap, sin, cos), cos_sign),
    )
}
