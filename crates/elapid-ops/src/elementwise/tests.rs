//! Elementwise operations against their f64 definitions, with broadcasting, strides and gradients.

use elapid_tensor::autograd::backward;
use elapid_tensor::{DType, Device, Result, Shape, Tensor};
use proptest::prelude::*;

use super::*;
use crate::testing::{
    check_gradient, close, close_tensor, devices, dot, finite_differences, random_tensor,
    same_bits, widen,
};

pub(super) type Function = fn(&Tensor) -> Result<Tensor>;
pub(super) type Exact = fn(f64) -> f64;
type Pair = fn(&Tensor, &Tensor) -> Result<Tensor>;
type ExactPair = fn(f64, f64) -> f64;

pub(super) const UNARY: [(&str, Function, Exact); 7] = [
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
            for device in devices() {
                let limit = if device == Device::Cpu { 4e-7 } else { 6e-7 };
                let got = function(&x.to(device).unwrap()).unwrap();
                assert_eq!(got.device(), device);
                for (i, (got, want)) in got.to_f64_vec().unwrap().iter().zip(&want).enumerate() {
                    assert!(
                        (got - want).abs() <= limit * want.abs(),
                        "{name}[{i}] on {device}: {got}, not {want}"
                    );
                }
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
            let x = scale(&x, wide).unwrap().cast(DType::F64).unwrap().requires_grad();
            let dy = dy.cast(DType::F64).unwrap();
            let y = function(&x).unwrap();
            let dx = backward(&[(&y, Some(dy.clone()))], &[&x]).unwrap().remove(0).unwrap();
            let dy = dy.to_vec::<f64>().unwrap();
            check_gradient(name, &dx.to_vec::<f64>().unwrap(), &x.to_vec::<f64>().unwrap(), |x| {
                dot(&x.iter().map(|&x| exact(x)).collect::<Vec<_>>(), &dy)
            });
            for device in devices() {
                let narrow = x.detach().cast(DType::F32).unwrap().to(device).unwrap();
                let narrow = narrow.requires_grad();
                let y = function(&narrow).unwrap();
                let dy = random_tensor(2, [4, 9]).to(device).unwrap();
                let fast = backward(&[(&y, Some(dy))], &[&narrow]).unwrap().remove(0).unwrap();
                close_tensor(name, &fast, &dx.to_vec::<f64>().unwrap(), 1e-6);
            }
        }
    }
}

#[test]
fn a_view_with_gaps_gives_the_bits_of_its_copy() {
    let views = devices().into_iter().flat_map(|device| {
        let whole = random_tensor(3, [37, 50, 3]).to(device).unwrap();
        [
            whole.narrow(1, 5, 20).unwrap(),
            whole.transpose(0, 1).unwrap(),
            whole.transpose(0, 2).unwrap().narrow(2, 3, 9).unwrap(),
            whole.narrow(0, 3, 1).unwrap(),
        ]
    });
    for view in &views.collect::<Vec<_>>() {
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
    for device in devices() {
        let random = |seed, shape: &[usize]| random_tensor(seed, shape).to(device).unwrap();
        let (x, y, gate) = (random(4, &[700, 45]), random(5, &[700, 45]), random(6, &[45]));
        let whole = mul(&silu(&x).unwrap(), &add(&y, &gate).unwrap()).unwrap();
        for row in [0, 1, 333, 699] {
            let of = |t: &Tensor| t.narrow(0, row, 1).unwrap();
            let alone = mul(&silu(&of(&x)).unwrap(), &add(&of(&y), &gate).unwrap()).unwrap();
            same_bits("row", &alone, &of(&whole).contiguous().unwrap());
        }
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
        let given = random_tensor(seed + 2, shape);
        let dy = widen(&given.to_vec::<f32>().unwrap());
        let wide = |t: &Tensor| t.to_f64_vec().unwrap();
        let exact: [(&str, Pair, ExactPair); 3] =
            [("add", add, |a, b| a + b), ("sub", sub, |a, b| a - b), ("mul", mul, |a, b| a * b)];
        for (name, function, exact) in exact {
            let forward = |a: &[f64], b: &[f64]| -> Vec<f64> {
                let (a, b) = (repeated(a, &a_dims, &shape), repeated(b, &b_dims, &shape));
                a.iter().zip(&b).map(|(&a, &b)| exact(a, b)).collect()
            };
            let by_a = finite_differences(&wide(&a), |a| dot(&forward(a, &wide(&b)), &dy));
            let by_b = finite_differences(&wide(&b), |b| dot(&forward(&wide(&a), b), &dy));
            for device in devices() {
                let leaf = |t: &Tensor| t.to(device).unwrap().requires_grad();
                let (a, b, given) = (leaf(&a), leaf(&b), given.to(device).unwrap());
                let y = function(&a, &b).unwrap();
                prop_assert_eq!(y.shape(), shape);
                close_tensor(name, &y, &forward(&wide(&a), &wide(&b)), 1e-6);
                let grads = backward(&[(&y, Some(given))], &[&a, &b]).unwrap();
                let (da, db) = (grads[0].as_ref().unwrap(), grads[1].as_ref().unwrap());
                prop_assert_eq!((da.shape(), db.shape()), (a.shape(), b.shape()));
                close(name, &wide(da), &by_a, 2e-6);
                close(name, &wide(db), &by_b, 2e-6);
            }
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
