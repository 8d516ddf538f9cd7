//! Elementwise operations against their f64 definitions, with broadcasting, strides and gradients.

use elapid_tensor::autograd::backward;
use elapid_tensor::{Result, Shape, Tensor};
use proptest::prelude::*;

use super::*;
use crate::testing::{check_gradient, close, close_tensor, dot, random_tensor, same_bits, widen};

type Function = fn(&Tensor) -> Result<Tensor>;
type Exact = fn(f64) -> f64;
type Pair = fn(&Tensor, &Tensor) -> Result<Tensor>;
type ExactPair = fn(f64, f64) -> f64;

const UNARY: [(&str, Function, Exact); 7] = [
    ("neg", neg, |x| -x),
    ("exp", exp, f64::exp),
    ("neg_exp", neg_exp, |x| -x.exp()),
    ("sigmoid", sigmoid, reference::sigmoid),
    ("silu", silu, reference::silu),
    ("softplus", softplus, reference::softplus),
    ("scale", |x| scale(x, -0.3), |x| -0.3 * x),
];

/// Element numbers of a tensor that is repeated to `shape`.
fn repeated(values: &[f64], from: &[usize], shape: &[usize]) -> Vec<f64> {
    let missing = shape.len() - from.len();
    (0..shape.iter().product())
        .map(|flat: usize| {
            let (mut rest, mut at, mut step) = (flat, 0, 1);
            for axis in (0..shape.len()).rev() {
                let index = rest % shape[axis];
                rest /= shape[axis];
                if axis >= missing {
                    let extent = from[axis - missing];
                    at += if extent == 1 { 0 } else { index * step };
                    step *= extent;
                }
            }
            values[at]
        })
        .collect()
}

#[test]
fn unary_functions_agree_with_their_definitions() {
    for (name, function, exact) in UNARY {
        for length in [0, 1, 7, 64, 40_001] {
            let x = scale(&random_tensor(length as u64, [length]), 25.0).unwrap();
            let want: Vec<f64> =
                x.to_f64_vec().unwrap().iter().map(|&x| exact(x as f32 as f64)).collect();
            let got = function(&x).unwrap().to_f64_vec().unwrap();
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                assert!((got - want).abs() <= 4e-7 * want.abs(), "{name}[{i}]: {got}, not {want}");
            }
        }
    }
}

#[test]
fn unary_gradients_agree_with_finite_differences() {
    let x = random_tensor(1, [4, 9]);
    let dy = random_tensor(2, [4, 9]);
    for (name, function, exact) in UNARY {
        for wide in [1.0, 8.0] {
            // In f64, the tensors themselves run the definitions.
            let x =
                scale(&x, wide).unwrap().cast(elapid_tensor::DType::F64).unwrap().requires_grad();
            let dy = dy.cast(elapid_tensor::DType::F64).unwrap();
            let y = function(&x).unwrap();
            let dx = backward(&[(&y, Some(dy.clone()))], &[&x]).unwrap().remove(0).unwrap();
            let dy = dy.to_vec::<f64>().unwrap();
            check_gradient(name, &dx.to_vec::<f64>().unwrap(), &x.to_vec::<f64>().unwrap(), |x| {
                dot(&x.iter().map(|&x| exact(x)).collect::<Vec<_>>(), &dy)
            });
            let narrow = x.detach().cast(elapid_tensor::DType::F32).unwrap().requires_grad();
            let y = function(&narrow).unwrap();
            let dy = random_tensor(2, [4, 9]);
            let fast = backward(&[(&y, Some(dy))], &[&narrow]).unwrap().remove(0).unwrap();
            close_tensor(name, &fast, &dx.to_vec::<f64>().unwrap(), 1e-6);
        }
    }
}

#[test]
fn a_view_with_gaps_gives_the_bits_of_its_copy() {
    let whole = random_tensor(3, [37, 50, 3]);
    let views = [
        whole.narrow(1, 5, 20).unwrap(),
        whole.transpose(0, 1).unwrap(),
        whole.transpose(0, 2).unwrap().narrow(2, 3, 9).unwrap(),
        whole.narrow(0, 3, 1).unwrap(),
    ];
    for view in &views {
        let copy = view.contiguous().unwrap();
        for (name, function, _) in UNARY {
            same_bits(name, &function(view).unwrap(), &function(&copy).unwrap());
        }
        same_bits("mul", &mul(view, view).unwrap(), &mul(&copy, &copy).unwrap());
        same_bits("add", &add(view, &copy).unwrap(), &add(&copy, &copy).unwrap());
    }
}

#[test]
fn rows_alone_have_the_bits_of_the_batch() {
    let (x, y) = (random_tensor(4, [700, 45]), random_tensor(5, [700, 45]));
    let gate = random_tensor(6, [45]);
    let whole = mul(&silu(&x).unwrap(), &add(&y, &gate).unwrap()).unwrap();
    for row in [0, 1, 333, 699] {
        let of = |t: &Tensor| t.narrow(0, row, 1).unwrap();
        let alone = mul(&silu(&of(&x)).unwrap(), &add(&of(&y), &gate).unwrap()).unwrap();
        same_bits("row", &alone, &of(&whole).contiguous().unwrap());
    }
}

#[test]
fn wrong_operands_are_named() {
    let a = random_tensor(1, [2, 3]);
    let error = add(&a, &random_tensor(2, [2, 4])).unwrap_err().to_string();
    assert!(error.contains("[2, 3]") && error.contains("[2, 4]"), "{error}");
    let error = mul(&a, &Tensor::zeros::<f64>([2, 3])).unwrap_err().to_string();
    assert!(error.contains("f64") && error.contains("f32"), "{error}");
    assert!(exp(&Tensor::zeros::<i64>([2])).is_err());
    assert!(broadcast_to(&a, [3, 2]).is_err());
    assert!(broadcast_to(&a, [3]).is_err());
}

/// A shape and one that broadcasts with it.
fn shapes() -> impl Strategy<Value = (Vec<usize>, Vec<usize>)> {
    let axis = (1usize..6, 0u8..4);
    (proptest::collection::vec(axis, 0..5), 0usize..5, any::<bool>()).prop_map(
        |(axes, drop, swap)| {
            let a: Vec<usize> =
                axes.iter().map(|&(n, kind)| if kind == 1 { 1 } else { n }).collect();
            let b: Vec<usize> =
                axes.iter().map(|&(n, kind)| if kind == 2 { 1 } else { n }).collect();
            let b = b[drop.min(b.len())..].to_vec();
            if swap { (b, a) } else { (a, b) }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn broadcast_arithmetic_and_its_gradients((a_dims, b_dims) in shapes(), seed in 0u64..1000) {
        let shape = broadcast_shape(&a_dims, &b_dims).unwrap();
        let (a, b) = (random_tensor(seed, &a_dims[..]), random_tensor(seed + 1, &b_dims[..]));
        let dy = random_tensor(seed + 2, shape);
        let exact: [(&str, Pair, ExactPair); 3] =
            [("add", add, |a, b| a + b), ("sub", sub, |a, b| a - b), ("mul", mul, |a, b| a * b)];
        for (name, function, exact) in exact {
            let forward = |a: &[f64], b: &[f64]| -> Vec<f64> {
                let (a, b) = (repeated(a, &a_dims, &shape), repeated(b, &b_dims, &shape));
                a.iter().zip(&b).map(|(&a, &b)| exact(a, b)).collect()
            };
            let (a, b) = (a.requires_grad(), b.requires_grad());
            let y = function(&a, &b).unwrap();
            prop_assert_eq!(y.shape(), shape);
            let wide = |t: &Tensor| t.to_f64_vec().unwrap();
            close_tensor(name, &y, &forward(&wide(&a), &wide(&b)), 1e-6);
            let grads = backward(&[(&y, Some(dy.clone()))], &[&a, &b]).unwrap();
            let dy = widen(&dy.to_vec::<f32>().unwrap());
            let (da, db) = (grads[0].as_ref().unwrap(), grads[1].as_ref().unwrap());
            prop_assert_eq!((da.shape(), db.shape()), (a.shape(), b.shape()));
            let by_a = crate::testing::finite_differences(&wide(&a), |a| dot(&forward(a, &wide(&b)), &dy));
            let by_b = crate::testing::finite_differences(&wide(&b), |b| dot(&forward(&wide(&a), b), &dy));
            close(name, &wide(da), &by_a, 2e-6);
            close(name, &wide(db), &by_b, 2e-6);
        }
    }
}

#[test]
fn long_runs_are_split_among_threads_alike() {
    let (x, row) = (random_tensor(7, [300, 257]), random_tensor(8, [257]));
    let column = random_tensor(9, Shape::new(&[300, 1]));
    let run = |threads| {
        crate::testing::on_threads(threads, || {
            add(&mul(&x, &column).unwrap(), &softplus(&row).unwrap()).unwrap()
        })
    };
    same_bits("threads", &run(1), &run(3));
}
