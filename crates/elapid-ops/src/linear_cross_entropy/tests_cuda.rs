//! The loss kernel, emulated and on the card, against the definition.

use elapid_tensor::bf16;

use super::cuda::in_place;
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
        let found = in_place(&gpu, &mut logits, targets.slice(), (vocab, real), 0.5).unwrap();
        close("losses", &widen(&found.read().unwrap()), &losses, tolerance);
        close("gradient", &from_element(&logits.read().unwrap()), &grads, tolerance);
        assert!(in_place(&gpu, &mut logits, targets.slice(), (vocab, vocab + 1), 0.5).is_err());
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
        let losses =
            in_place(&gpu, &mut logits, targets.slice(), (8, 7), 1.0).unwrap().read().unwrap();
        assert_eq!(
            losses.iter().map(|loss| loss.is_nan()).collect::<Vec<_>>(),
            [true, true, true, false]
        );
    }
}
