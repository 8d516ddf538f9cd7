//! The reference against finite differences, printed values and closed forms; the CPU code against the
//! reference.

use elapid_tensor::Sequences;
use proptest::prelude::*;

use super::Case;
use super::case::{any_case, near, scattered};
use crate::testing::{check_gradient, dot, on_threads};

fn loss(case: &Case<f64>) -> f64 {
    let (y, last) = super::super::reference::forward(&case.arguments());
    dot(&y, &case.dy) + case.dlast.as_ref().map_or(0.0, |dlast| dot(&last, dlast))
}

#[test]
fn reference_gradients_agree_with_finite_differences() {
    let sequences = scattered(&[(3, true), (0, true), (2, false), (0, false), (1, true)]);
    for (groups, complex) in
        [([Some(2), Some(2)], false), ([None, Some(1)], false), ([Some(2), None], true)]
    {
        let case = Case::random(5, sequences.clone(), 4, 3, groups, complex).widen();
        let grad = case.run().grad;
        let with = |f: &dyn Fn(&mut Case<f64>)| {
            let mut case = case.clone();
            f(&mut case);
            loss(&case)
        };
        check_gradient("u", &grad.u, &case.u, |v| with(&|c| c.u = v.to_vec()));
        check_gradient("delta", &grad.delta, &case.delta, |v| with(&|c| c.delta = v.to_vec()));
        check_gradient("a", &grad.a, &case.a, |v| with(&|c| c.a = v.to_vec()));
        check_gradient("b", &grad.b, &case.b, |v| with(&|c| c.b = v.to_vec()));
        check_gradient("c", &grad.c, &case.c, |v| with(&|c| c.c = v.to_vec()));
        let (d, z) = (case.d.clone().unwrap(), case.z.clone().unwrap());
        check_gradient("d", &grad.d, &d, |v| with(&|c| c.d = Some(v.to_vec())));
        check_gradient("z", &grad.z, &z, |v| with(&|c| c.z = Some(v.to_vec())));
        let (bias, h0) = (case.bias.clone().unwrap(), case.h0.clone().unwrap());
        check_gradient("bias", &grad.delta_bias, &bias, |v| with(&|c| c.bias = Some(v.to_vec())));
        check_gradient("h0", &grad.h0, &h0, |v| with(&|c| c.h0 = Some(v.to_vec())));
    }
}

/// The set-up of mamba.md (f)2: D=3, L=7, N=4.
fn printed(sequences: Sequences) -> Case<f64> {
    let (channels, states, len) = (3, 4, 7);
    let rows = |f: &dyn Fn(f64, f64) -> f64, width: usize| -> Vec<f64> {
        (0..len * width).map(|i| f((i % width) as f64, (i / width) as f64)).collect()
    };
    Case {
        channels,
        states,
        complex: false,
        groups: [Some(1), Some(1)],
        u: rows(&|d, l| (0.7 * (d + 1.0) + 0.3 * l).sin(), channels),
        z: Some(rows(&|d, l| (0.5 * (d + 1.0) - 0.2 * l).cos(), channels)),
        delta: rows(&|d, l| 0.4 * (0.9 * l - 0.35 * (d + 1.0)).sin(), channels),
        bias: Some((0..channels).map(|d| -1.0 + 0.25 * d as f64).collect()),
        a: (0..channels * states).map(|i| -((i % states) as f64 + 1.0)).collect(),
        b: rows(&|n, l| (0.6 * n + 0.25 * l).cos(), states),
        c: rows(&|n, l| (0.4 * (n + 1.0) + 0.15 * l).sin(), states),
        d: Some((0..channels).map(|d| 0.5 + 0.1 * d as f64).collect()),
        softplus: true,
        h0: None,
        dy: rows(&|d, l| 1.0 / (1.0 + d + l), channels),
        dlast: None,
        sequences,
    }
}

/// The CPU code's view of an f64 case.
fn narrow(case: &Case<f64>) -> Case<f32> {
    let narrow = |v: &Vec<f64>| v.iter().map(|&v| v as f32).collect::<Vec<_>>();
    Case {
        channels: case.channels,
        states: case.states,
        complex: case.complex,
        groups: case.groups,
        sequences: case.sequences.clone(),
        u: narrow(&case.u),
        delta: narrow(&case.delta),
        a: narrow(&case.a),
        b: narrow(&case.b),
        c: narrow(&case.c),
        d: case.d.as_ref().map(narrow),
        z: case.z.as_ref().map(narrow),
        bias: case.bias.as_ref().map(narrow),
        softplus: case.softplus,
        h0: case.h0.as_ref().map(narrow),
        dy: narrow(&case.dy),
        dlast: case.dlast.as_ref().map(narrow),
    }
}

fn column(values: &[f64], width: usize, c: usize) -> Vec<f64> {
    values.iter().skip(c).step_by(width).copied().collect()
}

/// Values printed with ten decimals.
fn printed_equals(name: &str, got: &[f64], want: &[f64]) {
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() < 1e-9, "{name}[{i}]: {got} instead of {want}");
    }
}

#[test]
#[rustfmt::skip]
fn printed_values_of_mamba() {
    let case = printed(Sequences::fresh(&[7]));
    let got = case.run();
    let y = |c| column(&got.y, 3, c);
    printed_equals("y0", &y(0), &[0.3209769351, 0.5355963917, 0.6119700806, 0.5458729508, 0.4336803072, 0.3062789243, 0.1766792949]);
    printed_equals("y1", &y(1), &[0.3162076164, 0.5111098947, 0.5676800294, 0.4793352206, 0.3670326510, 0.2691472967, 0.1928023034]);
    printed_equals("y2", &y(2), &[0.0344431950, 0.1351130178, 0.1691195288, 0.1217497518, 0.0714416147, 0.0453237535, 0.0559326432]);
    printed_equals("last0", &got.last[..4], &[0.4936868630, -0.0550336897, -0.2543917511, -0.2711124260]);
    printed_equals("last2", &got.last[8..], &[0.0036611757, 0.1530037946, 0.2727289361, 0.2871106559]);
    printed_equals("loss", &[loss(&case)], &[1.903699681178]);
    printed_equals("dA0", &got.grad.a[..4], &[0.1823610211, 0.0566664482, -0.0048579493, -0.0194789337]);
    printed_equals("dbias", &got.grad.delta_bias, &[0.1760300628, 0.0742521467, 0.0392876776]);
    printed_equals("dD", &got.grad.d, &[1.3631729949, 0.6316663963, -0.0294270441]);
    printed_equals("du0", &column(&got.grad.u, 3, 0), &[0.6327224587, 0.3810303502, 0.2334107154, 0.1011042222, 0.0282623554, 0.0087839631, 0.0070286840]);
    printed_equals("ddelta0", &column(&got.grad.delta, 3, 0), &[0.1815314986, 0.1077758172, 0.0281346236, -0.0431050583, -0.0530330190, -0.0317979381, -0.0134758612]);
    printed_equals("dB0", &column(&got.grad.b, 4, 0), &[0.1768407224, 0.2458465451, 0.2906173617, 0.2293087182, 0.1016315852, 0.0172731678, -0.0094236033]);
    printed_equals("dC0", &column(&got.grad.c, 4, 0), &[0.1671940681, 0.2593032009, 0.2941724638, 0.2512475663, 0.1772516090, 0.1134476059, 0.0684393544]);
    printed_equals("dz00", &got.grad.z[..1], &[0.4600154478]);
    narrow(&case).run().near(&got, 2e-6);
}

#[test]
#[rustfmt::skip]
fn printed_values_of_packmamba() {
    let case = printed(Sequences::from_positions(&[0, 1, 2, 0, 1, 0, 1]).unwrap());
    let got = case.run();
    printed_equals("y0", &column(&got.y, 3, 0), &[0.3209769351, 0.5355963917, 0.6119700806, 0.2624519267, 0.2096081395, 0.0857957132, -0.0209370800]);
    printed_equals("y1", &column(&got.y, 3, 1), &[0.3162076164, 0.5111098947, 0.5676800294, 0.2060994627, 0.1550564441, 0.0272436473, -0.0266622870]);
    printed_equals("y2", &column(&got.y, 3, 2), &[0.0344431950, 0.1351130178, 0.1691195288, 0.0271615216, -0.0019632898, -0.0255176134, 0.0061069564]);
    narrow(&case).run().near(&got, 2e-6);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn cpu_agrees_with_the_reference(case in any_case(150)) {
        let got = case.run();
        got.near(&case.widen().run(), 5e-5);
        let (y, last) = case.forward();
        prop_assert_eq!((&y, &last), (&got.y, &got.last), "without saving for backward");
    }
}

#[test]
fn many_channels_states_and_partitions() {
    let sequences = scattered(&[(70, true), (200, false), (1, true)]);
    for (channels, states, groups) in [(200, 16, 1), (150, 17, 2), (9, 256, 1), (130, 1, 1)] {
        let groups = [Some(groups), Some(groups)];
        let case = Case::random(11, sequences.clone(), channels, states, groups, false);
        case.run().near(&case.widen().run(), 5e-5);
    }
    let case = Case::random(12, sequences, 140, 6, [Some(1), Some(1)], true);
    case.run().near(&case.widen().run(), 5e-5);
}

#[test]
fn long_sequences_cut_into_segments_agree_with_the_reference() {
    let sequences = scattered(&[(40, true), (5000, true), (4096, false), (3, false)]);
    for (groups, complex) in [([Some(1), Some(1)], false), ([None, Some(1)], true)] {
        let case = Case::random(21, sequences.clone(), 3, 4, groups, complex);
        let got = case.run();
        got.near(&case.widen().run(), 5e-5);
        for threads in [1, 3] {
            assert!(on_threads(threads, || case.run()) == got, "bits on {threads} threads");
        }
        let alone = case.alone(1).run();
        let from = 40 * 3;
        assert_eq!(alone.y, got.y[from..from + 5000 * 3]);
        assert_eq!(alone.grad.u, got.grad.u[from..from + 5000 * 3]);
    }
}

#[test]
fn large_exponents_are_clamped_not_wrapped() {
    let mut case = Case::random(3, Sequences::fresh(&[130]), 10, 8, [Some(1), Some(1)], false);
    case.h0 = None;
    for (i, a) in case.a.iter_mut().enumerate() {
        *a = -(i as f32) * 40.0;
    }
    case.run().near(&case.widen().run(), 5e-5);
}

#[test]
fn without_decay_the_state_is_a_sum() {
    let mut case = Case::random(4, Sequences::fresh(&[300]), 5, 3, [Some(1), Some(1)], false);
    case.a.fill(0.0);
    case.h0 = None;
    let (_, last) = case.forward();
    let wide = case.widen();
    let mut want = vec![0.0; 15];
    for t in 0..300 {
        for c in 0..5 {
            let delta = (wide.delta[t * 5 + c] + wide.bias.as_ref().unwrap()[c]).exp().ln_1p();
            for n in 0..3 {
                want[c * 3 + n] += delta * wide.b[t * 3 + n] * wide.u[t * 5 + c];
            }
        }
    }
    let last: Vec<f64> = last.iter().map(|&v| f64::from(v)).collect();
    near("last", &last, &want, 1e-6);
}

#[test]
fn constant_step_is_a_convolution() {
    // N=1, C=1, D=0, constant Δ and B: y_t = Σ_k Δ B e^{ΔA k} u_{t-k}.
    let len = 90;
    let mut case = Case::random(6, Sequences::fresh(&[len]), 2, 1, [None, None], false);
    (case.d, case.z, case.bias, case.h0, case.softplus) = (None, None, None, None, false);
    case.delta.fill(0.25);
    case.c.fill(1.0);
    let (y, _) = case.forward();
    let wide = case.widen();
    let mut want = vec![0.0; len * 2];
    for t in 0..len {
        for c in 0..2 {
            for k in 0..=t {
                let kernel = 0.25 * wide.b[c] * (0.25 * wide.a[c] * k as f64).exp();
                want[t * 2 + c] += kernel * wide.u[(t - k) * 2 + c];
            }
        }
    }
    near("y", &y.iter().map(|&v| f64::from(v)).collect::<Vec<_>>(), &want, 2e-6);
}

#[test]
fn the_initial_state_enters_linearly_and_fades() {
    // The state after the batch is that from zero plus exp(A ΣΔ) h0.
    let case = Case::random(8, scattered(&[(37, true)]), 6, 4, [Some(1), Some(1)], false);
    let mut zero = case.clone();
    zero.h0.as_mut().unwrap().fill(0.0);
    let (with, without) = (case.forward().1, zero.forward().1);
    let wide = case.widen();
    let slot = 6 * 4;
    let mut want = vec![0.0; 24];
    for c in 0..6 {
        let sum: f64 = (0..37)
            .map(|t| (wide.delta[t * 6 + c] + wide.bias.as_ref().unwrap()[c]).exp().ln_1p())
            .sum();
        for n in 0..4 {
            let i = c * 4 + n;
            want[i] = f64::from(without[slot + i])
                + (wide.a[i] * sum).exp() * wide.h0.as_ref().unwrap()[slot + i];
        }
    }
    let got: Vec<f64> = with[slot..2 * slot].iter().map(|&v| f64::from(v)).collect();
    near("last", &got, &want, 2e-6);
}
