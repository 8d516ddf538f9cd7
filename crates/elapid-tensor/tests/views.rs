//! Views against plain indexing, and their gradients.

use elapid_tensor::autograd::backward;
use elapid_tensor::{DType, Tensor, bf16};
use proptest::prelude::*;

fn counting(shape: &[usize]) -> Tensor {
    let n: usize = shape.iter().product();
    Tensor::from_slice(&(0..n).map(|v| v as f32).collect::<Vec<_>>(), shape).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn transpose_and_narrow_index_as_they_should(
        a in 1usize..5, b in 1usize..5, c in 1usize..5, start in 0usize..3, len in 0usize..4,
    ) {
        let x = counting(&[a, b, c]);
        let t = x.transpose(0, 2).unwrap();
        let flat = t.to_vec::<f32>().unwrap();
        for (i, value) in flat.iter().enumerate() {
            let (k, j, l) = (i / (b * a), i / a % b, i % a);
            prop_assert_eq!(*value, (l * b * c + j * c + k) as f32);
        }
        let narrowed = x.narrow(1, start, len);
        if start + len > b {
            prop_assert!(narrowed.is_err());
        } else {
            let narrowed = narrowed.unwrap();
            let expected: Vec<f32> = (0..a)
                .flat_map(|i| (start..start + len).flat_map(move |j| (0..c).map(move |k| (i * b * c + j * c + k) as f32)))
                .collect();
            prop_assert_eq!(narrowed.to_vec::<f32>().unwrap(), expected);
        }
    }

    #[test]
    fn split_and_concat_are_inverse(a in 0usize..4, widths in prop::collection::vec(0usize..4, 1..4), axis in 0usize..3) {
        let mut dims = [2, 3, 2];
        dims[(axis + 1) % 3] = a;
        dims[axis] = widths.iter().sum();
        let x = counting(&dims);
        let parts = x.split(axis, &widths).unwrap();
        let back = Tensor::concat(&parts.iter().collect::<Vec<_>>(), axis).unwrap();
        prop_assert_eq!(back.to_vec::<f32>().unwrap(), x.to_vec::<f32>().unwrap());
    }
}

#[test]
fn gradients_of_views() {
    let x = counting(&[2, 4]).requires_grad();
    let parts = x.split(1, &[1, 3]).unwrap();
    let weight = Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0, 5.0, 6.0], [3, 2]).unwrap();
    let turned = parts[1].transpose(0, 1).unwrap();
    let grads = backward(&[(&turned, Some(weight.clone()))], &[&x]).unwrap();
    assert_eq!(
        grads[0].as_ref().unwrap().to_vec::<f32>().unwrap(),
        [0.0, 1.0, 3.0, 5.0, 0.0, 2.0, 4.0, 6.0]
    );

    let narrow = x.narrow(0, 1, 1).unwrap().reshape([2, 2]).unwrap();
    let grads = backward(&[(&narrow, Some(Tensor::filled(1f32, [2, 2])))], &[&x]).unwrap();
    assert_eq!(
        grads[0].as_ref().unwrap().to_vec::<f32>().unwrap(),
        [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    );

    let joined = Tensor::concat(&[&x, &x], 1).unwrap();
    let grads = backward(&[(&joined, Some(Tensor::filled(1f32, [2, 8])))], &[&x]).unwrap();
    assert_eq!(grads[0].as_ref().unwrap().to_vec::<f32>().unwrap(), [2.0; 8]);
}

#[test]
fn row_views_of_column_ranges() {
    let x = counting(&[3, 4]);
    let right = x.narrow(1, 2, 2).unwrap();
    let rows = right.row_view::<f32>().unwrap();
    assert_eq!((rows.rows, rows.width, rows.stride), (3, 2, 4));
    assert_eq!(rows.row(2), [10.0, 11.0]);
    assert!(x.transpose(0, 1).unwrap().row_view::<f32>().is_err());
    assert!(right.data::<f32>().is_err());
}

#[test]
fn unsqueeze_keeps_gaps_between_rows() {
    let x = counting(&[3, 4]).requires_grad();
    let y = x.split(1, &[2, 2]).unwrap()[1].unsqueeze(1).unwrap();
    assert_eq!(*y.shape(), [3, 1, 2]);
    assert_eq!(y.row_view::<f32>().unwrap().row(1), [6.0, 7.0]);
    let grads = backward(&[(&y, Some(counting(&[3, 1, 2])))], &[&x]).unwrap();
    let expected = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 2.0, 3.0, 0.0, 0.0, 4.0, 5.0];
    assert_eq!(grads[0].as_ref().unwrap().to_vec::<f32>().unwrap(), expected);
    assert!(x.unsqueeze(3).is_err());
}

#[test]
fn casts_round_to_nearest_even() {
    let x = Tensor::from_slice(&[1.0f32, 1.003_906_3, 1.011_718_8, -2.5], [4]).unwrap();
    let narrow = x.cast(DType::BF16).unwrap();
    let expected = [1.0f32, 1.003_906_3, 1.011_718_8, -2.5].map(bf16::from_f32);
    assert_eq!(narrow.to_vec::<bf16>().unwrap(), expected);
    assert_eq!(narrow.cast(DType::F32).unwrap().to_vec::<f32>().unwrap(), expected.map(f32::from));
    assert_eq!(x.cast(DType::I32).unwrap().to_vec::<i32>().unwrap(), [1, 1, 1, -2]);
}

#[test]
fn writing_never_reaches_another_holder() {
    let mut x = counting(&[4]);
    let other = x.clone();
    let half = x.narrow(0, 2, 2).unwrap();
    x.data_mut::<f32>().unwrap()[3] = -1.0;
    assert_eq!(other.to_vec::<f32>().unwrap(), [0.0, 1.0, 2.0, 3.0]);
    assert_eq!(half.to_vec::<f32>().unwrap(), [2.0, 3.0]);
    assert_eq!(x.to_vec::<f32>().unwrap(), [0.0, 1.0, 2.0, -1.0]);
}
