//! One operation and its gradients: the selective scan over a ragged batch.
//! `cargo run --release -p elapid --example one_op`.

use elapid::ops::selective_scan::{Inputs, selective_scan};
use elapid::tensor::autograd::backward;
use elapid::{Sequences, Tensor};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Two sequences of 3 and 2 tokens, E = 2 channels, N = 2 states a channel.
    let sequences = Sequences::fresh(&[3, 2]);
    let wave = |shape: &[usize], phase: f32| {
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|i| (0.7 * i as f32 + phase).sin()).collect();
        Tensor::from_slice(&values, shape)
    };
    let u = wave(&[5, 2], 0.0)?.requires_grad();
    let delta = wave(&[5, 2], 1.0)?;
    let a = Tensor::from_slice(&[-1.0f32, -2.0, -1.0, -2.0], [2, 2])?;
    let (b, c) = (wave(&[5, 1, 2], 2.0)?, wave(&[5, 1, 2], 3.0)?);

    let inputs = Inputs {
        u: &u,
        delta: &delta,
        a: &a,
        b: &b,
        c: &c,
        d: None,
        z: None,
        delta_bias: None,
        delta_softplus: true,
        state: None,
    };
    let (y, state) = selective_scan(&inputs, &sequences)?;
    println!("y     [T, E]        {:.4?}", y.to_vec::<f32>()?);
    println!("state [slots, E, N] {:.4?}", state.to_vec::<f32>()?);

    // Several roots: the outputs with a gradient of ones, and the state that the sequences end in.
    let ones = |tensor: &Tensor| Some(Tensor::filled(1f32, tensor.shape()));
    let gradients = backward(&[(&y, ones(&y)), (&state, ones(&state))], &[&u])?;
    if let Some(du) = &gradients[0] {
        println!("du    [T, E]        {:.4?}", du.to_vec::<f32>()?);
    }
    Ok(())
}
