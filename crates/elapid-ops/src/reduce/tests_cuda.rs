//! What reductions are on a GPU alone: narrow types, and sums in one part and in many.

use elapid_tensor::autograd::backward;
use elapid_tensor::{DType, Device, Tensor};

use super::*;
use crate::testing::{close_tensor, devices, random_on, same_bits};

fn gpus() -> impl Iterator<Item = Device> {
    devices().into_iter().filter(|&device| device != Device::Cpu)
}

#[test]
fn sums_in_one_part_and_in_many() {
    for device in gpus() {
        // Short and long rows, columns of one and several parts, for every number of lanes.
        for shape in [
            [7, 3, 1],
            [3, 900, 1],
            [2, 1030, 1],
            [1, 40_001, 1],
            [2, 100, 300],
            [1, 1000, 130],
            [2, 9001, 3],
            [3, 2, 5],
        ] {
            for dtype in [DType::F32, DType::BF16] {
                let x = random_on(device, dtype, 1, shape);
                let wide = x.to_f64_vec().unwrap();
                let want: Vec<f64> =
                    reference::sum(&wide, shape).iter().map(|sum| sum / shape[1] as f64).collect();
                let found = mean(&x, Some(1)).unwrap();
                assert_eq!((found.dtype(), found.device()), (dtype, device));
                let rounding = if dtype == DType::F32 { 1e-7 } else { 1.0 / 256.0 };
                for (found, want) in found.to_f64_vec().unwrap().iter().zip(&want) {
                    // Values are below 1, so their mean has at most the error of f32 sums of 1.
                    let limit = 1e-7 + rounding * want.abs();
                    assert!((found - want).abs() <= limit, "{shape:?}: {found}, not {want}");
                }
                let (largest, places) = reference::max(&wide, shape);
                let leaf = x.requires_grad();
                let found = max(&leaf, Some(1)).unwrap();
                close_tensor("max", &found, &largest, 0.0);
                let dy = random_on(device, dtype, 2, found.shape());
                let given = dy.to_f64_vec().unwrap();
                let dx = backward(&[(&found, Some(dy))], &[&leaf]).unwrap().remove(0).unwrap();
                assert_eq!(dx.dtype(), dtype);
                let mut want = vec![0.0; wide.len()];
                for (at, given) in given.iter().enumerate() {
                    let (o, i) = (at / shape[2], at % shape[2]);
                    want[(o * shape[1] + places[at]) * shape[2] + i] = *given;
                }
                close_tensor("dmax", &dx, &want, 0.0);
            }
        }
    }
}

#[test]
fn sums_do_not_depend_on_their_neighbours_or_on_chance() {
    for device in gpus() {
        for shape in [[4, 5000, 1], [3, 700, 33]] {
            let x = random_on(device, DType::F32, 3, shape);
            let whole = sum(&x, Some(1)).unwrap();
            same_bits("again", &sum(&x, Some(1)).unwrap(), &whole);
            for o in 0..shape[0] {
                let alone = sum(&x.narrow(0, o, 1).unwrap(), Some(1)).unwrap();
                same_bits("alone", &alone, &whole.narrow(0, o, 1).unwrap());
            }
        }
    }
}

#[test]
fn types_that_kernels_lack_are_named() {
    for device in gpus() {
        let x = Tensor::zeros::<f64>([2, 3]).to(device).unwrap();
        for error in [sum(&x, None).unwrap_err(), max(&x, Some(1)).unwrap_err()] {
            let error = error.to_string();
            assert!(error.contains("f64") && error.contains(&device.to_string()), "{error}");
        }
    }
}
