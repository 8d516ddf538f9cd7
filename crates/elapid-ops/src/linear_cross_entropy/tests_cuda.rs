//! The loss kernel, emulated and on the card, against the definition.

use elapid_tensor::bf16;

use super::cuda::{Gradient, Scoring, score};
use crate::gpu::GpuElement;
use crate::softmax::reference::log_sum_exp;
use crate::testing::{close, from_element, gpus, random, to_element, widen};

fn check<T: GpuElement>(rows: usize, vocab: usize, real: usize) {
    let values: Vec<f32> = random(1, rows * vocab).iter().map(|v| v * 6.0).collect();
    let logits: Vec<T> = to_element(&values);
    let targets: Vec<i64> =
        (0..rows as i64).map(|r| if r % 3 == 1 { -100 } else { r * 5 % real as i64 }).collect();
    let wide = from_element(&logits);
    let (mut losses, mut grads) = (Vec::new(), Vec::new());
    for (row, &target) in wide.chunks(vocab).zip(&targets) {
        let lse = log_sum_exp(&row[..real]);
        let counts = f64::from(u8::from(target != -100));
        losses.push(if target == -100 { 0.0 } else { lse - row[target as usize] });
        grads.extend(row.iter().enumerate().map(|(v, logit)| match v < real {
            true => counts * 0.5 * ((logit - lse).exp() - f64::from(u8::from(v as i64 == target))),
            false => 0.0,
        }));
    }
    let tolerance = if T::CUDA == "float" { 1e-5 } else { 1e-2 };
    for gpu in gpus() {
        let mut logits = gpu.upload(&logits).unwrap();
        let targets = gpu.upload(&targets).unwrap();
        let scale = gpu.upload(&[0.5f32]).unwrap();
        let scoring = Scoring {
            targets: targets.slice(),
            vocab,
            real_vocab: real,
            scale: Some(scale.slice()),
        };
        let mut apart = gpu.zeros::<bf16>(rows * vocab).unwrap();
        let mut found = gpu.zeros::<f32>(rows + 1).unwrap();
        let gradient = Gradient::Apart(&mut apart);
        score(&gpu, &mut logits, &scoring, gradient, &mut found, 1).unwrap();
        close("gradient", &from_element(&apart.read().unwrap()), &grads, 1e-2);
        let in_place = Gradient::<T>::InPlace;
        score(&gpu, &mut logits, &scoring, in_place, &mut found, 1).unwrap();
        close("losses", &widen(&found.read().unwrap()[1..]), &losses, tolerance);
        close("gradient", &from_element(&logits.read().unwrap()), &grads, tolerance);
        let too_many = Scoring { real_vocab: vocab + 1, ..scoring };
        let in_place = Gradient::<T>::InPlace;
        assert!(score(&gpu, &mut logits, &too_many, in_place, &mut found, 0).is_err());
    }
}

#[test]
fn the_kernel_matches_the_definition() {
    check::<f32>(5, 24, 20);
    check::<f32>(3, 1500, 1499);
    check::<bf16>(4, 256, 256);
    check::<bf16>(2, 7, 5);
    // Longer than shared memory.
    check::<f32>(2, 60_000, 59_990);
}

#[test]
fn a_target_that_is_no_class_makes_the_loss_nan() {
    for gpu in gpus() {
        let mut logits = gpu.upload(&random(1, 4 * 8)).unwrap();
        let targets = gpu.upload(&[7i64, 1 << 40, -1, 0]).unwrap();
        let targets = targets.slice();
        let scoring = Scoring { targets, vocab: 8, real_vocab: 7, scale: None };
        let mut losses = gpu.zeros::<f32>(4).unwrap();
        score::<f32, f32>(&gpu, &mut logits, &scoring, Gradient::None, &mut losses, 0).unwrap();
        assert_eq!(
            losses.read().unwrap().iter().map(|loss| loss.is_nan()).collect::<Vec<_>>(),
            [true, true, true, false]
        );
    }
}
