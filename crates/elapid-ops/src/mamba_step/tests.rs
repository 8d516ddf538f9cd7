//! Against the operations that these parts are, and that divisions of tokens and channels change no bit.

use elapid_tensor::{Sequence, Sequences, Tensor};
use proptest::prelude::*;

use super::*;
use crate::causal_conv1d::{Activation, causal_conv1d};
use crate::elementwise::neg_exp;
use crate::matmul::linear;
use crate::selective_scan::{Inputs, selective_scan};

fn values(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Rows of `channels` with room for whole tiles.
fn wide(x: &[f32], channels: usize) -> Vec<f32> {
    let width = padded(channels);
    let mut wide = vec![0.0; x.len() / channels * width];
    for (wide, x) in wide.chunks_exact_mut(width).zip(x.chunks_exact(channels)) {
        wide[..channels].copy_from_slice(x);
    }
    wide
}

fn narrow(wide: &[f32], channels: usize) -> Vec<f32> {
    wide.chunks_exact(padded(channels)).flat_map(|row| row[..channels].to_vec()).collect()
}

fn rows(x: &mut [f32], channels: usize) -> Rows {
    Rows { pointer: x.as_mut_ptr(), stride: padded(channels) }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn close(found: &[f32], goal: &[f32], what: &str) {
    assert_eq!(found.len(), goal.len());
    for (i, (found, goal)) in found.iter().zip(goal).enumerate() {
        assert!(
            (found - goal).abs() <= 2e-5 * (1.0 + goal.abs()),
            "{what} {i}: {found} for {goal}"
        );
    }
}

/// Sequences of the given lengths as stretches; the last slot first.
fn batch(lengths: &[usize], continued: &[bool]) -> (Sequences, Vec<Stretch>) {
    let mut start = 0;
    let (mut sequences, mut stretches) = (Vec::new(), Vec::new());
    for (i, (&len, &continued)) in lengths.iter().zip(continued).enumerate() {
        let slot = lengths.len() - 1 - i;
        sequences.push(Sequence { start, len, slot, continued, position: 0, id: 0 });
        stretches.push(Stretch { start, len, slot, fresh: !continued });
        start += len;
    }
    (Sequences::new(sequences, lengths.len()).unwrap(), stretches)
}

/// The same batch in two calls: every sequence is cut after `cut` tokens.
fn cut(stretches: &[Stretch], cut: usize) -> [Vec<Stretch>; 2] {
    let first = |s: &Stretch| Stretch { len: s.len.min(cut), ..*s };
    let second = |s: &Stretch| {
        let done = s.len.min(cut);
        Stretch { start: s.start + done, len: s.len - done, slot: s.slot, fresh: false }
    };
    [stretches.iter().map(first).collect(), stretches.iter().map(second).collect()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn convolution(
        channels in 1usize..90,
        taps in 1usize..6,
        lengths in prop::collection::vec(0usize..9, 1..5),
        continued in prop::collection::vec(any::<bool>(), 5),
        at in 0usize..9,
        seed: u64,
    ) {
        let (sequences, stretches) = batch(&lengths, &continued);
        let tokens = sequences.tokens();
        let x = values(seed, tokens * channels);
        let (weight, bias) = (values(seed ^ 1, channels * taps), values(seed ^ 2, channels));
        let state = values(seed ^ 3, lengths.len() * channels * (taps - 1));
        let tensor = |v: &[f32], shape: &[usize]| Tensor::from_slice(v, shape).unwrap();
        let state_tensor = tensor(&state, &[lengths.len(), channels, taps - 1]);
        let (goal, goal_state) = causal_conv1d(
            &tensor(&x, &[tokens, channels]),
            &tensor(&weight, &[channels, taps]),
            Some(&tensor(&bias, &[channels])),
            Activation::Silu,
            &sequences,
            Some(&state_tensor),
        ).unwrap();

        let own = Convolution::new(channels, taps, &weight, Some(&bias));
        let (mut y, mut after) = (wide(&x, channels), state.clone());
        // SAFETY: the buffers have every row, tile and slot.
        unsafe { own.run(0..channels, &stretches, rows(&mut y, channels), after.as_mut_ptr()) };
        close(&narrow(&y, channels), goal.data::<f32>().unwrap(), "convolution");
        prop_assert_eq!(bits(&after), bits(goal_state.data::<f32>().unwrap()));

        let (mut again, mut again_after) = (wide(&x, channels), state);
        for part in cut(&stretches, at) {
            let middle = channels.min(TILE);
            for channels_part in [middle..channels, 0..middle] {
                let x = rows(&mut again, channels);
                // SAFETY: as above.
                unsafe { own.run(channels_part, &part, x, again_after.as_mut_ptr()) };
            }
        }
        prop_assert_eq!(bits(&narrow(&again, channels)), bits(&narrow(&y, channels)));
        prop_assert_eq!(bits(&again_after), bits(&after));
    }

    #[test]
    fn recurrence(
        channels in 1usize..90,
        states in 1usize..20,
        rank in 1usize..5,
        lengths in prop::collection::vec(0usize..9, 1..5),
        continued in prop::collection::vec(any::<bool>(), 5),
        at in 0usize..9,
        seed: u64,
    ) {
        let (sequences, stretches) = batch(&lengths, &continued);
        let tokens = sequences.tokens();
        let (u, z) = (values(seed, tokens * channels), values(seed ^ 1, tokens * channels));
        let projected = values(seed ^ 2, tokens * (rank + 2 * states));
        let (dt_weight, dt_bias) = (values(seed ^ 3, channels * rank), values(seed ^ 4, channels));
        let (a_log, d) = (values(seed ^ 5, channels * states), values(seed ^ 6, channels));
        let state = values(seed ^ 7, lengths.len() * channels * states);
        let tensor = |v: &[f32], shape: &[usize]| Tensor::from_slice(v, shape).unwrap();
        let parts = tensor(&projected, &[tokens, rank + 2 * states])
            .split(1, &[rank, states, states])
            .unwrap();
        let delta = linear(&parts[0], &tensor(&dt_weight, &[channels, rank]), None).unwrap();
        let (goal, goal_state) = selective_scan(
            &Inputs {
                u: &tensor(&u, &[tokens, channels]),
                delta: &delta,
                a: &neg_exp(&tensor(&a_log, &[channels, states])).unwrap(),
                b: &parts[1].unsqueeze(1).unwrap(),
                c: &parts[2].unsqueeze(1).unwrap(),
                d: Some(&tensor(&d, &[channels])),
                z: Some(&tensor(&z, &[tokens, channels])),
                delta_bias: Some(&tensor(&dt_bias, &[channels])),
                delta_softplus: true,
                state: Some(&tensor(&state, &[lengths.len(), channels, states])),
            },
            &sequences,
        ).unwrap();

        let parameters =
            Parameters { dt_weight: &dt_weight, dt_bias: &dt_bias, a_log: &a_log, d: &d };
        let own = Scan::new(channels, states, rank, parameters);
        let (mut z, mut inputs) = (wide(&z, channels), projected);
        let z = rows(&mut z, channels);
        let inputs = Rows { pointer: inputs.as_mut_ptr(), stride: rank + 2 * states };
        let (mut y, mut after) = (wide(&u, channels), state.clone());
        let pointer = after.as_mut_ptr();
        // SAFETY: the buffers have every row, tile and slot.
        unsafe { own.run(0..channels, &stretches, rows(&mut y, channels), z, inputs, pointer) };
        close(&narrow(&y, channels), goal.data::<f32>().unwrap(), "scan");
        close(&after, goal_state.data::<f32>().unwrap(), "state");

        let (mut again, mut again_after) = (wide(&u, channels), state);
        let middle = channels.min(TILE);
        for part in cut(&stretches, at) {
            for channels_part in [middle..channels, 0..middle] {
                let (u, h) = (rows(&mut again, channels), again_after.as_mut_ptr());
                // SAFETY: as above.
                unsafe { own.run(channels_part, &part, u, z, inputs, h) };
            }
        }
        prop_assert_eq!(bits(&narrow(&again, channels)), bits(&narrow(&y, channels)));
        prop_assert_eq!(bits(&again_after), bits(&after));
    }

    #[test]
    fn norms(width in 1usize..70, layer: bool, seed: u64) {
        let x = values(seed, width);
        let residual = values(seed ^ 1, width);
        let weight = values(seed ^ 2, width);
        let bias = layer.then(|| values(seed ^ 3, width));
        let sums: Vec<f64> =
            x.iter().zip(&residual).map(|(a, b)| f64::from(*a) + f64::from(*b)).collect();
        let mean = if layer { sums.iter().sum::<f64>() / width as f64 } else { 0.0 };
        let variance = sums.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / width as f64;
        let goal: Vec<f32> = (0..width)
            .map(|i| {
                let b = bias.as_ref().map_or(0.0, |b| f64::from(b[i]));
                ((sums[i] - mean) / (variance + 1e-5).sqrt() * f64::from(weight[i]) + b) as f32
            })
            .collect();
        let norm = Normalization { weight, bias, eps: 1e-5 };
        let (mut stream, mut out) = (residual, vec![0.0; width]);
        norm.run(Some(&x), &mut stream, &mut out);
        close(&out, &goal, "norm");
        let sums: Vec<f32> = sums.into_iter().map(|s| s as f32).collect();
        close(&stream, &sums, "residual");
    }
}
