//! What elementwise operations are on a GPU alone: narrow types, gradients of another type, operands of two devices.

use elapid_tensor::autograd::backward;
use elapid_tensor::{DType, Device, Tensor};

use super::tests::UNARY;
use super::*;
use crate::testing::{close, devices, finite_differences, random_on, random_tensor};

/// bf16 has eight bits.
const ROUNDING: f64 = 1.0 / 256.0;

fn gpus() -> impl Iterator<Item = Device> {
    devices().into_iter().filter(|&device| device != Device::Cpu)
}

fn wide(tensor: &Tensor) -> Vec<f64> {
    tensor.to_f64_vec().unwrap()
}

#[test]
fn narrow_values_are_rounded_once_and_gradients_have_the_type_of_the_gradient_given() {
    for device in gpus() {
        let x = scale(&random_on(device, DType::BF16, 1, [3, 45]), 8.0).unwrap().requires_grad();
        for (name, function, exact) in UNARY {
            for dtype in [DType::BF16, DType::F32] {
                let y = function(&x).unwrap();
                assert_eq!((y.dtype(), y.device()), (DType::BF16, device), "{name}");
                for (x, y) in wide(&x).iter().zip(wide(&y)) {
                    assert!(
                        (y - exact(*x)).abs() <= ROUNDING * exact(*x).abs(),
                        "{name}({x}): {y}"
                    );
                }
                let dy = random_on(device, dtype, 2, [3, 45]);
                let dx = backward(&[(&y, Some(dy.clone()))], &[&x]).unwrap().remove(0).unwrap();
                assert_eq!((dx.dtype(), dx.device()), (dtype, device), "{name}");
                for ((x, dy), dx) in wide(&x).iter().zip(wide(&dy)).zip(wide(&dx)) {
                    let slope = finite_differences(&[*x], |x| exact(x[0]))[0];
                    // Functions that keep their result know it as rounded to bf16.
                    let limit = ROUNDING * (2.0 * slope.abs() + 1.0);
                    assert!(
                        (dx - dy * slope).abs() <= limit * dy.abs(),
                        "{name}'({x}) dy: {dx}, not {}",
                        dy * slope
                    );
                }
            }
        }
    }
}

#[test]
fn six_axes_with_gaps_and_repetition() {
    for device in gpus() {
        for dtype in [DType::F32, DType::BF16] {
            let on = |seed, shape: [usize; 6]| random_on(device, dtype, seed, shape);
            let a = on(1, [2, 3, 1, 5, 2, 12]).transpose(1, 4).unwrap();
            let b = on(2, [1, 2, 3, 1, 3, 20]).narrow(5, 4, 12).unwrap();
            let y = mul(&a, &b).unwrap();
            assert_eq!(*y.shape(), [2, 2, 3, 5, 3, 12]);
            let (a, b) = (wide(&a), wide(&b));
            let mut want = Vec::new();
            for flat in 0..y.elements() {
                let (f, e, d) = (flat % 12, flat / 12 % 3, flat / 36 % 5);
                let (c, at, n) = (flat / 180 % 3, flat / 540 % 2, flat / 1080);
                let left = a[(((n * 2 + at) * 5 + d) * 3 + e) * 12 + f];
                want.push(left * b[((at * 3 + c) * 3 + e) * 12 + f]);
            }
            let tolerance = if dtype == DType::F32 { 1e-7 } else { ROUNDING };
            close("mul", &wide(&y), &want, tolerance);
        }
    }
}

#[test]
fn gradients_of_repeated_narrow_operands_are_summed_in_f32() {
    for device in gpus() {
        // 300 gradients of 1 + 2^-7: sums in bf16 would stop at 256.
        let a = random_on(device, DType::BF16, 1, [300, 1, 4, 1]).requires_grad();
        let b = random_on(device, DType::BF16, 2, [1, 4, 2]).requires_grad();
        let y = add(&a, &b).unwrap();
        let ones = Tensor::filled(1.0078125f32, y.shape()).cast(DType::BF16).unwrap();
        let ones = ones.to(device).unwrap();
        let grads = backward(&[(&y, Some(ones))], &[&a, &b]).unwrap();
        let (da, db) = (grads[0].as_ref().unwrap(), grads[1].as_ref().unwrap());
        assert_eq!((da.dtype(), db.dtype()), (DType::BF16, DType::BF16));
        assert_eq!((da.shape(), db.shape()), (a.shape(), b.shape()));
        // 302.34 lies between 302 and 304.
        assert!(wide(db).iter().all(|&db| db == 302.0), "{db:?}");
        assert!(wide(da).iter().all(|&da| da == 2.015625), "{da:?}");
    }
}

#[test]
fn operands_of_two_devices_are_refused_by_name() {
    for device in gpus() {
        let (here, there) = (random_tensor(1, [3]), random_on(device, DType::F32, 2, [3]));
        for (a, b) in [(&here, &there), (&there, &here)] {
            let error = add(a, b).unwrap_err().to_string();
            assert!(error.contains("cpu") && error.contains(&device.to_string()), "{error}");
        }
        let leaf = there.requires_grad();
        let y = silu(&leaf).unwrap();
        let error = backward(&[(&y, Some(here))], &[&leaf]).unwrap_err().to_string();
        assert!(error.contains("cpu") && error.contains(&device.to_string()), "{error}");
        let narrow = random_on(device, DType::BF16, 3, [3]);
        assert!(mul(&there, &narrow).unwrap_err().to_string().contains("bf16"));
        let double = Tensor::zeros::<f64>([3]).to(device).unwrap();
        assert!(exp(&double).unwrap_err().to_string().contains("f64"));
    }
}
