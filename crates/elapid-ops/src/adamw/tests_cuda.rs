//! The optimizer's kernels, emulated and on the card, against the definition.

use elapid_tensor::bf16;

use super::cuda::{Parameter, Parameters};
use super::{AdamW, reference};
use crate::gpu::GpuElement;
use crate::testing::{close, from_element, gpus, random, to_element, widen};

fn check<G: GpuElement>(clip_norm: f32) {
    let options = AdamW { learning_rate: 0.01, ..AdamW::default() };
    let lengths = [9000, 1, 37, 8192];
    for gpu in gpus() {
        let up = |values: &[f32]| gpu.upload(values).unwrap();
        let starts: Vec<[Vec<f32>; 3]> = (0..4u64)
            .map(|i| {
                let draw = |k: u64| random(10 * i + k, lengths[i as usize]);
                [draw(0), draw(1), draw(2).iter().map(|v| v * v).collect()]
            })
            .collect();
        let grads: Vec<Vec<G>> =
            (0..4).map(|i| to_element(&random(100 + i, lengths[i as usize]))).collect();
        let mut held: Vec<_> = starts.iter().map(|[p, m, v]| [up(p), up(m), up(v)]).collect();
        let on_card: Vec<_> = grads.iter().map(|g| gpu.upload(g).unwrap()).collect();
        let mut rounded = gpu.zeros::<bf16>(lengths[0]).unwrap();
        let mut copy = Some(&mut rounded);
        let mut parameters: Vec<Parameter<'_, G>> = held
            .iter_mut()
            .zip(&on_card)
            .enumerate()
            .map(|(i, ([p, m, v], g))| {
                // The first alone has a rounded copy.
                let rounded = copy.take();
                Parameter { p, g, m, v, rounded, weight_decay: 0.1 * i as f64 }
            })
            .collect();
        let mut table = Parameters::new(&gpu, &mut parameters).unwrap();
        table.step(&options, 3, clip_norm, 0.5).unwrap();
        let found = table.norm().unwrap();

        let wide: Vec<Vec<f64>> = grads.iter().map(|g| from_element(g)).collect();
        let norm = 0.5 * wide.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
        assert!((found / norm - 1.0).abs() < 1e-6, "{found} for {norm}");
        let limit = f64::from(clip_norm);
        let scale = 0.5 * if limit > 0.0 && norm > limit { limit / norm } else { 1.0 };
        for (i, (start, [p, m, v])) in starts.iter().zip(&held).enumerate() {
            let [mut want_p, mut want_m, mut want_v] = [0, 1, 2].map(|k| widen(&start[k]));
            let own = AdamW { weight_decay: 0.1 * i as f64, ..options };
            reference::step([&mut want_p, &mut want_m, &mut want_v], &wide[i], &own, 3, scale);
            for (name, got, want) in [("p", p, want_p), ("m", m, want_m), ("v", v, want_v)] {
                close(name, &widen(&got.read().unwrap()), &want, 1e-6);
            }
        }
        let copy: Vec<bf16> = to_element(&held[0][0].read().unwrap());
        assert_eq!(rounded.read().unwrap(), copy);
    }
}

#[test]
fn kernels_match_the_definition() {
    check::<f32>(0.0);
    check::<f32>(1.0);
    check::<bf16>(1.0);
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() {
    for gpu in gpus() {
        let ones = gpu.upload(&[1f32; 5]).unwrap();
        let g = gpu.upload(&[1.0, 2.0, f32::NAN, 0.0, 1.0]).unwrap();
        let [mut p, mut m, mut v] = [0; 3].map(|_| ones.duplicate().unwrap());
        let parameter =
            Parameter { p: &mut p, g: &g, m: &mut m, v: &mut v, rounded: None, weight_decay: 0.1 };
        let mut parameters = [parameter];
        let mut table = Parameters::new(&gpu, &mut parameters).unwrap();
        table.step(&AdamW::default(), 1, 1.0, 1.0).unwrap();
        assert!(table.norm().unwrap().is_nan());
        assert!(table.step(&AdamW::default(), 0, 1.0, 1.0).is_err());
        for buffer in [&p, &m, &v] {
            assert_eq!(buffer.read().unwrap(), [1.0; 5]);
        }
    }
}
