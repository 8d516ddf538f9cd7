//! Trained weights from elsewhere: two one-layer ECG classifiers (MambaBEAT) through our operations. They
//! have 12 convolution taps, 12 states, no residual, and B, C, dt in this order in the rows of x_proj.

use std::path::PathBuf;

use elapid_formats::TensorFile;
use elapid_ops::causal_conv1d::{Activation, causal_conv1d};
use elapid_ops::elementwise::neg_exp;
use elapid_ops::matmul::linear;
use elapid_ops::norm::rms_norm;
use elapid_ops::selective_scan::{self, selective_scan};
use elapid_tensor::{Sequences, Tensor};
use serde_json::Value;

const T: usize = 64;
const D: usize = 12;
const E: usize = 24;
const N: usize = 12;
const W: usize = 12;

/// The folder of the weights, if the fixtures are there.
fn weights() -> Option<PathBuf> {
    let Some(fixtures) = std::env::var_os("ELAPID_FIXTURES") else {
        eprintln!("SKIPPED: ELAPID_FIXTURES is not set, MambaBEAT's weights were not tried");
        return None;
    };
    Some(PathBuf::from(fixtures).join("data/weights/mambabeat"))
}

fn reshaped(file: &TensorFile, name: &str, shape: &[usize]) -> Tensor {
    let values = file.tensor(name).unwrap().to_vec::<f32>().unwrap();
    Tensor::from_slice(&values, shape).unwrap()
}

/// The block's outputs [T, D] and the class logits.
fn run(file: &TensorFile) -> (Vec<f64>, Vec<f64>) {
    let layer = |name: &str, shape: &[usize]| reshaped(file, &format!("layers.0.{name}"), shape);
    let input: Vec<f32> = (0..T)
        .flat_map(|t| {
            (0..D).map(move |c| ((0.1 * ((t + 1) * (c + 1)) as f64).sin() + 0.05 * c as f64) as f32)
        })
        .collect();
    let input = Tensor::from_slice(&input, [T, D]).unwrap();
    let sequences = Sequences::uniform(1, T);
    let xz = linear(&input, &layer("in_proj.weight", &[2 * E, D]), None).unwrap();
    let halves = xz.split(1, &[E, E]).unwrap();
    let (u, _) = causal_conv1d(
        &halves[0],
        &layer("conv1d.weight", &[E, W]),
        Some(&layer("conv1d.bias", &[E])),
        Activation::Silu,
        &sequences,
        None,
    )
    .unwrap();
    let selected = linear(&u, &layer("selection.weight", &[2 * N + 1, E]), None).unwrap();
    let parts = selected.split(1, &[N, N, 1]).unwrap();
    let delta = linear(&parts[2], &layer("dt_proj.weight", &[E, 1]), None).unwrap();
    let arguments = selective_scan::Inputs {
        u: &u,
        delta: &delta,
        a: &neg_exp(&layer("A_log", &[E, N])).unwrap(),
        b: &parts[0].unsqueeze(1).unwrap(),
        c: &parts[1].unsqueeze(1).unwrap(),
        d: Some(&layer("D", &[E])),
        z: Some(&halves[1]),
        delta_bias: Some(&layer("dt_proj.bias", &[E])),
        delta_softplus: true,
        state: None,
    };
    let (y, _) = selective_scan(&arguments, &sequences).unwrap();
    let out = linear(&y, &layer("out_proj.weight", &[D, E]), None).unwrap();
    let last = out.narrow(0, T - 1, 1).unwrap();
    let (last, _) =
        rms_norm(&last, Some(&reshaped(file, "norm.weight", &[D])), None, 1e-5).unwrap();
    let classes = linear(
        &last,
        &reshaped(file, "linear.weight", &[5, D]),
        Some(&reshaped(file, "linear.bias", &[5])),
    )
    .unwrap();
    (out.to_f64_vec().unwrap(), classes.to_f64_vec().unwrap())
}

fn assert_close(got: &[f64], goal: &Value, tolerance: f64, what: &str) {
    let goal: Vec<f64> = goal.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    assert_eq!(got.len(), goal.len());
    let largest = goal.iter().fold(0.0f64, |a, b| a.max(b.abs()));
    for (got, goal) in got.iter().zip(&goal) {
        assert!((got - goal).abs() <= tolerance * largest, "{what}: {got} for {goal}");
    }
}

#[test]
fn trained_classifiers_give_their_own_outputs() {
    let Some(folder) = weights() else { return };
    let text = std::fs::read_to_string(folder.join("reference.json")).unwrap();
    let reference: Value = serde_json::from_str(&text).unwrap();
    for name in ["binary_MambaBEAT", "model_MambaBEAT"] {
        let file = TensorFile::open(&folder.join(format!("{name}.safetensors"))).unwrap();
        let (out, classes) = run(&file);
        let goal = &reference["models"][name];
        assert_close(&out[..D], &goal["block_out_first"], 2e-5, name);
        // The last output is the end of 64 steps with values up to 15,000 on the way.
        assert_close(&out[(T - 1) * D..], &goal["block_out_last"], 2e-4, name);
        assert_close(&classes, &goal["logits"], 2e-4, name);
    }
}
