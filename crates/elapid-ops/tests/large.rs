//! More elements than 32 bits can count, on a card: every sequence of the batch is the same, so the results of the last
//! must be those of the first, bit for bit.

use elapid_ops::causal_conv1d::{Activation, causal_conv1d};
use elapid_ops::elementwise::{broadcast_to, silu};
use elapid_ops::matmul::linear;
use elapid_ops::norm::rms_norm;
use elapid_ops::selective_scan::{Inputs, selective_scan};
use elapid_tensor::autograd::backward;
use elapid_tensor::cuda::Gpu;
use elapid_tensor::{DType, Device, Sequences, Tensor};

const LENGTH: usize = 4096;
const COUNT: usize = 17;
const WIDTH: usize = 32_768;

/// [COUNT LENGTH, width] of equal sequences.
fn repeated(gpu: &Gpu, width: usize) -> Tensor {
    let values: Vec<f32> =
        (0..LENGTH * width).map(|i| (i * 7919 % 251) as f32 / 125.0 - 1.0).collect();
    let one = Tensor::from_slice(&values, [1, LENGTH, width]).unwrap();
    let one = one.to(Device::Cuda(gpu.id())).unwrap().cast(DType::BF16).unwrap();
    broadcast_to(&one, [COUNT, LENGTH, width]).unwrap().reshape([COUNT * LENGTH, width]).unwrap()
}

fn same_in_all(name: &str, x: &Tensor) {
    let rows = x.dim(0) / COUNT;
    // The last row of a sequence has seen all others.
    let row =
        |sequence: usize| x.narrow(0, sequence * rows + rows - 1, 1).unwrap().to_f64_vec().unwrap();
    let first = row(0);
    assert!(first.iter().all(|v| v.is_finite()) && first.iter().any(|v| *v != 0.0), "{name}");
    assert!(row(COUNT - 1) == first, "{name}: the last sequence differs from the first");
}

#[test]
fn cuda_offsets_have_64_bits() {
    let gpu = match Gpu::open(0) {
        Ok(gpu) if gpu.card().is_some_and(|card| card.total_memory() > 64 << 30) => gpu,
        Ok(_) => return eprintln!("SKIPPED: 2^31 elements: the card has less than 64 GiB"),
        Err(error) => return eprintln!("SKIPPED: 2^31 elements: {error}"),
    };
    const { assert!(COUNT * LENGTH * WIDTH > 1 << 31) };
    let device = Device::Cuda(gpu.id());
    let constant = |value: f32, shape: &[usize]| Tensor::filled(value, shape).to(device).unwrap();
    let sequences = Sequences::uniform(COUNT, LENGTH);
    let x = repeated(&gpu, WIDTH);
    same_in_all("silu", &silu(&x).unwrap());
    let (y, _) = rms_norm(&x, Some(&constant(1.0, &[WIDTH])), None, 1e-5).unwrap();
    same_in_all("norm", &y);
    drop(y);
    let narrow = linear(&x, &constant(0.001, &[16, WIDTH]), None).unwrap();
    same_in_all("linear", &narrow);
    let weight = constant(0.2, &[WIDTH, 4]).requires_grad();
    let (u, _) = causal_conv1d(&x, &weight, None, Activation::Silu, &sequences, None).unwrap();
    same_in_all("conv", &u);
    drop(u);

    let maps = narrow.unsqueeze(1).unwrap();
    let (x, a) = (x.requires_grad(), constant(-0.5, &[WIDTH, 16]));
    let inputs = Inputs {
        u: &x,
        delta: &x,
        a: &a,
        b: &maps,
        c: &maps,
        d: None,
        z: None,
        delta_bias: None,
        delta_softplus: true,
        state: None,
    };
    let (y, state) = selective_scan(&inputs, &sequences).unwrap();
    same_in_all("scan", &y);
    same_in_all("state", &state);
    drop(state);
    let dy = y.detach();
    let dx = backward(&[(&y, Some(dy))], &[&x]).unwrap().swap_remove(0).unwrap();
    same_in_all("scan backward", &dx);
}
