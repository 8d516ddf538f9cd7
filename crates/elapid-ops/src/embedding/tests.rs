//! Embedding against the reference of chosen rows.

use elapid_tensor::Tensor;
use elapid_tensor::autograd::backward;
use proptest::prelude::*;

use super::*;
use crate::gather::reference;
use crate::testing::{close_tensor, on_threads, random_tensor, same_bits};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn rows_and_their_gradients(
        vocab in 1usize..40, width in 1usize..20,
        picks in proptest::collection::vec(0u32..1000, 0..60), seed in 0u64..1000,
    ) {
        let picks: Vec<u32> = picks.iter().map(|pick| pick % vocab as u32).collect();
        let rows: Vec<usize> = picks.iter().map(|&id| id as usize).collect();
        let ids = Tensor::from_slice(&picks, [picks.len()]).unwrap();
        let weight = random_tensor(seed, [vocab, width]).requires_grad();
        let y = embedding(&ids, &weight).unwrap();
        let wide = weight.to_f64_vec().unwrap();
        close_tensor("embedding", &y, &reference::take_rows(&wide, &rows, width), 0.0);
        let dy = random_tensor(seed + 1, y.shape());
        let dw = backward(&[(&y, Some(dy.clone()))], &[&weight]).unwrap().remove(0).unwrap();
        let want = reference::scatter_add(&dy.to_f64_vec().unwrap(), &rows, width, vocab);
        close_tensor("dweight", &dw, &want, 1e-6);
    }
}

#[test]
fn gradients_are_alike_on_any_number_of_threads() {
    let ids: Vec<u32> = (0..5000u32).map(|t| if t % 5 == 0 { 32 } else { t * t % 251 }).collect();
    let ids = Tensor::from_slice(&ids, [5000]).unwrap();
    let weight = random_tensor(1, [256, 96]).requires_grad();
    let dy = random_tensor(2, [5000, 96]);
    let run = |threads| {
        on_threads(threads, || {
            let y = embedding(&ids, &weight).unwrap();
            backward(&[(&y, Some(dy.clone()))], &[&weight]).unwrap().remove(0).unwrap()
        })
    };
    same_bits("dweight", &run(1), &run(3));
}

#[test]
fn an_id_out_of_range_is_named() {
    let weight = random_tensor(1, [10, 4]);
    let ids = Tensor::from_slice(&[3u32, 9, 10], [3]).unwrap();
    let error = embedding(&ids, &weight).unwrap_err().to_string();
    assert!(error.contains("token 2 is 10") && error.contains("V = 10"), "{error}");
    let signed = Tensor::from_slice(&[3i64], [1]).unwrap();
    assert!(embedding(&signed, &weight).unwrap_err().to_string().contains("u32"));
    assert!(embedding(&ids, &random_tensor(1, [10])).is_err());
}
