//! Softmax and its logarithm on a GPU alone: narrow types, and rows of more than a warp.

use elapid_tensor::autograd::backward;
use elapid_tensor::{DType, Device, Tensor};

use super::{log_softmax, reference, softmax};
use crate::testing::{close, close_tensor, devices, random_on, random_tensor, same_bits};

fn gpus() -> impl Iterator<Item = Device> {
    devices().into_iter().filter(|&device| device != Device::Cpu)
}

#[test]
fn rows_of_every_width_and_type() {
    for device in gpus() {
        for (rows, width) in [(3, 1), (5, 31), (2, 136), (3, 1030), (1, 9000)] {
            for x_type in [DType::F32, DType::BF16] {
                let x = random_on(device, x_type, 1, [rows, width]).requires_grad();
                for dy_type in [DType::F32, DType::BF16] {
                    let dy = random_on(device, dy_type, 2, [rows, width]);
                    let (x_wide, dy_wide) = (x.to_f64_vec().unwrap(), dy.to_f64_vec().unwrap());
                    let tolerance = |dtype| if dtype == DType::F32 { 2e-6 } else { 1.0 / 256.0 };
                    let check =
                        |y: &Tensor, want: &[f64], gradient: &dyn Fn(&[f64]) -> Vec<f64>| {
                            assert_eq!((y.dtype(), y.device()), (x_type, device));
                            close_tensor("y", y, want, tolerance(x_type));
                            let dx = backward(&[(y, Some(dy.clone()))], &[&x]).unwrap();
                            let dx = dx[0].as_ref().unwrap();
                            assert_eq!(dx.dtype(), dy_type);
                            // The gradient comes from the result as it was rounded.
                            let want = gradient(&y.to_f64_vec().unwrap());
                            close("dx", &dx.to_f64_vec().unwrap(), &want, tolerance(dy_type));
                        };
                    check(&softmax(&x).unwrap(), &reference::softmax(&x_wide, width), &|y| {
                        reference::softmax_backward(y, &dy_wide, width)
                    });
                    check(
                        &log_softmax(&x).unwrap(),
                        &reference::log_softmax(&x_wide, width),
                        &|y| reference::log_softmax_backward(y, &dy_wide, width),
                    );
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_again() {
    for device in gpus() {
        let x = random_tensor(3, [5, 2000]).to(device).unwrap();
        for function in [softmax, log_softmax] {
            let whole = function(&x).unwrap();
            for row in 0..5 {
                let alone = function(&x.narrow(0, row, 1).unwrap()).unwrap();
                same_bits("row", &alone, &whole.narrow(0, row, 1).unwrap());
            }
        }
        assert!(softmax(&Tensor::zeros::<f64>([2]).to(device).unwrap()).is_err());
    }
}
