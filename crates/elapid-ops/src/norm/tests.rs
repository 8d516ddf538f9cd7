use elapid_tensor::Tensor;
use elapid_tensor::autograd::backward;
use proptest::prelude::*;

use super::reference::{self, Definition};
use super::{layer_norm, rms_norm};
use crate::testing::{
    check_gradient, close_tensor, dot, on_threads, random, random_tensor, same_bits, widen,
};

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_f64_vec().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn fast_versions_match_the_reference(
        t in 0usize..80, c in 1usize..70, center: bool, with_weight: bool, with_residual: bool, seed: u64,
    ) {
        let x = random_tensor(seed, [t, c]).requires_grad();
        let weight = random_tensor(seed ^ 1, [c]).requires_grad();
        let bias = random_tensor(seed ^ 2, [c]).requires_grad();
        let residual = random_tensor(seed ^ 3, [t, c]).requires_grad();
        let (dy, dsum) = (random_tensor(seed ^ 4, [t, c]), random_tensor(seed ^ 5, [t, c]));
        let definition = Definition { center, eps: f64::from(1e-5f32) };
        let weight_given = with_weight.then_some(&weight);
        let residual_given = with_residual.then_some(&residual);
        let (y, sum) = if center {
            layer_norm(&x, weight_given, Some(&bias), residual_given, 1e-5).unwrap()
        } else {
            rms_norm(&x, weight_given, residual_given, 1e-5).unwrap()
        };

        let r: Vec<f64> = values(&x)
            .iter()
            .zip(values(&residual))
            .map(|(x, r)| if with_residual { f64::from(*x as f32 + r as f32) } else { *x })
            .collect();
        let w = values(&weight);
        let w = with_weight.then_some(w.as_slice());
        let b = values(&bias);
        let want = reference::forward(definition, &r, c, w, center.then_some(b.as_slice()));
        close_tensor("y", &y, &want, 2e-5);
        close_tensor("residual_out", &sum, &r, 0.0);

        let mut wanted = vec![&x];
        wanted.extend(residual_given);
        wanted.extend(weight_given);
        if center {
            wanted.push(&bias);
        }
        let grads = backward(&[(&y, Some(dy.clone())), (&sum, Some(dsum.clone()))], &wanted).unwrap();
        let (mut dr, dw, db) = reference::backward(definition, &r, c, w, &values(&dy));
        for (dr, dsum) in dr.iter_mut().zip(values(&dsum)) {
            *dr += dsum;
        }
        let mut wants = vec![("dx", dr.clone())];
        if with_residual {
            wants.push(("dresidual", dr));
        }
        if with_weight {
            wants.push(("dweight", dw));
        }
        if center {
            wants.push(("dbias", db));
        }
        for (grad, (name, want)) in grads.iter().zip(wants) {
            close_tensor(name, grad.as_ref().unwrap(), &want, 1e-4);
        }
    }
}

#[test]
fn reference_gradients_are_finite_differences() {
    for center in [false, true] {
        let definition = Definition { center, eps: 1e-3 };
        let (t, c) = (3, 5);
        let (r, w) = (widen(&random(1, t * c)), widen(&random(2, c)));
        let (b, dy) = (widen(&random(3, c)), widen(&random(4, t * c)));
        let loss = |r: &[f64], w: &[f64], b: &[f64]| {
            dot(&reference::forward(definition, r, c, Some(w), Some(b)), &dy)
        };
        let (dr, dw, db) = reference::backward(definition, &r, c, Some(&w), &dy);
        check_gradient("dr", &dr, &r, |r| loss(r, &w, &b));
        check_gradient("dweight", &dw, &w, |w| loss(&r, w, &b));
        check_gradient("dbias", &db, &b, |b| loss(&r, &w, b));
    }
}

#[test]
fn a_row_has_the_same_bits_alone_in_any_batch_and_on_any_threads() {
    let (t, c) = (700, 77);
    let (x, residual) = (random_tensor(1, [t, c]), random_tensor(2, [t, c]));
    let weight = random_tensor(3, [c]);
    let run =
        |x: &Tensor, residual: &Tensor| rms_norm(x, Some(&weight), Some(residual), 1e-5).unwrap();
    let (y, sum) = on_threads(1, || run(&x, &residual));
    let (y2, _) = on_threads(3, || run(&x, &residual));
    same_bits("threads", &y2, &y);
    for row in [0, 1, 63, 64, 699] {
        let part = |tensor: &Tensor| tensor.narrow(0, row, 1).unwrap().contiguous().unwrap();
        let (alone, alone_sum) = run(&part(&x), &part(&residual));
        same_bits("y", &alone, &part(&y));
        same_bits("residual_out", &alone_sum, &part(&sum));
    }
}

#[test]
fn parameter_gradients_do_not_depend_on_the_threads() {
    let (t, c) = (900, 50);
    let (x, dy) = (random_tensor(1, [t, c]), random_tensor(2, [t, c]));
    let weight = random_tensor(3, [c]);
    let run = |threads| {
        on_threads(threads, || {
            let weight = weight.requires_grad();
            let (y, _) = rms_norm(&x, Some(&weight), None, 1e-5).unwrap();
            backward(&[(&y, Some(dy.clone()))], &[&weight]).unwrap().swap_remove(0).unwrap()
        })
    };
    same_bits("dweight", &run(4), &run(1));
}

#[test]
fn nan_stays_in_its_row() {
    let (t, c) = (5, 19);
    let clean = random_tensor(1, [t, c]);
    let mut dirty = clean.clone();
    dirty.data_mut::<f32>().unwrap()[2 * c + 3] = f32::NAN;
    let (want, _) = rms_norm(&clean, None, None, 1e-5).unwrap();
    let (got, _) = rms_norm(&dirty, None, None, 1e-5).unwrap();
    for row in [0, 1, 3, 4] {
        let part = |tensor: &Tensor| tensor.narrow(0, row, 1).unwrap().contiguous().unwrap();
        same_bits("row", &part(&got), &part(&want));
    }
    assert!(values(&got)[2 * c..3 * c].iter().all(|v| v.is_nan()));
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let x = random_tensor(1, [3, 4]);
    let error = rms_norm(&x, Some(&random_tensor(2, [5])), None, 1e-5).unwrap_err().to_string();
    assert!(error.contains("weight") && error.contains("[5]") && error.contains("[4]"), "{error}");
    assert!(rms_norm(&x, None, Some(&random_tensor(2, [4, 3])), 1e-5).is_err());
    assert!(layer_norm(&random_tensor(1, [4]), None, None, None, 1e-5).is_err());
}

/// max|diff| <= 2e-5 max|expected|, the tolerance of the golden values for f32 code.
fn golden(name: &str, got: &Tensor, want: &[f64]) {
    let largest = want.iter().fold(0.0f64, |m, w| m.max(w.abs()));
    for (i, (got, want)) in values(got).iter().zip(want).enumerate() {
        assert!((got - want).abs() <= 2e-5 * largest, "{name}[{i}]: {got} instead of {want}");
    }
}

/// The cases of `norms.safetensors` that this operation defines; gated, grouped and weightless ones belong to
/// other mixers.
#[test]
fn golden_cases() {
    let bytes = include_bytes!("../../tests/fixtures/golden/ops/norms.safetensors");
    let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
    let read = |name: String| -> Option<Vec<f64>> {
        let view = file.tensor(&name).ok()?;
        Some(match view.dtype() {
            safetensors::Dtype::F32 => view
                .data()
                .chunks(4)
                .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
                .collect(),
            _ => view.data().chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
        })
    };
    let (_, metadata) = safetensors::SafeTensors::read_metadata(bytes).unwrap();
    let cases: serde_json::Value =
        serde_json::from_str(&metadata.metadata().as_ref().unwrap()["cases"]).unwrap();
    let mut run = 0;
    for (case, options) in cases.as_object().unwrap() {
        let kind = options["kind"].as_str().unwrap_or_default();
        if !matches!(kind, "rms" | "layer") || read(format!("{case}.z")).is_some() {
            continue;
        }
        let get = |tensor: &str| read(format!("{case}.{tensor}"));
        let shape = file.tensor(&format!("{case}.x")).unwrap().shape().to_vec();
        let tensor = |values: Vec<f64>, shape: &[usize]| {
            let narrow: Vec<f32> = values.iter().map(|&v| v as f32).collect();
            Tensor::from_slice(&narrow, shape).unwrap()
        };
        let x = tensor(get("x").unwrap(), &shape).requires_grad();
        let weight = get("weight").map(|w| tensor(w, &shape[1..]).requires_grad());
        let bias = get("bias").map(|b| tensor(b, &shape[1..]).requires_grad());
        let residual = get("residual").map(|r| tensor(r, &shape).requires_grad());
        let eps = options["eps"].as_f64().unwrap_or(1e-5) as f32;
        let (y, sum) = match kind {
            "rms" => rms_norm(&x, weight.as_ref(), residual.as_ref(), eps).unwrap(),
            _ => layer_norm(&x, weight.as_ref(), bias.as_ref(), residual.as_ref(), eps).unwrap(),
        };
        golden(case, &y, &get("out").unwrap());
        let mut roots = vec![(&y, Some(tensor(get("dout").unwrap(), &shape)))];
        if let Some(dsum) = get("dresidual_out") {
            golden(case, &sum, &get("residual_out").unwrap());
            roots.push((&sum, Some(tensor(dsum, &shape))));
        }
        let mut wanted = vec![("dx", &x)];
        wanted.extend(weight.as_ref().map(|w| ("dweight", w)));
        wanted.extend(bias.as_ref().filter(|_| kind == "layer").map(|b| ("dbias", b)));
        wanted.extend(residual.as_ref().map(|r| ("dresidual", r)));
        let leaves: Vec<&Tensor> = wanted.iter().map(|(_, leaf)| *leaf).collect();
        for ((name, _), grad) in wanted.iter().zip(backward(&roots, &leaves).unwrap()) {
            golden(&format!("{case}.{name}"), &grad.unwrap(), &get(name).unwrap());
        }
        run += 1;
    }
    assert!(run >= 3, "only {run} cases ran");
}
