//! The kernels of the scan, emulated and on the card, against the reference.

use elapid_tensor::cuda::{DeviceBuffer, Gpu};
use elapid_tensor::{Sequences, bf16};

use super::super::Gradients;
use super::super::cuda::{Cut, Inputs, Plan, backward, forward};
use super::Case;
use super::case::{Results, near, scattered};
use crate::gpu::{GpuElement, Rows};
use crate::testing::{close, from_element, gpus, to_element};

/// Everything, by the kernels, with values of type T where the arguments are of that type.
fn run<T: GpuElement>(gpu: &Gpu, case: &Case<f32>, cut: Cut) -> Results<f64> {
    let groups = case.groups[0].unwrap();
    let (e, n) = (case.channels, case.states);
    let plan = Plan::new(gpu, &case.sequences, (e, groups, n), cut).unwrap();
    let typed = |values: &[f32]| gpu.upload(&to_element::<T>(values)).unwrap();
    let plain = |values: &Option<Vec<f32>>| values.as_ref().map(|v| gpu.upload(v).unwrap());
    let (u, delta, b, c) = (typed(&case.u), typed(&case.delta), typed(&case.b), typed(&case.c));
    let z = case.z.as_ref().map(|z| typed(z));
    let a = gpu.upload(&case.a).unwrap();
    let (d, bias, h0) = (plain(&case.d), plain(&case.bias), plain(&case.h0));
    let (dy, dlast) = (typed(&case.dy), plain(&case.dlast));
    let inputs = Inputs {
        u: Rows::new(&u, e),
        delta: Rows::new(&delta, e),
        a: a.slice(),
        b: Rows::new(&b, groups * n),
        c: Rows::new(&c, groups * n),
        d: d.as_ref().map(DeviceBuffer::slice),
        z: z.as_ref().map(|z| Rows::new(z, e)),
        delta_bias: bias.as_ref().map(DeviceBuffer::slice),
        delta_softplus: case.softplus,
        state: h0.as_ref().map(DeviceBuffer::slice),
        plan: &plan,
    };
    let (y, last, chunks) = forward(gpu, &inputs, true).unwrap();
    let grad = backward(
        gpu,
        &inputs,
        &chunks.unwrap(),
        Rows::new(&dy, e),
        dlast.as_ref().map(DeviceBuffer::slice),
        None,
        z.is_some(),
    )
    .unwrap();
    let typed =
        |values: &elapid_tensor::cuda::DeviceBuffer<T>| from_element(&values.read().unwrap());
    assert_eq!(grad.y.is_some(), z.is_some());
    if let Some(again) = &grad.y {
        close("y again", &typed(again), &typed(&y), tolerance::<T>());
    }
    let plain =
        |values: &elapid_tensor::cuda::DeviceBuffer<f32>| from_element(&values.read().unwrap());
    Results {
        y: typed(&y),
        last: plain(&last),
        grad: Gradients {
            u: typed(&grad.u),
            delta: typed(&grad.delta),
            a: plain(&grad.a),
            b: typed(&grad.b),
            c: typed(&grad.c),
            d: plain(&grad.d),
            z: typed(&grad.z),
            delta_bias: plain(&grad.delta_bias),
            h0: if case.h0.is_some() { plain(&grad.state) } else { Vec::new() },
        },
    }
}

fn tolerance<T: GpuElement>() -> f64 {
    if T::CUDA == "float" { 1e-5 } else { 1e-2 }
}

/// The case with its typed values rounded, so that only the arithmetic differs.
fn rounded<T: GpuElement>(mut case: Case<f32>) -> Case<f32> {
    let round = |values: &mut Vec<f32>| {
        *values = from_element(&to_element::<T>(values)).iter().map(|&v| v as f32).collect();
    };
    let all = [&mut case.u, &mut case.delta, &mut case.b, &mut case.c, &mut case.dy];
    all.into_iter().chain(&mut case.z).for_each(round);
    case
}

fn check<T: GpuElement>(case: Case<f32>, cut: Cut) {
    let case = rounded::<T>(case);
    let want = case.widen().run();
    for gpu in gpus() {
        let got = run::<T>(&gpu, &case, cut);
        for ((name, got), (_, want)) in got.named().iter().zip(want.named()) {
            near(name, got, want, tolerance::<T>());
        }
    }
}

const LENGTHS: [(usize, bool); 6] =
    [(33, true), (0, true), (1, false), (0, false), (70, false), (2, true)];

#[test]
fn kernels_match_the_reference() {
    let g = |groups| [Some(groups), Some(groups)];
    for cut in [Cut::Never, Cut::Every(32), Cut::Fill] {
        check::<f32>(Case::random(1, scattered(&LENGTHS), 40, 16, g(1), false), cut);
        check::<f32>(Case::random(2, scattered(&LENGTHS), 6, 5, g(2), false), cut);
        check::<bf16>(Case::random(3, scattered(&LENGTHS), 64, 16, g(2), false), cut);
    }
    // So many blocks that lanes take two channels, some blocks full and some not.
    check::<f32>(Case::random(9, scattered(&LENGTHS), 4 * 70, 16, g(4), false), Cut::Fill);
    check::<bf16>(Case::random(10, scattered(&LENGTHS), 192, 16, g(1), false), Cut::Fill);
    check::<f32>(Case::random(11, scattered(&LENGTHS), 160, 5, g(1), false), Cut::Fill);
    check::<f32>(Case::random(4, scattered(&[(20, true)]), 3, 20, g(1), false), Cut::Never);
    check::<f32>(Case::random(5, scattered(&[(37, true)]), 2, 100, g(1), false), Cut::Every(16));
    check::<f32>(Case::random(6, scattered(&[(130, true)]), 1, 1, g(1), false), Cut::Every(32));
}

#[test]
fn sequences_that_are_cut_each_by_itself_are_in_a_batch_what_they_are_alone() {
    let sequences = scattered(&[(300, true), (1, true), (140, false), (0, true), (20, false)]);
    let case = Case::random(12, sequences, 34, 16, [Some(1); 2], false);
    for gpu in gpus() {
        let plan =
            |sequences: &Sequences| Plan::new(&gpu, sequences, (34, 1, 16), Cut::Alone).unwrap();
        let segments: Vec<usize> = plan(&case.sequences).runs.iter().map(|run| run.len()).collect();
        assert_eq!(segments, [3, 1, 2, 1, 1]);
        let all = run::<f32>(&gpu, &case, Cut::Alone);
        for (index, s) in case.sequences.iter().enumerate().filter(|(_, s)| s.len > 0) {
            let alone = run::<f32>(&gpu, &case.alone(index), Cut::Alone);
            assert_eq!(all.y[s.start * 34..][..s.len * 34], alone.y);
            assert_eq!(all.last[s.slot * 34 * 16..][..34 * 16], alone.last);
        }
        let got = rounded::<f32>(case.clone()).widen().run();
        near("y", &all.y, &got.y, tolerance::<f32>());
    }
}

#[test]
fn whole_sequences_that_fill_the_card_have_the_bits_of_cut_ones() {
    for gpu in gpus() {
        // One block holds the channels of a sequence in both cases, in lanes of one channel and of two.
        for (channels, pair) in [(34, 1), (96, 2)] {
            let lengths: Vec<(usize, bool)> = (0..2 * gpu.multiprocessors())
                .map(|i| (300 - 7 * (i % 3) - 64 * (i % 2), i % 3 > 0))
                .collect();
            let case = Case::random(14, scattered(&lengths), channels, 16, [Some(1); 2], false);
            let plan = |sequences: &Sequences| {
                Plan::new(&gpu, sequences, (channels, 1, 16), Cut::Alone).unwrap()
            };
            let whole = plan(&case.sequences);
            assert!(whole.joined.is_some() && whole.shape.pair == pair, "{channels} channels");
            let all = run::<bf16>(&gpu, &case, Cut::Alone);
            for (index, s) in case.sequences.iter().enumerate().take(7) {
                let own = case.alone(index);
                let alone = plan(&own.sequences);
                assert!(alone.joined.is_none() && alone.is_cut());
                let alone = run::<bf16>(&gpu, &own, Cut::Alone);
                assert_eq!(all.y[s.start * channels..][..s.len * channels], alone.y);
                let state = channels * 16;
                assert_eq!(all.last[s.slot * state..][..state], alone.last);
            }
        }
    }
}

#[test]
fn lanes_of_two_channels_give_the_bits_of_lanes_of_one() {
    for gpu in gpus() {
        // Enough for two channels a lane.
        let channels = 64 * gpu.multiprocessors();
        let case = Case::random(13, scattered(&LENGTHS), channels, 16, [Some(1); 2], false);
        let sizes = (channels, 1, 16);
        let pair = |cut| Plan::new(&gpu, &case.sequences, sizes, cut).unwrap().shape.pair;
        for (two, one) in [(Cut::Fill, Cut::Never), (Cut::Alone, Cut::Never)] {
            assert_eq!((pair(two), pair(one)), (2, 1));
            let (two, one) = (run::<f32>(&gpu, &case, two), run::<f32>(&gpu, &case, one));
            assert_eq!(two.y, one.y);
            assert_eq!(two.last, one.last);
        }
    }
}

#[test]
fn what_is_optional_may_be_missing() {
    let mut case = Case::random(7, Sequences::fresh(&[40, 3]), 9, 16, [Some(1); 2], false);
    (case.d, case.z, case.bias, case.h0, case.dlast) = (None, None, None, None, None);
    check::<f32>(case.clone(), Cut::Never);
    case.softplus = false;
    case.delta.iter_mut().for_each(|v| *v = v.abs() * 0.1 + 0.02);
    check::<f32>(case, Cut::Every(32));
}

#[test]
fn nan_stays_in_its_document_and_a_batch_is_its_sequences() {
    let sequences = scattered(&[(40, true), (70, true), (5, false)]);
    let clean = Case::random(8, sequences, 34, 16, [Some(1); 2], false);
    let mut dirty = clean.clone();
    let poisoned = clean.sequences.as_slice()[1].tokens();
    dirty.u[poisoned.start * 34..poisoned.end * 34].fill(f32::NAN);
    for gpu in gpus() {
        for cut in [Cut::Never, Cut::Every(32)] {
            let (all, dirty) = (run::<f32>(&gpu, &clean, cut), run::<f32>(&gpu, &dirty, cut));
            for index in [0, 2] {
                let s = clean.sequences.as_slice()[index];
                let alone = run::<f32>(&gpu, &clean.alone(index), cut);
                let own = s.start * 34..(s.start + s.len) * 34;
                for whole in [&all, &dirty] {
                    assert_eq!(whole.y[own.clone()], alone.y);
                    assert_eq!(whole.grad.u[own.clone()], alone.grad.u);
                    assert_eq!(whole.grad.delta[own.clone()], alone.grad.delta);
                    let slot = s.slot * 34 * 16..(s.slot + 1) * 34 * 16;
                    assert_eq!(whole.last[slot.clone()], alone.last);
                    assert_eq!(whole.grad.h0[slot], alone.grad.h0);
                }
            }
        }
    }
}
