//! What holds bit for bit: sequences alone and in a batch, split and whole, on any number of threads, beside a
//! document of NaN.

use elapid_tensor::{Sequence, Sequences};
use proptest::prelude::*;

use super::Case;
use super::case::{any_case, scattered};
use crate::testing::on_threads;

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_batch_is_its_sequences_one_by_one(case in any_case(140)) {
        let whole = case.run();
        let matrix = case.arguments().matrix_len();
        for (i, s) in case.sequences.iter().enumerate() {
            let alone = case.alone(i).run();
            let (rows, slot) = (s.start * case.channels..(s.start + s.len) * case.channels, s.slot * matrix);
            prop_assert_eq!(bits(&alone.y), bits(&whole.y[rows.clone()]), "y of {}", i);
            prop_assert_eq!(bits(&alone.last), bits(&whole.last[slot..slot + matrix]), "state of {}", i);
            prop_assert_eq!(bits(&alone.grad.u), bits(&whole.grad.u[rows.clone()]), "du of {}", i);
            prop_assert_eq!(bits(&alone.grad.delta), bits(&whole.grad.delta[rows]), "ddelta of {}", i);
            prop_assert_eq!(bits(&alone.grad.h0), bits(&whole.grad.h0[slot..slot + matrix]), "dh0 of {}", i);
        }
    }

    #[test]
    fn a_split_sequence_is_the_whole(len in 2usize..200, at in 0.0f64..1.0, n in 1usize..20, seed in 0u64..99) {
        let case = Case::random(seed, scattered(&[(len, true)]), 11, n, [Some(1), Some(1)], false);
        let k = 1 + (at * (len - 1) as f64) as usize;
        let (y, last) = case.forward();
        let part = |start: usize, len: usize, state: &[f32]| {
            let mut part = case.clone();
            let rows = |v: &[f32], width: usize| v[start * width..(start + len) * width].to_vec();
            part.u = rows(&case.u, 11);
            part.delta = rows(&case.delta, 11);
            part.z = case.z.as_ref().map(|z| rows(z, 11));
            part.b = rows(&case.b, n);
            part.c = rows(&case.c, n);
            part.h0 = Some(state.to_vec());
            part.sequences = scattered(&[(len, true)]);
            part.forward()
        };
        let (first, state) = part(0, k, case.h0.as_ref().unwrap());
        let (second, state) = part(k, len - k, &state);
        prop_assert_eq!(bits(&[first, second].concat()), bits(&y));
        prop_assert_eq!(bits(&state), bits(&last));
    }
}

#[test]
fn single_steps_are_the_whole() {
    let case = Case::random(2, scattered(&[(70, true)]), 9, 5, [Some(1), Some(1)], false);
    let (y, last) = case.forward();
    let mut state = case.h0.clone().unwrap();
    for t in 0..70 {
        let mut step = case.clone();
        step.u = case.u[t * 9..(t + 1) * 9].to_vec();
        step.delta = case.delta[t * 9..(t + 1) * 9].to_vec();
        step.z = case.z.as_ref().map(|z| z[t * 9..(t + 1) * 9].to_vec());
        step.b = case.b[t * 5..(t + 1) * 5].to_vec();
        step.c = case.c[t * 5..(t + 1) * 5].to_vec();
        step.h0 = Some(state);
        step.sequences = scattered(&[(1, true)]);
        let (got, next) = step.forward();
        assert_eq!(bits(&got), bits(&y[t * 9..(t + 1) * 9]), "step {t}");
        state = next;
    }
    assert_eq!(bits(&state), bits(&last));
}

#[test]
fn bits_do_not_depend_on_the_threads() {
    let lengths = [(300, false), (2, true), (129, true), (600, false), (0, true)];
    for groups in [[Some(1), Some(1)], [Some(2), Some(2)], [None, None]] {
        let case = Case::random(1, scattered(&lengths), 140, 8, groups, false);
        let one = on_threads(1, || case.run());
        for threads in [2, 5] {
            assert!(on_threads(threads, || case.run()) == one, "{threads} threads");
        }
    }
}

#[test]
fn a_document_of_nan_stays_alone() {
    let lengths = [(5, false), (64, true), (40, false), (1, true), (65, false)];
    for complex in [false, true] {
        let clean = Case::random(31, scattered(&lengths), 21, 9, [Some(1), Some(1)], complex);
        let parts = if complex { 2 } else { 1 };
        let matrix = 21 * 9 * parts;
        let want = clean.run();
        for (bad, s) in clean.sequences.iter().enumerate() {
            let mut case = clean.clone();
            for (values, width) in [
                (&mut case.u, 21),
                (&mut case.delta, 21),
                (case.z.as_mut().unwrap(), 21),
                (&mut case.dy, 21),
                (&mut case.b, 9 * parts),
                (&mut case.c, 9 * parts),
            ] {
                values[s.start * width..(s.start + s.len) * width].fill(f32::NAN);
            }
            for state in [case.h0.as_mut().unwrap(), case.dlast.as_mut().unwrap()] {
                state[s.slot * matrix..(s.slot + 1) * matrix].fill(f32::NAN);
            }
            let got = case.run();
            let row = s.start * 21..(s.start + s.len) * 21;
            assert!(got.y[row].iter().all(|y| y.is_nan()), "NaN in, NaN out");
            for (i, other) in clean.sequences.iter().enumerate().filter(|(i, _)| *i != bad) {
                let same =
                    |name: &str, got: &[f32], want: &[f32], width: usize, at: usize, len: usize| {
                        let range = at * width..(at + len) * width;
                        assert_eq!(
                            bits(&got[range.clone()]),
                            bits(&want[range]),
                            "{name} of {i} beside {bad}"
                        );
                    };
                let tokens = |name: &str, got: &[f32], want: &[f32], width| {
                    same(name, got, want, width, other.start, other.len);
                };
                tokens("y", &got.y, &want.y, 21);
                tokens("du", &got.grad.u, &want.grad.u, 21);
                tokens("ddelta", &got.grad.delta, &want.grad.delta, 21);
                tokens("dz", &got.grad.z, &want.grad.z, 21);
                tokens("dB", &got.grad.b, &want.grad.b, 9 * parts);
                tokens("dC", &got.grad.c, &want.grad.c, 9 * parts);
                same("last", &got.last, &want.last, matrix, other.slot, 1);
                same("dh0", &got.grad.h0, &want.grad.h0, matrix, other.slot, 1);
            }
        }
    }
}

#[test]
fn a_fresh_sequence_ignores_its_slot() {
    let mut case =
        Case::random(9, scattered(&[(20, false), (0, false)]), 7, 3, [Some(1), Some(1)], false);
    let want = case.run();
    case.h0.as_mut().unwrap()[21..63].fill(f32::NAN);
    let got = case.run();
    assert_eq!(bits(&got.y), bits(&want.y));
    assert_eq!(bits(&got.last[21..63]), bits(&want.last[21..63]));
    assert!(got.last[21..42].iter().all(|&v| v == 0.0), "fresh and empty leaves zeros");
    assert!(got.grad.h0[21..63].iter().all(|&v| v == 0.0), "no gradient crosses a border");
}

#[test]
fn empty_sequences_and_unused_slots_carry_their_state() {
    let list = vec![
        Sequence { start: 0, len: 0, slot: 2, continued: true, position: 4, id: 0 },
        Sequence { start: 0, len: 3, slot: 0, continued: true, position: 0, id: 1 },
    ];
    let case = Case::random(7, Sequences::new(list, 4).unwrap(), 3, 2, [Some(1), Some(1)], false);
    let got = case.run();
    let (h0, dlast) = (case.h0.as_ref().unwrap(), case.dlast.as_ref().unwrap());
    for slot in 1..4 {
        let range = slot * 6..(slot + 1) * 6;
        assert_eq!(got.last[range.clone()], h0[range.clone()], "slot {slot}");
        assert_eq!(got.grad.h0[range.clone()], dlast[range], "slot {slot}");
    }
    let mut without = case;
    without.h0 = None;
    assert!(without.forward().1[6..].iter().all(|&v| v == 0.0));
}

#[test]
fn an_empty_batch_is_fine() {
    let case = Case::random(1, Sequences::fresh(&[]), 3, 2, [Some(1), Some(1)], false);
    let got = case.run();
    assert!(got.y.is_empty() && got.grad.u.is_empty());
    assert_eq!(got.grad.a, [0.0; 6]);
}
