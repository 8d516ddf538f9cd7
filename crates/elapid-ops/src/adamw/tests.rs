//! The update against f64 over several steps, and the details of PyTorch's AdamW.

use proptest::prelude::*;

use super::*;
use crate::testing::{close, on_threads, random, widen};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn several_steps_agree_with_the_reference(
        count in 1usize..100, weight_decay in 0.0f64..0.5, beta2 in 0.9f64..0.9999,
        grad_scale in 0.01f32..1.0, seed in 0u64..1000,
    ) {
        let options = AdamW { learning_rate: 3e-3, beta2, weight_decay, ..AdamW::default() };
        let (mut p, mut m, mut v) = (random(seed, count), vec![0.0; count], vec![0.0; count]);
        let (mut wide_p, mut wide_m, mut wide_v) = (widen(&p), vec![0.0; count], vec![0.0; count]);
        for step in 1..=12 {
            let g = random(seed * 100 + step, count);
            options.step(&mut p, &g, &mut m, &mut v, step, grad_scale).unwrap();
            let wide = [&mut wide_p[..], &mut wide_m[..], &mut wide_v[..]];
            reference::step(wide, &widen(&g), &options, step, f64::from(grad_scale));
        }
        close("p", &widen(&p), &wide_p, 2e-6);
        close("m", &widen(&m), &wide_m, 1e-6);
        close("v", &widen(&v), &wide_v, 1e-6);
    }
}

#[test]
fn the_first_step_moves_by_the_learning_rate_and_decays_apart_from_the_gradient() {
    // With bias correction m / sqrt(v) is the gradient's sign, whatever its size; the decay is lr * 0.1 * p.
    let options = AdamW { learning_rate: 0.01, weight_decay: 0.1, ..AdamW::default() };
    let mut p = [1.0f32, 1.0, -2.0, 0.5];
    let (mut m, mut v) = ([0.0; 4], [0.0; 4]);
    options.step(&mut p, &[1e-3, -50.0, 0.0, 2.0], &mut m, &mut v, 1, 1.0).unwrap();
    let want = [0.999 - 0.01, 0.999 + 0.01, -1.998, 0.4995 - 0.01];
    close("p", &widen(&p), &want, 2e-7);
    close("m", &widen(&m), &[1e-4, -5.0, 0.0, 0.2], 1e-7);
    close("v", &widen(&v), &[1e-9, 2.5, 0.0, 4e-3], 1e-7);
}

#[test]
fn epsilon_is_added_after_the_correction_of_the_second_moment() {
    // One step from zero with g = 1e-8 and eps = 1e-8: the corrected root is 1e-8, so half a step is made. Added
    // before the correction, eps would weigh 31 times as much.
    let options = AdamW { learning_rate: 1.0, weight_decay: 0.0, ..AdamW::default() };
    let (mut p, mut m, mut v) = ([0.0f32], [0.0], [0.0]);
    options.step(&mut p, &[1e-8], &mut m, &mut v, 1, 1.0).unwrap();
    assert!((p[0] + 0.5).abs() < 1e-4, "{}", p[0]);
}

#[test]
fn blocks_do_not_show() {
    let count = 50_001;
    let run = |threads| {
        on_threads(threads, || {
            let (mut p, mut m, mut v) = (random(1, count), random(2, count), random(3, count));
            v.iter_mut().for_each(|v| *v = v.abs());
            AdamW::default().step(&mut p, &random(4, count), &mut m, &mut v, 7, 0.5).unwrap();
            (p, global_norm(&[&m, &v]))
        })
    };
    let (one, three) = (run(1), run(3));
    assert!(one.0 == three.0 && one.1.to_bits() == three.1.to_bits());
    // An element's update does not depend on where it stands.
    let (mut p, mut m, mut v) =
        ([random(1, count)[40_000]], [random(2, count)[40_000]], [random(3, count)[40_000].abs()]);
    let g = [random(4, count)[40_000]];
    AdamW::default().step(&mut p, &g, &mut m, &mut v, 7, 0.5).unwrap();
    assert_eq!(p[0].to_bits(), one.0[40_000].to_bits());
}

#[test]
fn the_norm_is_exact_and_honest() {
    let (a, b) = (random(1, 70_000), random(2, 33));
    let want: f64 = widen(&a).iter().chain(&widen(&b)).map(|x| x * x).sum::<f64>().sqrt();
    let got = global_norm(&[&a, &b]);
    assert!((got / want - 1.0).abs() < 1e-12, "{got} instead of {want}");
    assert_eq!(global_norm(&[]), 0.0);
    // Squares beyond the range of f32.
    let large = global_norm(&[&[3e38, 0.0], &[-2e38]]);
    assert!((large / (13f64.sqrt() * 1e38) - 1.0).abs() < 1e-6, "{large}");
    assert_eq!(global_norm(&[&a, &[f32::NEG_INFINITY]]), f64::INFINITY);
    assert!(global_norm(&[&[f32::INFINITY], &[f32::NAN], &b]).is_nan());
}

#[test]
fn lengths_and_step_are_checked() {
    let mut four = [0.0f32; 4];
    let (mut m, mut v) = ([0.0; 4], [0.0; 3]);
    let step = |p: &mut [f32], m: &mut [f32], v: &mut [f32], step| {
        AdamW::default().step(p, &[0.0; 4], m, v, step, 1.0)
    };
    let error = step(&mut four, &mut m, &mut v, 1).unwrap_err().to_string();
    assert!(error.contains("v has 3 elements, expected 4"), "{error}");
    let mut v = [0.0; 4];
    assert!(step(&mut four, &mut m, &mut v, 0).unwrap_err().to_string().contains("step is 0"));
    assert!(step(&mut four, &mut m, &mut v, 1).is_ok());
}
