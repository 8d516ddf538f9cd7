//! The scan of tensors on GPUs, emulated and the card, complex and with constant B or C, against the reference.

use elapid_tensor::autograd::backward;
use elapid_tensor::{DType, Device, Sequences, Tensor};

use super::super::{Gradients, Inputs, selective_scan};
use super::Case;
use super::case::{Results, near, scattered};
use crate::testing::{devices, random_tensor};

/// Everything, by the operation on tensors of a GPU whose rows lie apart, in `dtype` where they may be of that type.
pub(super) fn run(case: &Case<f32>, device: Device, dtype: DType) -> Results<f64> {
    let (e, n) = (case.channels, case.states);
    let (tokens, slots) = (case.sequences.tokens(), case.sequences.slots());
    let number: &[usize] = if case.complex { &[2] } else { &[] };
    let shape = |first: &[usize]| [first, number].concat();
    let whole = |values: &[f32], shape: &[usize]| {
        Tensor::from_slice(values, shape).unwrap().to(device).unwrap().requires_grad()
    };
    let rows = |values: &[f32], shape: &[usize]| {
        let width = shape[1..].iter().product();
        let values = Tensor::from_slice(values, [tokens, width]).unwrap();
        let gap = Tensor::from_slice(&vec![f32::NAN; tokens * 3], [tokens, 3]).unwrap();
        let wide = Tensor::concat(&[&values, &gap], 1).unwrap();
        let wide = wide.cast(dtype).unwrap().to(device).unwrap();
        wide.narrow(1, 0, width).unwrap().reshape(shape).unwrap().requires_grad()
    };
    let map = |values: &[f32], groups: Option<usize>| match groups {
        Some(groups) => rows(values, &shape(&[tokens, groups, n])),
        None => whole(values, &shape(&[e, n])),
    };
    let vector = |values: &Option<Vec<f32>>| values.as_ref().map(|v| whole(v, &[e]));
    let state = |values: &Option<Vec<f32>>| {
        values.as_ref().map(|values| whole(values, &shape(&[slots, e, n])))
    };
    let (u, delta) = (rows(&case.u, &[tokens, e]), rows(&case.delta, &[tokens, e]));
    let a = whole(&case.a, &shape(&[e, n]));
    let (b, c) = (map(&case.b, case.groups[0]), map(&case.c, case.groups[1]));
    let (d, bias, h0) = (vector(&case.d), vector(&case.bias), state(&case.h0));
    let z = case.z.as_ref().map(|z| rows(z, &[tokens, e]));
    let inputs = Inputs {
        u: &u,
        delta: &delta,
        a: &a,
        b: &b,
        c: &c,
        d: d.as_ref(),
        z: z.as_ref(),
        delta_bias: bias.as_ref(),
        delta_softplus: case.softplus,
        state: h0.as_ref(),
    };
    let (y, last) = selective_scan(&inputs, &case.sequences).unwrap();
    let mut roots = vec![(&y, Some(rows(&case.dy, &[tokens, e]).detach()))];
    if let Some(dlast) = state(&case.dlast) {
        roots.push((&last, Some(dlast.detach())));
    }
    let wanted = [Some(&u), Some(&delta), Some(&a), Some(&b), Some(&c)];
    let wanted = wanted.into_iter().chain([d.as_ref(), z.as_ref(), bias.as_ref(), h0.as_ref()]);
    let wanted: Vec<Option<&Tensor>> = wanted.collect();
    let there: Vec<&Tensor> = wanted.iter().copied().flatten().collect();
    let mut grads = backward(&roots, &there).unwrap().into_iter();
    let values = |tensor: &Tensor| tensor.to(Device::Cpu).unwrap().to_f64_vec().unwrap();
    let mut next = wanted.into_iter().map(|input| {
        let Some(input) = input else { return Vec::new() };
        let grad = grads.next().flatten().expect("a gradient of every input");
        assert_eq!(grad.shape(), input.shape());
        assert_eq!(grad.dtype(), input.dtype());
        values(&grad)
    });
    let mut next = || next.next().unwrap();
    let grad = Gradients {
        u: next(),
        delta: next(),
        a: next(),
        b: next(),
        c: next(),
        d: next(),
        z: next(),
        delta_bias: next(),
        h0: next(),
    };
    Results { y: values(&y), last: values(&last), grad }
}

/// The GPUs that there are.
pub(super) fn cards() -> impl Iterator<Item = Device> {
    devices().into_iter().filter(|device| *device != Device::Cpu)
}

fn check(mut case: Case<f32>, dtype: DType) {
    let tolerance = if dtype == DType::F32 { 1e-5 } else { 1e-2 };
    // What is typed is rounded, so that only the arithmetic differs.
    let round = |values: &mut Vec<f32>| {
        let rounded = Tensor::from_slice(values, [values.len()]).unwrap().cast(dtype).unwrap();
        *values = rounded.to_f64_vec().unwrap().iter().map(|&v| v as f32).collect();
    };
    [&mut case.u, &mut case.delta, &mut case.dy].into_iter().chain(&mut case.z).for_each(round);
    for (map, groups) in [&mut case.b, &mut case.c].into_iter().zip(case.groups) {
        if groups.is_some() {
            round(map);
        }
    }
    let want = case.widen().run();
    for device in cards() {
        let got = run(&case, device, dtype);
        for ((name, got), (_, want)) in got.named().iter().zip(want.named()) {
            near(name, got, want, tolerance);
        }
    }
}

const LENGTHS: [(usize, bool); 6] =
    [(18, true), (0, true), (1, false), (0, false), (77, false), (2, true)];

fn random(
    seed: u64,
    (e, n): (usize, usize),
    groups: [Option<usize>; 2],
    complex: bool,
) -> Case<f32> {
    Case::random(seed, scattered(&LENGTHS), e, n, groups, complex)
}

#[test]
fn complex_states() {
    check(random(31, (33, 5), [Some(1), Some(1)], true), DType::F32);
    check(random(32, (17, 16), [None, None], true), DType::BF16);
    check(random(33, (9, 20), [Some(1), None], true), DType::F32);
    check(random(34, (6, 16), [Some(2), Some(2)], true), DType::BF16);
}

#[test]
fn constant_maps() {
    check(random(41, (6, 16), [None, Some(2)], false), DType::BF16);
    check(random(42, (9, 40), [None, None], false), DType::F32);
    check(random(43, (8, 1), [Some(1), None], false), DType::F32);
}

#[test]
fn more_states_than_lanes_and_several_passes() {
    // Two tiles, the first of 24 channels in three passes, the second of two in one.
    check(random(51, (26, 40), [Some(1), Some(1)], true), DType::F32);
    let sequences = scattered(&[(9, true), (3, false)]);
    let case = Case::random(52, sequences, 9, 256, [Some(1), Some(1)], true);
    check(case, DType::F32);
}

#[test]
fn what_is_optional_may_be_missing() {
    let sequences = Sequences::fresh(&[40, 3]);
    let mut case = Case::random(61, sequences, 12, 5, [Some(2), Some(2)], true);
    (case.d, case.z, case.bias, case.h0, case.dlast) = (None, None, None, None, None);
    check(case.clone(), DType::F32);
    case.softplus = false;
    case.delta.iter_mut().for_each(|v| *v = v.abs() * 0.1 + 0.02);
    check(case, DType::F32);
    check(Case::random(62, Sequences::fresh(&[]), 12, 5, [Some(2), Some(2)], true), DType::F32);
}

#[test]
fn nan_stays_in_its_document_and_a_batch_is_its_sequences() {
    let sequences = scattered(&[(20, true), (66, true), (5, false)]);
    let (e, n) = (6, 5);
    for (groups, complex) in [([Some(2), Some(2)], true), ([None, Some(2)], false)] {
        let clean = Case::random(71, sequences.clone(), e, n, groups, complex);
        let parts = if complex { 2 } else { 1 };
        let (matrix, map) = (e * n * parts, 2 * n * parts);
        let mut dirty = clean.clone();
        let s = clean.sequences.as_slice()[1];
        let typed = [&mut dirty.u, &mut dirty.delta, &mut dirty.dy];
        let mut all: Vec<_> =
            typed.into_iter().chain(&mut dirty.z).map(|values| (values, e)).collect();
        for (values, groups) in [&mut dirty.b, &mut dirty.c].into_iter().zip(groups) {
            all.extend(groups.map(|_| (values, map)));
        }
        for (values, width) in all {
            values[s.start * width..(s.start + s.len) * width].fill(f32::NAN);
        }
        for state in [&mut dirty.h0, &mut dirty.dlast].into_iter().flatten() {
            state[s.slot * matrix..(s.slot + 1) * matrix].fill(f32::NAN);
        }
        for device in cards() {
            let run = |case: &Case<f32>| run(case, device, DType::F32);
            let (whole, beside_nan) = (run(&clean), run(&dirty));
            assert!(beside_nan.y[s.start * e..][..s.len * e].iter().all(|y| y.is_nan()));
            for index in [0, 2] {
                let s = clean.sequences.as_slice()[index];
                let alone = run(&clean.alone(index));
                for batch in [&whole, &beside_nan] {
                    let same = |batch: &[f64], alone: &[f64], width: usize, first: usize| {
                        assert_eq!(batch[first * width..][..alone.len()], *alone);
                    };
                    let (g, one) = (&batch.grad, &alone.grad);
                    same(&batch.y, &alone.y, e, s.start);
                    same(&batch.last, &alone.last, matrix, s.slot);
                    same(&g.u, &one.u, e, s.start);
                    same(&g.delta, &one.delta, e, s.start);
                    same(&g.z, &one.z, e, s.start);
                    same(&g.h0, &one.h0, matrix, s.slot);
                    if groups[0].is_some() {
                        same(&g.b, &one.b, map, s.start);
                    }
                    same(&g.c, &one.c, map, s.start);
                }
            }
        }
    }
}

#[test]
fn a_fresh_sequence_ignores_its_slot() {
    let sequences = scattered(&[(20, false), (0, false)]);
    let mut case = Case::random(81, sequences, 7, 5, [Some(1), Some(1)], true);
    let slots = 70..3 * 70;
    case.h0.as_mut().unwrap()[slots.clone()].fill(f32::NAN);
    for device in cards() {
        let got = run(&case, device, DType::F32);
        assert!(got.y.iter().chain(&got.grad.a).all(|v| v.is_finite()));
        assert!(got.last[70..140].iter().all(|&v| v == 0.0), "fresh and empty leaves zeros");
        assert!(got.grad.h0[slots.clone()].iter().all(|&v| v == 0.0), "no gradient crosses");
    }
}

#[test]
fn what_is_constant_is_f32() {
    for device in cards() {
        let tensor = |shape: &[usize], dtype| {
            random_tensor(1, shape).cast(dtype).unwrap().to(device).unwrap()
        };
        let x = tensor(&[4, 6], DType::BF16);
        let (a, constant) = (tensor(&[6, 3], DType::F32), tensor(&[6, 3], DType::BF16));
        let inputs = Inputs {
            u: &x,
            delta: &x,
            a: &a,
            b: &a,
            c: &constant,
            d: None,
            z: None,
            delta_bias: None,
            delta_softplus: true,
            state: None,
        };
        let sequences = Sequences::fresh(&[4]);
        let error = selective_scan(&inputs, &sequences).unwrap_err().to_string();
        assert!(error.contains("c is bf16"), "{error}");
        selective_scan(&Inputs { c: &a, ..inputs }, &sequences).unwrap();
    }
}
