//! The optimizer's kernels, emulated and on the card, against the definition.

use elapid_tensor::{Device, Tensor};

use super::cuda::{self, Numbers, Parameter};
use super::{AdamW, reference};
use crate::testing::{close, close_tensor, gpus, random_tensor, widen};

const NUMBERS: Numbers = Numbers {
    update: AdamW {
        learning_rate: 0.01,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.0,
    },
    step: 3,
    clip_norm: 0.0,
    limit: 0.0,
};

fn check(clip_norm: f64) {
    let lengths = [9000, 1, 37, 8192];
    for gpu in gpus() {
        let device = Device::Cuda(gpu.id());
        let draw = |seed: u64, i: usize| random_tensor(10 * seed + i as u64, [lengths[i]]);
        let mut held: Vec<[Tensor; 4]> = (0..4)
            .map(|i| {
                let squares: Vec<f32> =
                    draw(3, i).to_vec::<f32>().unwrap().iter().map(|v| v * v).collect();
                let v = Tensor::from_slice(&squares, [lengths[i]]).unwrap();
                [draw(1, i), draw(2, i), v, draw(4, i)]
            })
            .collect();
        let before: Vec<[Vec<f64>; 4]> =
            held.iter().map(|all| all.each_ref().map(|t| t.to_f64_vec().unwrap())).collect();
        for tensors in &mut held {
            *tensors = tensors.each_ref().map(|tensor| tensor.to(device).unwrap());
        }
        let mut parameters: Vec<Parameter<'_>> = held
            .iter_mut()
            .enumerate()
            .map(|(i, [p, m, v, g])| {
                let rate = 1.0 + 0.5 * i as f64;
                Parameter { p, g, m, v, weight_decay: 0.1 * i as f64, rate }
            })
            .collect();
        let found = cuda::step(&gpu, &mut parameters, &Numbers { clip_norm, ..NUMBERS }).unwrap();
        assert!(found.taken);

        let norm = before.iter().flat_map(|[.., g]| g).map(|g| g * g).sum::<f64>().sqrt();
        assert!((found.norm / norm - 1.0).abs() < 1e-6, "{} for {norm}", found.norm);
        let scale = if clip_norm > 0.0 && norm > clip_norm { clip_norm / norm } else { 1.0 };
        for (i, ([p, m, v, g], got)) in before.into_iter().zip(&held).enumerate() {
            let [mut want_p, mut want_m, mut want_v] = [p, m, v];
            let learning_rate = NUMBERS.update.learning_rate * (1.0 + 0.5 * i as f64);
            let own = AdamW { learning_rate, weight_decay: 0.1 * i as f64, ..NUMBERS.update };
            reference::step([&mut want_p, &mut want_m, &mut want_v], &g, &own, 3, scale);
            for (name, got, want) in
                [("p", &got[0], want_p), ("m", &got[1], want_m), ("v", &got[2], want_v)]
            {
                close_tensor(name, got, &want, 1e-6);
            }
        }
    }
}

#[test]
fn kernels_match_the_definition() {
    check(0.0);
    check(1.0);
}

#[test]
fn a_step_that_is_not_sound_changes_nothing() {
    for gpu in gpus() {
        let device = Device::Cuda(gpu.id());
        let on = |values: &[f32]| Tensor::from_slice(values, [5]).unwrap().to(device).unwrap();
        let step = |g: &[f32], limit: f64, step: u64| {
            let [mut p, mut m, mut v] = [0; 3].map(|_| on(&[1.0; 5]));
            let g = on(g);
            let parameter =
                Parameter { p: &mut p, g: &g, m: &mut m, v: &mut v, weight_decay: 0.1, rate: 1.0 };
            let numbers = Numbers { limit, step, ..NUMBERS };
            let found = cuda::step(&gpu, &mut [parameter], &numbers);
            let changed = [p, m, v].iter().any(|t| t.to_vec::<f32>().unwrap() != [1.0; 5]);
            (found, changed)
        };
        let (found, changed) = step(&[1.0, 2.0, f32::NAN, 0.0, 1.0], 0.0, 1);
        assert!(!changed && found.is_ok_and(|found| found.norm.is_nan() && !found.taken));
        let (found, changed) = step(&[3.0, 4.0, 0.0, 0.0, 0.0], 4.9, 1);
        assert!(!changed && found.is_ok_and(|found| !found.taken));
        let (found, changed) = step(&[3.0, 4.0, 0.0, 0.0, 0.0], 5.1, 1);
        assert!(changed);
        close("norm", &[found.unwrap().norm], &widen(&[5.0]), 1e-6);
        assert!(step(&[1.0; 5], 0.0, 0).0.is_err());
    }
}
