//! Errors of the elementary functions against `f64` over the range of `f32`, and their special values, on the
//! instruction set of the machine and on the scalar one.

use pulp::{Scalar, Simd, WithSimd};

use super::*;

struct Apply<'a, Op>(Op, &'a [f32], &'a mut Vec<f32>);

impl<Op: Lanewise> WithSimd for Apply<'_, Op> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for x in self.1.chunks(S::F32_LANES) {
            let mut out = vec![0.0; x.len()];
            let y = self.0.apply(simd, simd.partial_load_f32s(x));
            simd.partial_store_f32s(&mut out, y);
            self.2.extend(out);
        }
    }
}

/// Distance of `got` from `want` in units of the last place of `want` as an `f32`.
fn ulps(got: f32, want: f64) -> f64 {
    let rounded = want as f32;
    if got == rounded || (got.is_nan() && want.is_nan()) {
        return 0.0;
    }
    if !rounded.is_finite() || !got.is_finite() {
        return f64::INFINITY;
    }
    let bits = rounded.abs().to_bits();
    let spacing = f64::from(f32::from_bits(bits + 1)) - f64::from(f32::from_bits(bits));
    (f64::from(got) - want).abs() / spacing
}

/// Every 257th bit pattern: all exponents, both signs, NaN and inf, and the neighbourhood of the special points.
fn values(step: usize) -> Vec<f32> {
    let mut values: Vec<f32> = (0..=u32::MAX).step_by(step).map(f32::from_bits).collect();
    values.extend((-120_000..=120_000).map(|i| i as f32 * 1e-3));
    values.extend([0.0, -0.0, 20.0, 20.000002, f32::INFINITY, f32::NEG_INFINITY, f32::NAN]);
    values
}

fn worst<Op: Lanewise>(op: Op, exact: fn(f64) -> f64, keep: fn(f32) -> bool) -> f64 {
    let mut worst = 0.0f64;
    for scalar in [false, true] {
        let x: Vec<f32> =
            values(if scalar { 65_537 } else { 4_099 }).into_iter().filter(|&x| keep(x)).collect();
        let mut y = Vec::with_capacity(x.len());
        if scalar {
            Scalar::new().vectorize(Apply(op, &x, &mut y));
        } else {
            dispatch(Apply(op, &x, &mut y));
        }
        for (&x, &y) in x.iter().zip(&y) {
            let error = ulps(y, exact(f64::from(x)));
            assert!(error <= 64.0, "{x:e}: {y:e} instead of {:e}", exact(f64::from(x)));
            worst = worst.max(error);
        }
    }
    worst
}

macro_rules! op {
    ($name:ident, $function:expr) => {
        #[derive(Clone, Copy)]
        struct $name;
        impl Lanewise for $name {
            #[inline(always)]
            fn apply<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
                $function(simd, x)
            }
        }
    };
}
op!(Exp, exp);
op!(Exp2, exp2);
op!(Decay, decay_exp2);
op!(DecayInRange, |simd, x| decay_exp2_in_range(simd, &decay_constants(simd), [x; 3])[1]);
op!(Sigmoid, sigmoid);
op!(Silu, silu);
op!(SiluDerivative, silu_derivative);
op!(Softplus, softplus);
op!(SoftplusDerivative, softplus_derivative);
op!(Sin, |simd, x| sin_cos(simd, x).0);
op!(Cos, |simd, x| sin_cos(simd, x).1);

fn sigmoid_f64(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn check(name: &str, worst: f64, limit: f64) {
    println!("{name}: {worst:.2} ulp");
    assert!(worst <= limit, "{name}: {worst} ulp, expected at most {limit}");
}

#[test]
fn exponentials_are_within_their_stated_errors() {
    check("exp", worst(Exp, f64::exp, |_| true), 1.1);
    check("exp2", worst(Exp2, f64::exp2, |_| true), 1.2);
    check(
        "decay_exp2",
        worst(Decay, f64::exp2, |x| (x >= -126.0 || x.is_nan()) && !(127.4..129.0).contains(&x)),
        2.2,
    );
    let small = worst(
        Decay,
        |x| if x < -126.5 { 0.0 } else { x.exp2() },
        |x| !(-126.6..-126.4).contains(&x) && !(127.4..129.0).contains(&x),
    );
    check("decay_exp2 with flush", small, 2.2);
    check("decay_exp2_in_range", worst(DecayInRange, f64::exp2, |x| x.abs() <= DECAY_RANGE), 2.2);
}

#[test]
fn both_decays_agree_bit_for_bit() {
    let x: Vec<f32> = values(4_099).into_iter().filter(|x| x.abs() <= DECAY_RANGE).collect();
    let (mut a, mut b) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    map(Decay, &x, &mut a);
    map(DecayInRange, &x, &mut b);
    for ((x, a), b) in x.iter().zip(&a).zip(&b) {
        assert_eq!(a.to_bits(), b.to_bits(), "at {x:e}");
    }
}

#[test]
fn activations_are_within_their_stated_errors() {
    let normal = |x: f32| x >= -87.3 || x.is_nan();
    check("sigmoid", worst(Sigmoid, sigmoid_f64, normal), 3.0);
    check(
        "silu",
        worst(Silu, |x| if x == f64::INFINITY { x } else { x * sigmoid_f64(x) }, normal),
        3.5,
    );
    let softplus_f64 = |x: f64| if x > 20.0 { x } else { x.exp().ln_1p() };
    check("softplus", worst(Softplus, softplus_f64, normal), 3.0);
    let derivative = |x: f64| if x > 20.0 { 1.0 } else { sigmoid_f64(x) };
    check("softplus'", worst(SoftplusDerivative, derivative, normal), 3.0);
}

#[test]
fn derivative_of_silu_is_absolutely_accurate() {
    // It crosses 0 near -1.28, so its error is counted against 1.
    let x: Vec<f32> = (-200_000..200_000).map(|i| i as f32 * 1e-3).collect();
    let mut y = vec![0.0; x.len()];
    map(SiluDerivative, &x, &mut y);
    for (&x, &y) in x.iter().zip(&y) {
        let (x, s) = (f64::from(x), sigmoid_f64(f64::from(x)));
        let want = s * (1.0 + x * (1.0 - s));
        assert!((f64::from(y) - want).abs() < 3e-7, "at {x}: {y} instead of {want}");
    }
}

#[test]
fn sine_and_cosine_are_absolutely_accurate() {
    let x: Vec<f32> = (-1_000_000..1_000_000).map(|i| i as f32 * 1e-2 + 3e-4).collect();
    let (mut sin, mut cos) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    map(Sin, &x, &mut sin);
    map(Cos, &x, &mut cos);
    for ((&x, &sin), &cos) in x.iter().zip(&sin).zip(&cos) {
        let (s, c) = f64::from(x).sin_cos();
        assert!((f64::from(sin) - s).abs() < 1.5e-7, "sin {x}: {sin} instead of {s}");
        assert!((f64::from(cos) - c).abs() < 1.5e-7, "cos {x}: {cos} instead of {c}");
    }
}

#[test]
fn special_values() {
    let inf = f32::INFINITY;
    let x = [inf, -inf, f32::NAN, 0.0];
    type Function = fn(&[f32], &mut [f32]);
    let cases: [(&str, Function, [f32; 4]); 9] = [
        ("exp", exp_slice, [inf, 0.0, f32::NAN, 1.0]),
        ("exp2", |x, y| map(Exp2, x, y), [inf, 0.0, f32::NAN, 1.0]),
        ("decay_exp2", |x, y| map(Decay, x, y), [inf, 0.0, f32::NAN, 1.0]),
        ("sigmoid", sigmoid_slice, [1.0, 0.0, f32::NAN, 0.5]),
        ("silu", silu_slice, [inf, 0.0, f32::NAN, 0.0]),
        ("silu'", |x, y| map(SiluDerivative, x, y), [1.0, 0.0, f32::NAN, 0.5]),
        ("softplus", softplus_slice, [inf, 0.0, f32::NAN, std::f32::consts::LN_2]),
        ("softplus'", |x, y| map(SoftplusDerivative, x, y), [1.0, 0.0, f32::NAN, 0.5]),
        ("sin", |x, y| map(Sin, x, y), [f32::NAN, f32::NAN, f32::NAN, 0.0]),
    ];
    for (name, function, want) in cases {
        let mut got = [7.0; 4];
        function(&x, &mut got);
        for (got, want) in got.iter().zip(want) {
            assert!(
                *got == want || (got.is_nan() && want.is_nan()),
                "{name}: {got} instead of {want}"
            );
        }
    }
}

#[test]
fn a_lane_gives_the_same_bits_wherever_it_stands() {
    let x: Vec<f32> = (0..67).map(|i| (i as f32 * 0.37).sin() * 9.0).collect();
    let dy: Vec<f32> = (0..67).map(|i| (i as f32 * 0.11).cos()).collect();
    let mut whole = vec![0.0; 67];
    silu_backward_slice(&x, &dy, &mut whole);
    for start in 0..20 {
        for len in 0..20 {
            let mut part = vec![0.0; len];
            silu_backward_slice(&x[start..start + len], &dy[start..start + len], &mut part);
            assert_eq!(part, whole[start..start + len], "from {start}, {len} values");
        }
    }
    let mut in_place = x.clone();
    map_in_place(Softplus, &mut in_place);
    softplus_slice(&x, &mut whole);
    assert_eq!(in_place, whole);
}
