//! Chosen rows and their gradients against the reference.

use elapid_tensor::Tensor;
use elapid_tensor::autograd::backward;
use proptest::prelude::*;

use super::*;
use crate::testing::{
    check_gradient, close_tensor, devices, dot, on_threads, random_tensor, same_bits,
};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn rows_and_their_gradients(
        count in 1usize..9, width in 1usize..12,
        picks in proptest::collection::vec(0usize..1000, 0..20), seed in 0u64..1000,
    ) {
        let rows: Vec<usize> = picks.iter().map(|pick| pick % count).collect();
        // A view of wider rows, as the model's splits are.
        let whole = random_tensor(seed, [count, width + 3]);
        let wide = whole.narrow(1, 2, width).unwrap().to_f64_vec().unwrap();
        let given = random_tensor(seed + 1, [rows.len(), width]);
        let dy = given.to_f64_vec().unwrap();
        let want = reference::scatter_add(&dy, &rows, width, count);
        for device in devices() {
            let leaf = whole.to(device).unwrap().narrow(1, 2, width).unwrap().requires_grad();
            let y = select_rows(&leaf, &rows).unwrap();
            prop_assert_eq!(&*y.shape(), &[rows.len(), width][..]);
            close_tensor("select_rows", &y, &reference::take_rows(&wide, &rows, width), 0.0);
            let given = given.to(device).unwrap();
            let dx = backward(&[(&y, Some(given))], &[&leaf]).unwrap().remove(0).unwrap();
            prop_assert_eq!((dx.shape(), dx.device()), (leaf.shape(), device));
            close_tensor("dx", &dx, &want, 1e-6);
        }
        check_gradient("reference", &want, &wide, |x| {
            dot(&reference::take_rows(x, &rows, width), &dy)
        });
    }
}

#[test]
fn many_rows_are_alike_on_any_number_of_threads() {
    let x = random_tensor(1, [50, 128]).requires_grad();
    let rows: Vec<usize> = (0..3000).map(|k| if k % 3 == 0 { 7 } else { k * 31 % 50 }).collect();
    let dy = random_tensor(2, [3000, 128]);
    let run = |threads| {
        on_threads(threads, || {
            let y = select_rows(&x, &rows).unwrap();
            let dx = backward(&[(&y, Some(dy.clone()))], &[&x]).unwrap().remove(0).unwrap();
            (y.detach(), dx)
        })
    };
    let (one, three) = (run(1), run(3));
    same_bits("rows", &one.0, &three.0);
    same_bits("dx", &one.1, &three.1);
    let want = reference::scatter_add(&dy.to_f64_vec().unwrap(), &rows, 128, 50);
    close_tensor("dx", &one.1, &want, 1e-5);
}

#[test]
fn a_row_that_does_not_exist_is_named() {
    let x = random_tensor(1, [3, 2]);
    let error = select_rows(&x, &[0, 3]).unwrap_err().to_string();
    assert!(error.contains("rows[1] is 3") && error.contains("the 3 rows"), "{error}");
    assert!(select_rows(&Tensor::zeros::<f32>([3]), &[0]).is_err());
    assert_eq!(&*select_rows(&x, &[]).unwrap().shape(), &[0, 2]);
}
