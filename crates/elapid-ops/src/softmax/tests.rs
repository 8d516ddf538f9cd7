//! Softmax and its logarithm against f64, and their gradients.

use elapid_tensor::autograd::backward;
use elapid_tensor::{Result, Tensor};
use proptest::prelude::*;

use super::*;
use crate::testing::{
    check_gradient, close_tensor, devices, dot, on_threads, random_tensor, same_bits,
};

type Exact = fn(&[f64], usize) -> Vec<f64>;
type Function = fn(&Tensor) -> Result<Tensor>;
type ExactBackward = fn(&[f64], &[f64], usize) -> Vec<f64>;

const CASES: [(&str, Function, Exact, ExactBackward); 2] = [
    ("softmax", super::softmax, reference::softmax, reference::softmax_backward),
    ("log_softmax", super::log_softmax, reference::log_softmax, reference::log_softmax_backward),
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn rows_and_their_gradients(
        rows in 1usize..6, width in 1usize..70, spread in 0.1f64..40.0, seed in 0u64..1000,
    ) {
        let x = crate::elementwise::scale(&random_tensor(seed, [rows, width]), spread).unwrap();
        let dy = random_tensor(seed + 1, [rows, width]);
        for (name, function, exact, exact_backward) in CASES {
            let wide = x.to_f64_vec().unwrap();
            let want = exact(&wide, width);
            let wide_dy = dy.to_f64_vec().unwrap();
            let gradient = exact_backward(&want, &wide_dy, width);
            for device in devices() {
                let leaf = x.to(device).unwrap().requires_grad();
                let y = function(&leaf).unwrap();
                close_tensor(name, &y, &want, 1e-6);
                let dy = dy.to(device).unwrap();
                let dx = backward(&[(&y, Some(dy))], &[&leaf]).unwrap().remove(0).unwrap();
                close_tensor(name, &dx, &gradient, 4e-6);
            }
            check_gradient(name, &gradient, &wide, |x| dot(&exact(x, width), &wide_dy));
        }
    }
}

#[test]
fn no_finite_row_overflows_and_a_bad_row_keeps_to_itself() {
    let nan = f32::NAN;
    let inf = f32::INFINITY;
    let x = [3e38, -3e38, 3e38, nan, 1.0, 2.0, -inf, 0.0, -inf, 88.0, 89.0, 90.0];
    for device in devices() {
        let x = Tensor::from_slice(&x, [4, 3]).unwrap().to(device).unwrap();
        let y = softmax(&x).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(y[..3], [0.5, 0.0, 0.5]);
        assert!(y[3..6].iter().all(|y| y.is_nan()), "{y:?}");
        assert_eq!(y[6..9], [0.0, 1.0, 0.0]);
        assert!(y[9..].iter().all(|y| y.is_finite()));
    }
}

#[test]
fn rows_alone_have_the_bits_of_the_batch_on_any_number_of_threads() {
    let x = random_tensor(3, [400, 123]);
    for (name, function, ..) in CASES {
        let whole = on_threads(1, || function(&x).unwrap());
        same_bits(name, &whole, &on_threads(3, || function(&x).unwrap()));
        for row in [0, 200, 399] {
            let alone = function(&x.narrow(0, row, 1).unwrap()).unwrap();
            same_bits(name, &alone, &whole.narrow(0, row, 1).unwrap());
        }
    }
}

#[test]
fn shapes_and_types() {
    assert!(super::softmax(&Tensor::scalar(1f32)).is_err());
    assert!(super::softmax(&Tensor::zeros::<f64>([2])).is_err());
    for device in devices() {
        let empty = |shape: [usize; 2]| Tensor::zeros::<f32>(shape).to(device).unwrap();
        assert_eq!(super::softmax(&empty([0, 5])).unwrap().elements(), 0);
        assert_eq!(super::log_softmax(&empty([5, 0])).unwrap().elements(), 0);
        let strided = random_tensor(1, [6, 8]).to(device).unwrap().transpose(0, 1).unwrap();
        same_bits(
            "strided",
            &super::softmax(&strided).unwrap(),
            &super::softmax(&strided.contiguous().unwrap()).unwrap(),
        );
    }
}
