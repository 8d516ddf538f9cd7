use super::{Matrix, gemm, linear, matmul, reference};
use crate::testing::{
    check_gradient, close, close_tensor, devices, dot, on_threads, random, random_tensor,
    same_bits, widen,
};
use elapid_tensor::autograd::backward;
use elapid_tensor::{Device, Tensor};
use proptest::prelude::*;

/// A tensor of the given logical rows and columns, stored in one of the layouts that the models use:
/// contiguous, transposed, or as some of the columns of a wider one.
fn laid_out(seed: u64, rows: usize, cols: usize, layout: usize) -> Tensor {
    match layout {
        0 => random_tensor(seed, [rows, cols]),
        1 => random_tensor(seed, [cols, rows]).transpose(0, 1).unwrap(),
        2 => random_tensor(seed, [rows, cols + 5]).narrow(1, 3, cols).unwrap(),
        _ => random_tensor(seed, [cols + 2, rows])
            .narrow(0, 1, cols)
            .unwrap()
            .transpose(0, 1)
            .unwrap(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn agrees_with_reference(
        m in 0usize..40, k in 0usize..600, n in 0usize..70, la in 0usize..4, lb in 0usize..4, seed: u64,
    ) {
        let (a, b) = (laid_out(seed, m, k, la), laid_out(seed ^ 1, k, n, lb));
        let want = reference::matmul(&a.to_f64_vec().unwrap(), &b.to_f64_vec().unwrap(), m, k, n);
        close_tensor("matmul", &matmul(&a, &b).unwrap(), &want, 3e-6);
    }

    #[test]
    fn gradients_agree_with_reference(
        m in 1usize..30, k in 1usize..40, n in 1usize..40, la in 0usize..4, lb in 0usize..4, seed: u64,
    ) {
        let a = laid_out(seed, m, k, la).requires_grad();
        let b = laid_out(seed ^ 1, k, n, lb).requires_grad();
        let dc = random_tensor(seed ^ 2, [m, n]);
        let c = matmul(&a, &b).unwrap();
        let grads = backward(&[(&c, Some(dc.clone()))], &[&a, &b]).unwrap();
        let (da, db) = reference::matmul_backward(
            &a.to_f64_vec().unwrap(), &b.to_f64_vec().unwrap(), &dc.to_f64_vec().unwrap(), m, k, n,
        );
        close_tensor("da", grads[0].as_ref().unwrap(), &da, 3e-6);
        close_tensor("db", grads[1].as_ref().unwrap(), &db, 3e-6);
    }

    #[test]
    fn a_row_has_the_same_bits_alone_and_in_any_batch(
        m in 2usize..60, k in 1usize..700, n in 1usize..70, la in 0usize..4, lb in 0usize..4, seed: u64,
    ) {
        let (a, b) = (laid_out(seed, m, k, la), laid_out(seed ^ 1, k, n, lb));
        let all = matmul(&a, &b).unwrap();
        for (first, rows) in [(0, 1), (m - 1, 1), (m / 2, m - m / 2), (m / 3, (m - m / 3).min(7))] {
            let part = matmul(&a.narrow(0, first, rows).unwrap(), &b).unwrap();
            same_bits("rows", &part, &all.narrow(0, first, rows).unwrap());
        }
        // The strides do not matter either.
        same_bits("strides", &matmul(&a.contiguous().unwrap(), &b.contiguous().unwrap()).unwrap(), &all);
    }

    #[test]
    fn batches_are_products(z in 0usize..4, m in 1usize..9, k in 1usize..20, n in 1usize..9, seed: u64) {
        let a = random_tensor(seed, [z, m, k]);
        let b = random_tensor(seed ^ 1, [z, n, k]).transpose(1, 2).unwrap();
        let c = matmul(&a, &b).unwrap();
        for i in 0..z {
            let pick = |t: &Tensor, rows: usize, cols: usize| {
                t.narrow(0, i, 1).unwrap().contiguous().unwrap().reshape([rows, cols]).unwrap()
            };
            same_bits("batch", &matmul(&pick(&a, m, k), &pick(&b, k, n)).unwrap(), &pick(&c, m, n));
        }
    }
}

#[test]
fn reference_gradients_are_derivatives() {
    let (m, k, n) = (3, 4, 2);
    let (a, b) = (widen(&random(1, m * k)), widen(&random(2, k * n)));
    let dc = widen(&random(3, m * n));
    let (da, db) = reference::matmul_backward(&a, &b, &dc, m, k, n);
    check_gradient("da", &da, &a, |a| dot(&reference::matmul(a, &b, m, k, n), &dc));
    check_gradient("db", &db, &b, |b| dot(&reference::matmul(&a, b, m, k, n), &dc));
}

#[test]
fn batched_gradients() {
    let (a, b) =
        (random_tensor(1, [2, 3, 4]).requires_grad(), random_tensor(2, [2, 4, 5]).requires_grad());
    let c = matmul(&a, &b).unwrap();
    let dc = random_tensor(3, [2, 3, 5]);
    let grads = backward(&[(&c, Some(dc.clone()))], &[&a, &b]).unwrap();
    let (a, b, dc) = (a.to_f64_vec().unwrap(), b.to_f64_vec().unwrap(), dc.to_f64_vec().unwrap());
    let (mut da, mut db) = (Vec::new(), Vec::new());
    for i in 0..2 {
        let (x, y) = reference::matmul_backward(
            &a[i * 12..][..12],
            &b[i * 20..][..20],
            &dc[i * 15..][..15],
            3,
            4,
            5,
        );
        da.extend(x);
        db.extend(y);
    }
    close_tensor("da", grads[0].as_ref().unwrap(), &da, 1e-6);
    close_tensor("db", grads[1].as_ref().unwrap(), &db, 1e-6);
}

#[test]
fn linear_and_its_gradients() {
    let (t, k, n) = (37, 19, 23);
    let x = random_tensor(1, [t, 2 * k]).narrow(1, k, k).unwrap().requires_grad();
    let weight = random_tensor(2, [n, k]).requires_grad();
    let bias = random_tensor(3, [n]).requires_grad();
    let dy = random_tensor(4, [t, n]);
    let y = linear(&x, &weight, Some(&bias)).unwrap();
    let grads = backward(&[(&y, Some(dy.clone()))], &[&x, &weight, &bias]).unwrap();
    let (x, w) = (x.to_f64_vec().unwrap(), weight.to_f64_vec().unwrap());
    let (b, dy) = (bias.to_f64_vec().unwrap(), dy.to_f64_vec().unwrap());
    let transposed = reference::transpose(&w, n, k);
    let mut want = reference::matmul(&x, &transposed, t, k, n);
    want.iter_mut().enumerate().for_each(|(i, y)| *y += b[i % n]);
    close_tensor("y", &y, &want, 1e-6);
    let (dx, dw) = reference::matmul_backward(&x, &transposed, &dy, t, k, n);
    close_tensor("dx", grads[0].as_ref().unwrap(), &dx, 1e-6);
    close_tensor("dw", grads[1].as_ref().unwrap(), &reference::transpose(&dw, k, n), 1e-6);
    let db: Vec<f64> = (0..n).map(|j| dy.iter().skip(j).step_by(n).sum()).collect();
    close_tensor("db", grads[2].as_ref().unwrap(), &db, 1e-6);
}

/// Large enough that work is divided among threads in rows and in columns.
#[test]
fn threads_and_large_batches_do_not_change_bits() {
    for (m, k, n) in
        [(700, 300, 130), (9, 520, 1100), (3, 257, 4099), (48, 2100, 200), (300, 2100, 16)]
    {
        for (la, lb) in [(0, 1), (0, 0), (1, 0), (3, 2)] {
            let (a, b) = (laid_out(5, m, k, la), laid_out(6, k, n, lb));
            let one = on_threads(1, || matmul(&a, &b).unwrap());
            let five = on_threads(5, || matmul(&a, &b).unwrap());
            same_bits("threads", &five, &one);
            for row in [0, m / 2, m - 1] {
                let alone = matmul(&a.narrow(0, row, 1).unwrap(), &b).unwrap();
                same_bits("row", &alone, &one.narrow(0, row, 1).unwrap());
            }
        }
    }
}

/// Not a number in one row stays there, whatever padding the kernels use.
#[test]
fn rows_and_columns_do_not_mix() {
    let (m, k, n) = (23, 70, 37);
    let mut a = random(1, m * k);
    let b = random(2, k * n);
    let clean = run(&a, &b, m, k, n);
    a[7 * k + 3] = f32::NAN;
    a[8 * k + 69] = f32::INFINITY;
    let dirty = run(&a, &b, m, k, n);
    for i in 0..m {
        for j in 0..n {
            let (clean, dirty) = (clean[i * n + j], dirty[i * n + j]);
            match i {
                7 => assert!(dirty.is_nan()),
                8 => assert!(!dirty.is_finite()),
                _ => assert_eq!(clean.to_bits(), dirty.to_bits()),
            }
        }
    }
}

fn run(a: &[f32], b: &[f32], m: usize, k: usize, n: usize) -> Vec<f32> {
    let mut out = vec![0.0; m * n];
    assert!(gemm(&mut out, Matrix::row_major(a, m, k), Matrix::row_major(b, k, n)));
    out
}

#[test]
fn wrong_arguments_are_refused() {
    let a = random_tensor(1, [2, 3]);
    let message = matmul(&a, &a).unwrap_err().to_string();
    assert!(message.contains("b has shape") && message.contains("expected [3, N]"), "{message}");
    assert!(matmul(&a, &random_tensor(1, [2, 3, 3])).is_err());
    assert!(linear(&a, &random_tensor(1, [4, 2]), None).is_err());
    assert!(linear(&a, &random_tensor(1, [4, 3]), Some(&random_tensor(1, [3]))).is_err());
    assert!(matmul(&a, &Tensor::zeros::<f64>([3, 2])).is_err());
    let mut out = [0.0; 4];
    assert!(!gemm(
        &mut out,
        Matrix::row_major(&[0.0; 3], 2, 2),
        Matrix::row_major(&[0.0; 4], 2, 2)
    ));
}

/// Parts of a split tensor: one with a single consumer, whose gradient is written where it belongs; one with two, whose
/// gradients are added; one with none.
#[test]
fn gradients_of_parts_meet_in_one_tensor() {
    const WIDTHS: [usize; 3] = [8, 5, 3];
    let gradient = |device: Device, consumers: &[(usize, usize)]| -> Tensor {
        let x = random_tensor(1, [7, 16]).to(device).unwrap().requires_grad();
        let parts = x.split(1, &WIDTHS).unwrap();
        let outputs: Vec<Tensor> = consumers
            .iter()
            .map(|&(part, seed)| {
                let weight = random_tensor(seed as u64, [6, WIDTHS[part]]).to(device).unwrap();
                linear(&parts[part], &weight, None).unwrap()
            })
            .collect();
        let roots: Vec<(&Tensor, Option<Tensor>)> = outputs
            .iter()
            .enumerate()
            .map(|(i, y)| (y, Some(random_tensor(50 + i as u64, [7, 6]).to(device).unwrap())))
            .collect();
        let mut found = backward(&roots, &[&x]).unwrap();
        found.swap_remove(0).unwrap().to(Device::Cpu).unwrap()
    };
    let cases: [&[(usize, usize)]; 4] =
        [&[(0, 10)], &[(1, 11), (0, 12)], &[(1, 13), (2, 14), (1, 15)], &[(0, 1), (1, 2), (2, 3)]];
    for consumers in cases {
        let want = gradient(Device::Cpu, consumers);
        for device in devices() {
            let got = gradient(device, consumers);
            let name = format!("{device:?}, {consumers:?}");
            close(&name, &got.to_f64_vec().unwrap(), &want.to_f64_vec().unwrap(), 1e-5);
        }
    }
}
