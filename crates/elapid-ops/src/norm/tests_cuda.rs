//! The kernels of the normalisations, emulated and on the card, against the definition.

use elapid_tensor::bf16;

use super::cuda::{self, Norm};
use super::reference::{self, Definition};
use crate::gpu::{GpuElement, Rows};
use crate::testing::{close, from_element, gpus, random, to_element, widen};

fn check<T: GpuElement>(seed: u64, (rows, width): (usize, usize), center: bool, residual: bool) {
    let eps = 1e-5;
    let stride = width + 3;
    let wide: Vec<T> = to_element(&random(seed, rows * stride));
    let x: Vec<T> = (0..rows).flat_map(|t| wide[t * stride..][..width].iter().copied()).collect();
    let add = random(seed + 1, rows * width);
    let (weight, bias) = (random(seed + 2, width), random(seed + 3, width));
    let dy: Vec<T> = to_element(&random(seed + 4, rows * width));
    let dsum = random(seed + 5, rows * width);

    let mut r = from_element(&x);
    if residual {
        r.iter_mut().zip(&add).for_each(|(r, add)| *r += f64::from(*add));
    }
    let definition = Definition { center, eps };
    let y = reference::forward(definition, &r, width, Some(&widen(&weight)), Some(&widen(&bias)));
    let (mut dr, dweight, dbias) =
        reference::backward(definition, &r, width, Some(&widen(&weight)), &from_element(&dy));
    dr.iter_mut().zip(&dsum).for_each(|(dr, dsum)| *dr += f64::from(*dsum));

    for gpu in gpus() {
        let up = |values: &[f32]| gpu.upload(values).unwrap();
        let (weight, bias, add, dsum) = (up(&weight), up(&bias), up(&add), up(&dsum));
        let (wide, dy) = (gpu.upload(&wide).unwrap(), gpu.upload(&dy).unwrap());
        let norm =
            Norm { width, center, eps, weight: Some(weight.slice()), bias: Some(bias.slice()) };
        let tolerance = if T::CUDA == "float" { 1e-5 } else { 1e-2 };
        let x = Rows::part(&wide, 0, stride);
        let add = residual.then(|| Rows::new(&add, width));
        let (found, sum) = cuda::forward::<T, T>(&gpu, &norm, rows, x, add).unwrap();
        close("y", &from_element(&found.read().unwrap()), &y, tolerance);
        let (dy, dsum) = (Rows::new(&dy, width), Some(Rows::new(&dsum, width)));
        let grads = match &sum {
            Some(sum) => {
                close("residual_out", &widen(&sum.read().unwrap()), &r, tolerance);
                let sum_rows = Rows::new(sum, width);
                let again = cuda::forward::<T, f32>(&gpu, &norm, rows, sum_rows, None).unwrap().0;
                let (again, found) = (again.read().unwrap(), found.read().unwrap());
                assert_eq!(from_element(&again), from_element(&found), "y again");
                cuda::backward(&gpu, &norm, rows, Rows::new(sum, width), dy, dsum)
            }
            None => cuda::backward(&gpu, &norm, rows, x, dy, dsum),
        }
        .unwrap();
        close("dx", &from_element(&grads.x.read().unwrap()), &dr, tolerance);
        close("dresidual", &widen(&grads.residual.read().unwrap()), &dr, tolerance);
        close("dweight", &widen(&grads.weight.read().unwrap()), &dweight, tolerance);
        close("dbias", &widen(&grads.bias.read().unwrap()), &dbias, tolerance);
    }
}

#[test]
fn kernels_match_the_definition() {
    for center in [false, true] {
        check::<f32>(1, (5, 64), center, true);
        check::<f32>(2, (70, 7), center, false);
        check::<f32>(3, (3, 1300), center, true);
        check::<bf16>(4, (33, 128), center, true);
        check::<bf16>(5, (2, 50), center, false);
    }
    check::<f32>(6, (0, 16), false, true);
}

#[test]
fn a_row_does_not_depend_on_others() {
    let width = 100;
    let x = random(1, 4 * width);
    for gpu in gpus() {
        let norm = Norm { width, center: false, eps: 1e-5, weight: None, bias: None };
        let run = |x: &[f32]| {
            let rows = x.len() / width;
            let x = gpu.upload(x).unwrap();
            let x = Rows::new(&x, width);
            cuda::forward::<f32, f32>(&gpu, &norm, rows, x, None).unwrap().0.read().unwrap()
        };
        let all = run(&x);
        for row in 0..4 {
            assert_eq!(run(&x[row * width..][..width]), all[row * width..][..width]);
        }
    }
}
