//! The golden values of `fixtures/golden/ops/selective_scan.safetensors`: inputs and results of small scans,
//! channel-first, computed in f64 by independent code.

use elapid_tensor::{DType, Sequence, Sequences};
use safetensors::{Dtype, SafeTensors};

use super::Case;
use super::case::{Results, near};
use super::cuda_general;

/// A tensor's shape and values.
struct Golden {
    shape: Vec<usize>,
    values: Vec<f64>,
}

fn read(file: &SafeTensors<'_>, case: &str, name: &str) -> Option<(Golden, Dtype)> {
    let tensor = file.tensor(&format!("{case}.{name}")).ok()?;
    let bytes = tensor.data();
    let values = match tensor.dtype() {
        Dtype::F32 => bytes
            .chunks_exact(4)
            .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
            .collect(),
        Dtype::F64 => {
            bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
        }
        Dtype::I32 => bytes
            .chunks_exact(4)
            .map(|b| f64::from(i32::from_le_bytes(b.try_into().unwrap())))
            .collect(),
        other => panic!("{case}.{name} is {other:?}"),
    };
    Some((Golden { shape: tensor.shape().to_vec(), values }, tensor.dtype()))
}

/// `[B, .., L, tail]` to `[B L, .., tail]`, where `tail` is the complex axis if there is one.
fn channel_last(golden: &Golden, complex: bool) -> Vec<f64> {
    let parts = if complex { 2 } else { 1 };
    let time_axis = golden.shape.len() - 1 - usize::from(complex);
    let (batch, len) = (golden.shape[0], golden.shape[time_axis]);
    let inner: usize = golden.shape[1..time_axis].iter().product();
    let mut out = Vec::with_capacity(golden.values.len());
    for b in 0..batch {
        for t in 0..len {
            for i in 0..inner {
                for part in 0..parts {
                    out.push(golden.values[((b * inner + i) * len + t) * parts + part]);
                }
            }
        }
    }
    out
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&v| v as f32).collect()
}

/// Runs `f` on every case, with its name.
fn each(f: impl Fn(&SafeTensors<'_>, &str, &Case<f32>)) {
    let bytes = include_bytes!(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/golden/ops/selective_scan.safetensors"
    ));
    let (_, metadata) = SafeTensors::read_metadata(bytes).unwrap();
    let file = SafeTensors::deserialize(bytes).unwrap();
    let text = &metadata.metadata().as_ref().unwrap()["cases"];
    let cases: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text).unwrap();
    assert!(cases.len() >= 19, "{} cases", cases.len());
    for (name, parameters) in &cases {
        f(&file, name, &case(&file, name, parameters));
    }
}

#[test]
fn all_golden_cases() {
    each(|file, name, case| {
        compare(file, name, case, "the reference", &case.widen().run(), [1e-11, 1e-6]);
        compare(file, name, case, "the CPU", &case.run().widen(), [2e-5; 2]);
    });
}

#[test]
fn all_golden_cases_by_cuda() {
    for device in cuda_general::cards() {
        each(|file, name, case| {
            // Longer ones take an emulated GPU too long.
            if case.sequences.tokens() > 130 {
                return;
            }
            let got = cuda_general::run(case, device, DType::F32);
            compare(file, name, case, "the GPU", &got, [2e-5; 2]);
        });
    }
}

fn case(file: &SafeTensors<'_>, name: &str, parameters: &serde_json::Value) -> Case<f32> {
    let flag = |key: &str| parameters[key].as_bool().unwrap_or(false);
    let size = |key: &str| parameters[key].as_u64().map(|v| v as usize);
    let (complex, constant) = (flag("complex"), flag("const_bc"));
    let (batch, len) = (size("B").unwrap(), size("L").unwrap());
    let get = |tensor: &str| read(file, name, tensor).map(|(golden, _)| golden);
    let tokens = |tensor: &str, complex: bool| {
        get(tensor).map(|golden| narrow(&channel_last(&golden, complex)))
    };
    let flat = |tensor: &str| get(tensor).map(|golden| narrow(&golden.values));

    let mut sequences = match parameters["rows"].as_array() {
        Some(rows) => {
            let lengths = rows.iter().flat_map(|row| row.as_array().unwrap());
            Sequences::fresh(&lengths.map(|l| l.as_u64().unwrap() as usize).collect::<Vec<_>>())
        }
        None => Sequences::uniform(batch, len),
    };
    let h0 = flat("h0");
    if h0.is_some() {
        let list = sequences.iter().map(|&s| Sequence { continued: true, ..s }).collect();
        sequences = Sequences::new(list, batch).unwrap();
    }
    let projection = |tensor: &str| {
        if constant { flat(tensor).unwrap() } else { tokens(tensor, complex).unwrap() }
    };
    let groups = (!constant).then_some(size("G").unwrap_or(1));
    Case {
        channels: size("D").unwrap(),
        states: size("N").unwrap(),
        complex,
        groups: [groups, groups],
        sequences,
        u: tokens("u", false).unwrap(),
        delta: tokens("delta", false).unwrap(),
        a: flat("A").unwrap(),
        b: projection("B"),
        c: projection("C"),
        d: flat("D"),
        z: tokens("z", false),
        bias: flat("delta_bias"),
        softplus: flag("softplus"),
        h0,
        dy: tokens("dout", false).unwrap(),
        dlast: flat("dlast"),
    }
}

/// Compares results, with one tolerance for what the file has in f64 and one for f32.
fn compare(
    file: &SafeTensors<'_>,
    name: &str,
    case: &Case<f32>,
    by: &str,
    results: &Results<f64>,
    tolerance: [f64; 2],
) {
    let keys =
        ["out", "last_state", "du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias", "dh0"];
    for ((_, got), key) in results.named().iter().zip(keys) {
        let Some((golden, dtype)) = read(file, name, key) else {
            assert!(got.is_empty(), "{name}.{key} is missing");
            continue;
        };
        let want = match key {
            "out" | "du" | "ddelta" | "dz" => channel_last(&golden, false),
            "dB" if case.groups[0].is_some() => channel_last(&golden, case.complex),
            "dC" if case.groups[1].is_some() => channel_last(&golden, case.complex),
            _ => golden.values,
        };
        let tolerance = tolerance[usize::from(dtype != Dtype::F64)];
        near(&format!("{name}.{key} of {by}"), got, &want, tolerance);
    }
}
