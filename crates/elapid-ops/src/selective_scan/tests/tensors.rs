//! The operation on tensors: views, autograd, errors.

use elapid_tensor::autograd::backward;
use elapid_tensor::{Sequences, Tensor};

use super::super::{Inputs, selective_scan};
use super::Case;
use super::case::scattered;
use crate::testing::{close_tensor, random_tensor};

#[test]
fn gradients_flow_through_views_of_wider_tensors() {
    let (channels, states, groups) = (6, 4, 2);
    let case = Case::random(
        13,
        scattered(&[(5, true), (9, false)]),
        channels,
        states,
        [Some(2); 2],
        false,
    );
    let tokens = case.sequences.tokens();
    let slots = case.sequences.slots();
    let tensor = |values: &[f32], shape: &[usize]| Tensor::from_slice(values, shape).unwrap();
    let u = tensor(&case.u, &[tokens, channels]);
    let z = tensor(case.z.as_ref().unwrap(), &[tokens, channels]);
    let uz = Tensor::concat(&[&u, &z], 1).unwrap().requires_grad();
    let parts = uz.split(1, &[channels, channels]).unwrap();
    let map = |values: &[f32]| tensor(values, &[tokens, groups * states]);
    let bc = Tensor::concat(&[&map(&case.b), &map(&case.c)], 1).unwrap().requires_grad();
    let maps: Vec<Tensor> = bc
        .split(1, &[groups * states, groups * states])
        .unwrap()
        .iter()
        .map(|map| map.reshape([tokens, groups, states]).unwrap())
        .collect();
    let delta = tensor(&case.delta, &[tokens, channels]).requires_grad();
    let a = tensor(&case.a, &[channels, states]).requires_grad();
    let d = tensor(case.d.as_ref().unwrap(), &[channels]).requires_grad();
    let bias = tensor(case.bias.as_ref().unwrap(), &[channels]).requires_grad();
    let state = tensor(case.h0.as_ref().unwrap(), &[slots, channels, states]).requires_grad();
    let inputs = Inputs {
        u: &parts[0],
        delta: &delta,
        a: &a,
        b: &maps[0],
        c: &maps[1],
        d: Some(&d),
        z: Some(&parts[1]),
        delta_bias: Some(&bias),
        delta_softplus: true,
        state: Some(&state),
    };
    let (y, last) = selective_scan(&inputs, &case.sequences).unwrap();
    let want = case.widen().run();
    close_tensor("y", &y, &want.y, 2e-5);
    close_tensor("last", &last, &want.last, 2e-5);

    let dy = tensor(&case.dy, &[tokens, channels]);
    let dlast = tensor(case.dlast.as_ref().unwrap(), &[slots, channels, states]);
    let wanted = [&uz, &bc, &delta, &a, &d, &bias, &state];
    let grads: Vec<Tensor> = backward(&[(&y, Some(dy)), (&last, Some(dlast))], &wanted)
        .unwrap()
        .into_iter()
        .map(Option::unwrap)
        .collect();
    let half = |i: usize, at, len| grads[i].narrow(1, at, len).unwrap();
    close_tensor("du", &half(0, 0, channels), &want.grad.u, 2e-5);
    close_tensor("dz", &half(0, channels, channels), &want.grad.z, 2e-5);
    close_tensor("dB", &half(1, 0, groups * states), &want.grad.b, 2e-5);
    close_tensor("dC", &half(1, groups * states, groups * states), &want.grad.c, 2e-5);
    let rest = [&want.grad.delta, &want.grad.a, &want.grad.d, &want.grad.delta_bias, &want.grad.h0];
    for (grad, want) in grads[2..].iter().zip(rest) {
        close_tensor("gradient", grad, want, 2e-5);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let t = |shape: &[usize]| random_tensor(1, shape);
    let (x, a, bc) = (t(&[4, 6]), t(&[6, 3]), t(&[4, 2, 3]));
    let good = Inputs {
        u: &x,
        delta: &x,
        a: &a,
        b: &bc,
        c: &bc,
        d: None,
        z: None,
        delta_bias: None,
        delta_softplus: true,
        state: None,
    };
    let sequences = Sequences::fresh(&[4]);
    selective_scan(&good, &sequences).unwrap();
    let refused = |inputs: Inputs<'_>, sequences: &Sequences, part: &str| {
        let error = selective_scan(&inputs, sequences).unwrap_err().to_string();
        assert!(error.starts_with("selective_scan: ") && error.contains(part), "{error}");
    };
    refused(good, &Sequences::fresh(&[5]), "u has shape");
    refused(Inputs { z: Some(&a), ..good }, &sequences, "z has shape");
    refused(Inputs { d: Some(&a), ..good }, &sequences, "d has shape");
    refused(Inputs { b: &t(&[4, 4, 3]), ..good }, &sequences, "b has shape");
    refused(Inputs { c: &t(&[4, 1, 3]), ..good }, &sequences, "c has shape");
    refused(Inputs { a: &t(&[6, 257]), ..good }, &sequences, "N from 1 to 256");
    refused(Inputs { state: Some(&a), ..good }, &sequences, "state has shape");
    let continued = Sequences::continued(&[4], &[0]).unwrap();
    refused(good, &continued, "expected a state");
    let wide = Tensor::from_slice(&[0.0f64; 18], [6, 3]).unwrap();
    refused(Inputs { a: &wide, ..good }, &sequences, "a is f64");
}
