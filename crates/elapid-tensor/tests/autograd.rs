//! The graph itself, exercised with a toy product: order, sharing, recomputation, several roots.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use elapid_tensor::autograd::{
    Backward, Saved, accumulate, backward, checkpoint, is_recording, no_grad, record_one,
    rematerialize, with_recipe,
};
use elapid_tensor::{Result, Tensor};

fn vector(values: &[f32]) -> Tensor {
    Tensor::from_slice(values, [values.len()]).unwrap()
}

fn product_of(a: &Tensor, b: &Tensor) -> Tensor {
    let values: Vec<f32> = a
        .to_vec::<f32>()
        .unwrap()
        .iter()
        .zip(b.to_vec::<f32>().unwrap())
        .map(|(a, b)| a * b)
        .collect();
    Tensor::from_slice(&values, a.shape()).unwrap()
}

/// Elementwise product with a recorded gradient.
fn mul(a: &Tensor, b: &Tensor) -> Tensor {
    record_one("mul", &[a, b], product_of(a, b), || {
        let (a, b) = (Saved::new(a), Saved::new(b));
        move |context: &mut Backward| {
            let Some(grad) = context.take_grad(0) else { return Ok(vec![None, None]) };
            let da = if context.needs(0) { Some(product_of(&grad, &b.get()?)) } else { None };
            let db = if context.needs(1) { Some(product_of(&grad, &a.get()?)) } else { None };
            Ok(vec![da, db])
        }
    })
}

fn values(tensor: &Option<Tensor>) -> Vec<f32> {
    tensor.as_ref().unwrap().to_vec().unwrap()
}

#[test]
fn a_value_used_twice_gets_both_gradients() {
    let x = vector(&[2.0, 3.0]).requires_grad();
    let square = mul(&x, &x);
    let cube = mul(&square, &x);
    let grads = backward(&[(&cube, Some(vector(&[1.0, 1.0])))], &[&x]).unwrap();
    assert_eq!(values(&grads[0]), [12.0, 27.0]);
}

#[test]
fn several_roots_and_inputs_inside_the_graph() {
    let x = vector(&[2.0]).requires_grad();
    let y = vector(&[5.0]).requires_grad();
    let state = mul(&x, &y);
    let out = mul(&state, &x);
    let grads =
        backward(&[(&out, None), (&state, Some(vector(&[10.0])))], &[&x, &state, &y]).unwrap();
    // out = x²y and 10·state = 10xy.
    assert_eq!(values(&grads[0]), [2.0 * 2.0 * 5.0 + 10.0 * 5.0]);
    assert_eq!(values(&grads[1]), [2.0 + 10.0]);
    assert_eq!(values(&grads[2]), [4.0 + 20.0]);
}

#[test]
fn an_input_that_no_root_depends_on_has_no_gradient() {
    let x = vector(&[2.0]).requires_grad();
    let y = vector(&[5.0]).requires_grad();
    let out = mul(&x, &x);
    let grads = backward(&[(&out, None)], &[&x, &y]).unwrap();
    assert!(grads[1].is_none());
}

#[test]
fn a_graph_is_used_once() {
    let x = vector(&[2.0]).requires_grad();
    let out = mul(&x, &x);
    backward(&[(&out, None)], &[&x]).unwrap();
    let error = backward(&[(&out, None)], &[&x]).unwrap_err().to_string();
    assert!(error.contains("mul") && error.contains("before"), "{error}");
}

#[test]
fn untracked_roots_and_wrong_gradients_are_refused() {
    let x = vector(&[2.0, 1.0]).requires_grad();
    assert!(backward(&[(&vector(&[1.0]), None)], &[&x]).is_err());
    let out = mul(&x, &x);
    assert!(backward(&[(&out, None)], &[&x]).is_err(), "two elements need a gradient");
    assert!(backward(&[(&out, Some(vector(&[1.0])))], &[&x]).is_err(), "wrong shape");
}

#[test]
fn nothing_is_recorded_under_no_grad() {
    let x = vector(&[2.0]).requires_grad();
    let out = no_grad(|| {
        assert!(!is_recording(&[&x]));
        mul(&x, &x)
    });
    assert!(!out.tracks_grad() && is_recording(&[&x]));
}

#[test]
fn a_recorded_result_cannot_be_changed_and_a_shared_leaf_is_copied() {
    let mut x = vector(&[2.0]).requires_grad();
    let mut out = mul(&x, &x);
    assert!(out.data_mut::<f32>().is_err());
    x.data_mut::<f32>().unwrap()[0] = 100.0;
    let leaf = x.clone();
    let grads = backward(&[(&out, None)], &[&leaf]).unwrap();
    assert_eq!(values(&grads[0]), [4.0], "backward sees the values of its forward");
}

#[test]
fn rematerialized_values_are_made_again_once() {
    let runs = Arc::new(AtomicUsize::new(0));
    let x = vector(&[2.0]).requires_grad();
    let y = vector(&[3.0]).requires_grad();
    let counter = runs.clone();
    let u = rematerialize(&[&x, &y], move |inputs| {
        counter.fetch_add(1, Ordering::Relaxed);
        Ok(vec![mul(&inputs[0], &inputs[1])])
    })
    .unwrap()
    .swap_remove(0);
    let out = mul(&mul(&u, &u), &u);
    drop(u);
    assert_eq!(runs.load(Ordering::Relaxed), 1);
    let grads = backward(&[(&out, None)], &[&x, &y]).unwrap();
    assert_eq!(runs.load(Ordering::Relaxed), 2, "three users, one more run");
    assert_eq!(values(&grads[0]), [3.0 * 36.0 * 3.0]);
    assert_eq!(values(&grads[1]), [3.0 * 36.0 * 2.0]);
}

#[test]
fn a_recipe_of_something_else_is_used_in_place_of_the_values() {
    let x = vector(&[2.0]).requires_grad();
    let square = mul(&x, &x);
    // It says five times the square, so that its use shows.
    let u = with_recipe(vec![square.clone()], &[&x], |inputs| {
        let square = mul(&inputs[0], &inputs[0]);
        Ok(vec![mul(&square, &vector(&[5.0]))])
    })
    .swap_remove(0);
    assert_eq!(values(&Some(u.clone())), [4.0]);
    let out = mul(&u, &vector(&[3.0]).requires_grad());
    let grads = backward(&[(&out, None)], &[&x]).unwrap();
    assert_eq!(values(&grads[0]), [12.0], "gradients flow as without the recipe");
    let factor = vector(&[3.0]).requires_grad();
    let out = mul(&u.detach(), &factor);
    assert_eq!(values(&backward(&[(&out, None)], &[&factor]).unwrap()[0]), [4.0]);
    let x = vector(&[2.0]).requires_grad();
    let u = with_recipe(vec![mul(&x, &x)], &[&x], |_| Ok(vec![vector(&[20.0])])).swap_remove(0);
    let out = mul(&u, &factor);
    assert_eq!(values(&backward(&[(&out, None)], &[&factor]).unwrap()[0]), [20.0]);
}

#[test]
fn checkpoint_gives_the_same_gradients() -> Result<()> {
    let run = |use_checkpoint: bool| -> Result<Vec<Vec<f32>>> {
        let x = vector(&[2.0, -1.0]).requires_grad();
        let w = vector(&[0.5, 4.0]).requires_grad();
        let segment = |t: &[Tensor]| Ok(vec![mul(&mul(&t[0], &t[1]), &t[0])]);
        let out = if use_checkpoint {
            checkpoint(&[&x, &w], segment)?
        } else {
            segment(&[x.clone(), w.clone()])?
        };
        let out = mul(&out[0], &x);
        let grads = backward(&[(&out, Some(vector(&[1.0, 1.0])))], &[&x, &w])?;
        Ok(grads.iter().map(values).collect())
    };
    assert_eq!(run(true)?, run(false)?);
    Ok(())
}

#[test]
fn a_long_chain_neither_recurses_in_backward_nor_in_drop() {
    let x = vector(&[1.0]).requires_grad();
    let one = vector(&[1.0]);
    let mut y = x.clone();
    for _ in 0..200_000 {
        y = mul(&y, &one);
    }
    let dropped = mul(&y, &one);
    let grads = backward(&[(&y, None)], &[&x]).unwrap();
    assert_eq!(values(&grads[0]), [1.0]);
    drop(dropped);
}

#[test]
fn accumulate_checks_shape_and_type() {
    let mut sum = vector(&[1.0, 2.0]);
    accumulate(&mut sum, &vector(&[10.0, 20.0])).unwrap();
    assert_eq!(sum.to_vec::<f32>().unwrap(), [11.0, 22.0]);
    assert!(accumulate(&mut sum, &vector(&[1.0])).is_err());
    assert!(accumulate(&mut sum, &Tensor::from_slice(&[1f64, 2.0], [2]).unwrap()).is_err());
}
