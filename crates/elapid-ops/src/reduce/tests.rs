//! Reductions against their f64 definitions, along every axis.

use elapid_tensor::autograd::backward;
use elapid_tensor::{DType, Tensor};
use proptest::prelude::*;

use super::*;
use crate::testing::{
    close_tensor, devices, finite_differences, on_threads, random_tensor, same_bits,
};

type Function = fn(&Tensor, Option<usize>) -> Result<Tensor>;

fn extents(shape: &[usize], axis: Option<usize>) -> [usize; 3] {
    match axis {
        None => [1, shape.iter().product(), 1],
        Some(axis) => {
            [shape[..axis].iter().product(), shape[axis], shape[axis + 1..].iter().product()]
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn reductions_and_their_gradients(
        dims in proptest::collection::vec(1usize..7, 1..4),
        axis in proptest::option::of(0usize..4),
        seed in 0u64..1000,
    ) {
        let axis = axis.map(|axis| axis % dims.len());
        let x = random_tensor(seed, &dims[..]);
        let wide = x.to_f64_vec().unwrap();
        let extents = extents(&dims, axis);
        let count = extents[1] as f64;
        let sums = reference::sum(&wide, extents);
        let means: Vec<f64> = sums.iter().map(|sum| sum / count).collect();
        let cases: [(&str, Function, Vec<f64>); 3] = [
            ("sum", sum, sums),
            ("mean", mean, means),
            ("max", max, reference::max(&wide, extents).0),
        ];
        for (name, function, want) in cases {
            let y = function(&x, axis).unwrap();
            prop_assert_eq!(y.rank(), if axis.is_some() { dims.len() - 1 } else { 0 });
            let given = random_tensor(seed + 1, y.shape());
            let dy = given.to_f64_vec().unwrap();
            let by_differences = finite_differences(&wide, |x| {
                let y = match name {
                    "max" => reference::max(x, extents).0,
                    _ => reference::sum(x, extents),
                };
                let factor = if name == "mean" { 1.0 / count } else { 1.0 };
                y.iter().zip(&dy).map(|(y, dy)| y * dy * factor).sum()
            });
            for device in devices() {
                let (x, given) = (x.to(device).unwrap().requires_grad(), given.to(device).unwrap());
                let y = function(&x, axis).unwrap();
                close_tensor(name, &y, &want, 1e-6);
                let dx = backward(&[(&y, Some(given))], &[&x]).unwrap().remove(0).unwrap();
                prop_assert_eq!((dx.shape(), dx.device()), (x.shape(), device));
                close_tensor(name, &dx, &by_differences, 2e-6);
            }
        }
    }

    #[test]
    fn a_sum_to_a_shape_undoes_broadcasting(
        axes in proptest::collection::vec((1usize..6, any::<bool>()), 1..5),
        drop in 0usize..3,
        seed in 0u64..1000,
    ) {
        let dims: Vec<usize> = axes.iter().map(|axis| axis.0).collect();
        let target: Vec<usize> = axes.iter().map(|&(n, keep)| if keep { n } else { 1 }).collect();
        let target = &target[drop.min(target.len())..];
        let x = random_tensor(seed, &dims[..]);
        let mut want = vec![0.0; target.iter().product()];
        for (flat, value) in x.to_f64_vec().unwrap().iter().enumerate() {
            let (mut rest, mut at, mut step) = (flat, 0, 1);
            for axis in (0..dims.len()).rev() {
                let index = rest % dims[axis];
                rest /= dims[axis];
                if let Some(own) = (axis + target.len()).checked_sub(dims.len()) {
                    at += if target[own] == 1 { 0 } else { index * step };
                    step *= target[own];
                }
            }
            want[at] += value;
        }
        for device in devices() {
            let got = sum_to_shape(&x.to(device).unwrap(), Shape::new(target)).unwrap();
            close_tensor("sum_to_shape", &got, &want, 1e-6);
        }
    }
}

#[test]
fn long_sums_are_exact_and_alike_on_any_number_of_threads() {
    let x = random_tensor(1, [1 << 20]);
    let exact: f64 = x.to_f64_vec().unwrap().iter().sum();
    for (name, shape, axis) in [
        ("all", vec![1 << 20], None),
        ("rows", vec![1024, 1024], Some(1)),
        ("long rows", vec![2, 1 << 19], Some(1)),
        ("columns", vec![4096, 256], Some(0)),
        ("middle", vec![4, 1024, 256], Some(1)),
    ] {
        let x = x.reshape(&shape[..]).unwrap();
        let run = |threads| on_threads(threads, || sum(&x, axis).unwrap());
        let one = run(1);
        same_bits(name, &one, &run(3));
        let total: f64 = one.to_f64_vec().unwrap().iter().sum();
        assert!((total - exact).abs() < 2e-3, "{name}: {total} instead of {exact}");
    }
    // A sum of ones in plain f32 would stop at 2^24.
    for device in devices() {
        let ones = Tensor::filled(1f32, [20_000_000]).to(device).unwrap();
        assert_eq!(sum(&ones, None).unwrap().item::<f32>().unwrap(), 20_000_000.0);
    }
}

#[test]
fn rows_alone_have_the_bits_of_the_batch() {
    for device in devices() {
        let x = random_tensor(2, [300, 777]).to(device).unwrap();
        let whole = mean(&x, Some(1)).unwrap();
        for row in [0, 17, 299] {
            let alone = mean(&x.narrow(0, row, 1).unwrap(), Some(1)).unwrap();
            same_bits("row", &alone, &whole.narrow(0, row, 1).unwrap());
        }
    }
}

#[test]
fn the_largest_is_the_first_of_equals_and_nan_wins() {
    let x = Tensor::from_slice(&[1f32, 3.0, 3.0, f32::NAN, 9.0, 2.0], [2, 3]).unwrap();
    for device in devices() {
        let leaf = x.to(device).unwrap().requires_grad();
        let y = max(&leaf, Some(1)).unwrap();
        let values = y.to_vec::<f32>().unwrap();
        assert!(values[0] == 3.0 && values[1].is_nan(), "{values:?}");
        let dy = Tensor::from_slice(&[5f32, 7.0], [2]).unwrap().to(device).unwrap();
        let dx = backward(&[(&y, Some(dy))], &[&leaf]).unwrap().remove(0).unwrap();
        assert_eq!(dx.to_vec::<f32>().unwrap(), [0.0, 5.0, 0.0, 7.0, 0.0, 0.0]);
    }
    let wide = max(&x.cast(DType::F64).unwrap(), None).unwrap();
    assert!(wide.item::<f64>().unwrap().is_nan());
}

#[test]
fn nothing_to_reduce() {
    for device in devices() {
        let empty = Tensor::zeros::<f32>([0, 3]).to(device).unwrap();
        assert_eq!(sum(&empty, Some(0)).unwrap().to_vec::<f32>().unwrap(), [0.0; 3]);
        assert_eq!(sum(&empty, None).unwrap().item::<f32>().unwrap(), 0.0);
        assert_eq!(sum(&empty, Some(1)).unwrap().elements(), 0);
        assert_eq!(max(&empty, Some(1)).unwrap().elements(), 0);
        assert!(mean(&empty, Some(0)).is_err() && max(&empty, None).is_err());
        assert!(sum(&empty, Some(2)).unwrap_err().to_string().contains("axis 2"));
    }
}
