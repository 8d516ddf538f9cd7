//! The convolution's kernels, emulated and on the card, against the definition.

use elapid_tensor::bf16;

use super::cuda::{self, Inputs};
use super::reference::Arguments;
use crate::gpu::{DeviceSequences, GpuElement, Rows};
use crate::testing::{close, from_element, gpus, random, random_sequences, to_element, widen};

fn check<T: GpuElement>(
    seed: u64,
    lengths: &[usize],
    (channels, width): (usize, usize),
    silu: bool,
) {
    let sequences = random_sequences(seed, lengths);
    let (tokens, slots) = (sequences.tokens(), sequences.slots());
    // x is part of wider rows, as the input projection leaves it.
    let (first, stride) = (3, 2 * channels + 5);
    let wide: Vec<T> = to_element(&random(seed, first + tokens * stride));
    let x: Vec<T> =
        (0..tokens).flat_map(|t| wide[first + t * stride..][..channels].iter().copied()).collect();
    let weight = random(seed + 1, channels * width);
    let bias = random(seed + 2, channels);
    let state = random(seed + 3, slots * channels * (width - 1));
    let dy: Vec<T> = to_element(&random(seed + 4, tokens * channels));
    let dstate = random(seed + 5, state.len());

    let definition = Arguments {
        x: from_element(&x),
        weight: widen(&weight),
        bias: Some(widen(&bias)),
        state: Some(widen(&state)),
        channels,
        width,
        silu,
        sequences: sequences.clone(),
    };
    let (y, last) = definition.forward();
    let grads = definition.backward(&from_element(&dy), &widen(&dstate));

    for gpu in gpus() {
        let rows = DeviceSequences::upload(&gpu, &sequences).unwrap();
        let up = |values: &[f32]| gpu.upload(values).unwrap();
        let (w, b, h) = (up(&weight), up(&bias), up(&state));
        let (wide, outer) = (gpu.upload(&wide).unwrap(), gpu.upload(&dy).unwrap());
        let inputs = Inputs {
            x: Rows::part(&wide, first, stride),
            weight: w.slice(),
            bias: Some(b.slice()),
            state: Some(h.slice()),
            sequences: &rows,
            channels,
            width,
            silu,
        };
        let tolerance = if T::CUDA == "float" { 1e-5 } else { 1e-2 };
        let found = cuda::forward(&gpu, &inputs).unwrap();
        close("y", &from_element(&found.0.read().unwrap()), &y, tolerance);
        close("state", &widen(&found.1.read().unwrap()), &last, tolerance);
        let dstate = up(&dstate);
        let found =
            cuda::backward(&gpu, &inputs, Rows::new(&outer, channels), Some(dstate.slice()), None)
                .unwrap();
        close("dx", &from_element(&found.x.read().unwrap()), &grads.x, tolerance);
        close("dstate", &widen(&found.state.read().unwrap()), &grads.state, tolerance);
        close("dweight", &widen(&found.weight.read().unwrap()), &grads.weight, tolerance);
        close("dbias", &widen(&found.bias.read().unwrap()), &grads.bias, tolerance);
    }
}

#[test]
fn kernels_match_the_definition() {
    check::<f32>(1, &[5, 0, 1, 70, 2], (40, 4), true);
    check::<f32>(2, &[600, 3], (8, 4), true);
    check::<f32>(3, &[3, 17], (33, 3), false);
    check::<f32>(4, &[9, 4], (5, 1), true);
    check::<f32>(5, &[30, 1], (7, 11), true);
    check::<bf16>(6, &[5, 0, 1, 70, 2], (40, 4), true);
    check::<bf16>(7, &[64, 65], (264, 4), true);
    check::<f32>(8, &[0], (4, 4), true);
}

#[test]
fn nan_stays_in_its_document() {
    let (channels, width) = (12, 4);
    let sequences = elapid_tensor::Sequences::fresh(&[9, 70, 5]);
    let tokens = sequences.tokens();
    let (clean, weight) = (random(1, tokens * channels), random(2, channels * width));
    let outer = random(3, tokens * channels);
    let mut dirty = clean.clone();
    dirty[9 * channels..79 * channels].fill(f32::NAN);
    for gpu in gpus() {
        let rows = DeviceSequences::upload(&gpu, &sequences).unwrap();
        let weight = gpu.upload(&weight).unwrap();
        let outer = gpu.upload(&outer).unwrap();
        let run = |x: &[f32]| {
            let x = gpu.upload(x).unwrap();
            let inputs = Inputs {
                x: Rows::new(&x, channels),
                weight: weight.slice(),
                bias: None,
                state: None,
                sequences: &rows,
                channels,
                width,
                silu: true,
            };
            let (y, last) = cuda::forward(&gpu, &inputs).unwrap();
            let grads =
                cuda::backward(&gpu, &inputs, Rows::new(&outer, channels), None, None).unwrap();
            (y.read().unwrap(), last.read().unwrap(), grads.x.read().unwrap())
        };
        let (clean, dirty) = (run(&clean), run(&dirty));
        let outside = (0..9 * channels).chain(79 * channels..84 * channels);
        for i in outside {
            assert_eq!(clean.0[i].to_bits(), dirty.0[i].to_bits());
            assert_eq!(clean.2[i].to_bits(), dirty.2[i].to_bits());
        }
        let slot = channels * (width - 1);
        for i in (0..slot).chain(2 * slot..3 * slot) {
            assert_eq!(clean.1[i].to_bits(), dirty.1[i].to_bits());
        }
    }
}
