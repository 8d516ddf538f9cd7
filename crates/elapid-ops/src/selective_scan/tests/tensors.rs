//! The operation on tensors: views, autograd, errors.

use elapid_tensor::autograd::backward;
use elapid_tensor::{DType, Device, Sequences, Tensor};

use super::super::{Inputs, selective_scan, selective_scan_linear};
use super::Case;
use super::case::scattered;
use crate::elementwise::neg_exp;
use crate::matmul::linear;
use crate::testing::{close_tensor, devices, random_tensor};

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
fn a_projection_behind_the_scan_is_the_scan_and_a_projection() {
    let (tokens, channels, states, width) = (21, 16, 4, 12);
    let sequences = Sequences::fresh(&[8, 13]);
    for device in devices() {
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 2e-2)] {
            if dtype == DType::BF16 && device == Device::Cpu {
                continue;
            }
            for (gate, with_bias) in [(true, false), (true, true), (false, true)] {
                let leaf = |seed, shape: &[usize], dtype| {
                    let tensor = random_tensor(seed, shape).to(device).unwrap();
                    tensor.cast(dtype).unwrap().requires_grad()
                };
                let (u, delta) =
                    (leaf(1, &[tokens, channels], dtype), leaf(2, &[tokens, channels], dtype));
                let a = neg_exp(&leaf(3, &[channels, states], DType::F32))
                    .unwrap()
                    .detach()
                    .requires_grad();
                let (b, c) =
                    (leaf(4, &[tokens, 1, states], dtype), leaf(5, &[tokens, 1, states], dtype));
                let (d, z) =
                    (leaf(6, &[channels], DType::F32), leaf(7, &[tokens, channels], dtype));
                let (weight, bias) =
                    (leaf(8, &[width, channels], DType::F32), leaf(9, &[width], DType::F32));
                let inputs = Inputs {
                    u: &u,
                    delta: &delta,
                    a: &a,
                    b: &b,
                    c: &c,
                    d: Some(&d),
                    z: gate.then_some(&z),
                    delta_bias: None,
                    delta_softplus: true,
                    state: None,
                };
                let bias = with_bias.then_some(&bias);
                let mut leaves = vec![&weight, &u, &delta, &a, &b, &c, &d];
                leaves.extend(gate.then_some(&z));
                leaves.extend(bias);
                let grads = |output: &Tensor, state: &Tensor| {
                    let dout =
                        random_tensor(10, [tokens, width]).to(device).unwrap().cast(dtype).unwrap();
                    let dstate = random_tensor(11, state.shape()).to(device).unwrap();
                    backward(&[(output, Some(dout)), (state, Some(dstate))], &leaves).unwrap()
                };
                let found = selective_scan_linear(&inputs, &weight, bias, &sequences).unwrap();
                let (y, state) = selective_scan(&inputs, &sequences).unwrap();
                let output = linear(&y, &weight, bias).unwrap();
                let pairs = [(&found.y, &y), (&found.output, &output), (&found.state, &state)];
                for (got, want) in pairs {
                    close_tensor("output", got, &want.to_f64_vec().unwrap(), 0.0);
                }
                let (got, want) = (grads(&found.output, &found.state), grads(&output, &state));
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    let want = want.as_ref().unwrap().to_f64_vec().unwrap();
                    // Only the weight's gradient is made of the output.
                    let allowed = if i == 0 { tolerance } else { 0.0 };
                    close_tensor(
                        &format!("gradient {i} on {device}"),
                        got.as_ref().unwrap(),
                        &want,
                        allowed,
                    );
                }
                // The state alone.
                let found = selective_scan_linear(&inputs, &weight, bias, &sequences).unwrap();
                let grads = backward(&[(&found.state, Some(found.state.detach()))], &[&u, &weight])
                    .unwrap();
                assert!(grads[0].is_some());
                assert!(
                    grads[1].as_ref().is_none_or(|g| g
                        .to_f64_vec()
                        .unwrap()
                        .iter()
                        .all(|&v| v == 0.0))
                );
            }
        }
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
