//! Single kernels in bf16: the scan, the convolution and the norm, forward and backward, over inputs that are too large
//! for the second-level cache or rotate so that they do not stay there.

use anyhow::Result;
use elapid_ops::causal_conv1d::cuda as conv;
use elapid_ops::gpu::{DeviceSequences, Rows};
use elapid_ops::norm::cuda as norm;
use elapid_ops::selective_scan::cuda::{self as scan, Cut, Plan};
use elapid_tensor::cuda::{DeviceBuffer, Gpu};
use elapid_tensor::{Sequences, bf16};

use super::Bench;
use super::sampling::{Task, Work};
use super::values::{self, typed};

/// N.
pub const STATES: usize = 16;
/// W.
const TAPS: usize = 4;
/// Bytes of an element.
const BF16: f64 = 2.0;
/// Bytes of inputs that no second-level cache holds.
const LARGE: usize = 256 << 20;

/// Sets of inputs to rotate over, if each has so many elements.
fn sets(elements: usize) -> usize {
    if elements * size_of::<bf16>() >= LARGE { 1 } else { 3 }
}

/// Measures all of them.
pub fn run(bench: &mut Bench) -> Result<()> {
    if bench.quick {
        scans(bench, &Sequences::uniform(2, 40), 32)?;
        convolutions(bench, 2, 16, 64)?;
        return norms(bench, 32, 64);
    }
    for channels in [1536, 5120] {
        scans(bench, &Sequences::uniform(8, 2048), channels)?;
    }
    for length in [2048, 8192, 131_072] {
        scans(bench, &Sequences::uniform(1, length), 1024)?;
    }
    scans(bench, &Sequences::uniform(1, 1 << 20), 64)?;
    for channels in [1536, 5120] {
        convolutions(bench, 8, 2048, channels)?;
    }
    for width in [768, 2560] {
        norms(bench, 16_384, width)?;
    }
    Ok(())
}

/// What scans of some channels read: T tokens end to end.
pub struct ScanInputs {
    channels: usize,
    /// u, delta, z, dy, `[T, E]`.
    rows: [DeviceBuffer<bf16>; 4],
    /// B and C, `[T, N]`.
    maps: [DeviceBuffer<bf16>; 2],
    a: DeviceBuffer<f32>,
    d: DeviceBuffer<f32>,
    bias: DeviceBuffer<f32>,
}

impl ScanInputs {
    pub fn new(gpu: &Gpu, seed: u64, tokens: usize, channels: usize) -> Result<Self> {
        let row = |k| typed(gpu, 10 * seed + k, tokens * channels);
        let map = |k| typed(gpu, 10 * seed + k, tokens * STATES);
        Ok(Self {
            channels,
            rows: [row(1)?, row(2)?, row(3)?, row(4)?],
            maps: [map(5)?, map(6)?],
            a: gpu.upload(&values::decay_rates(channels, STATES))?,
            d: gpu.upload(&values::wide(1, channels, -1.0, 1.0))?,
            bias: gpu.upload(&values::wide(2, channels, -5.0, -3.0))?,
        })
    }

    /// The tokens from `first` on, as many as the plan has.
    pub fn from<'a>(&'a self, first: usize, plan: &'a Plan) -> scan::Inputs<'a, bf16> {
        let e = self.channels;
        let row = |k: usize| Rows::part(&self.rows[k], first * e, e);
        let map = |k: usize| Rows::part(&self.maps[k], first * STATES, STATES);
        scan::Inputs {
            u: row(0),
            delta: row(1),
            a: self.a.slice(),
            b: map(0),
            c: map(1),
            d: Some(self.d.slice()),
            z: Some(row(2)),
            delta_bias: Some(self.bias.slice()),
            delta_softplus: true,
            state: None,
            plan,
        }
    }

    /// The gradient of what comes out of them.
    pub fn gradient_from(&self, first: usize) -> Rows<'_, bf16> {
        Rows::part(&self.rows[3], first * self.channels, self.channels)
    }
}

fn scans(bench: &mut Bench, sequences: &Sequences, e: usize) -> Result<()> {
    let gpu = bench.gpu.clone();
    let tokens = sequences.tokens();
    let plan = Plan::new(&gpu, sequences, (e, 1, STATES), Cut::Fill)?;
    let sets = sets(5 * tokens * e);
    let inputs = (0..sets as u64).map(|set| ScanInputs::new(&gpu, set, tokens, e));
    let inputs = inputs.collect::<Result<Vec<_>>>()?;
    let shape =
        format!("{} x {} tokens, E {e}, N {STATES}", sequences.len(), tokens / sequences.len());
    let updates = (tokens * e * STATES) as f64;
    let (wide, narrow) = (BF16 * (tokens * e) as f64, BF16 * (tokens * STATES) as f64);
    let forward = Task {
        name: "selective_scan forward",
        shape: shape.clone(),
        tokens: Some(tokens),
        work: Work {
            bytes: 4.0 * wide + 2.0 * narrow,
            forward_updates: updates,
            ..Work::default()
        },
        counted: "T E N updates; reads u, delta, z, B, C, writes y",
    };
    bench.measure(forward, |call| {
        Ok(scan::forward(&gpu, &inputs[call % sets].from(0, &plan), false).map(drop)?)
    })?;
    let saved = inputs.iter().map(|set| Ok(scan::forward(&gpu, &set.from(0, &plan), true)?.2));
    let saved = saved.collect::<Result<Vec<_>>>()?;
    let backward = Task {
        name: "selective_scan backward",
        shape,
        tokens: Some(tokens),
        work: Work {
            bytes: 7.0 * wide + 4.0 * narrow,
            backward_updates: updates,
            ..Work::default()
        },
        counted: "T E N updates; reads u, delta, z, B, C, dy, writes the gradients of the first five",
    };
    bench.measure(backward, |call| {
        let (set, Some(chunks)) = (&inputs[call % sets], &saved[call % sets]) else {
            return Ok(());
        };
        let dy = set.gradient_from(0);
        Ok(scan::backward(&gpu, &set.from(0, &plan), chunks, dy, None, None, false).map(drop)?)
    })?;
    drop((inputs, saved));
    Ok(gpu.trim()?)
}

fn convolutions(bench: &mut Bench, count: usize, length: usize, e: usize) -> Result<()> {
    let gpu = bench.gpu.clone();
    let tokens = count * length;
    let sequences = DeviceSequences::upload(&gpu, &Sequences::uniform(count, length))?;
    let weight = gpu.upload(&values::wide(1, e * TAPS, -0.5, 0.5))?;
    let bias = gpu.upload(&values::wide(2, e, -0.5, 0.5))?;
    let sets = sets(tokens * e);
    let rows = |k: u64| (0..sets as u64).map(move |set| 10 * set + k);
    let x = rows(1).map(|seed| typed(&gpu, seed, tokens * e)).collect::<Result<Vec<_>>>()?;
    let dy = rows(2).map(|seed| typed(&gpu, seed, tokens * e)).collect::<Result<Vec<_>>>()?;
    let inputs = |set: usize| conv::Inputs {
        x: Rows::new(&x[set], e),
        weight: weight.slice(),
        bias: Some(bias.slice()),
        state: None,
        sequences: &sequences,
        channels: e,
        width: TAPS,
        silu: true,
    };
    let wide = BF16 * (tokens * e) as f64;
    let task = |name, passes: f64, counted| Task {
        name,
        shape: format!("{count} x {length} tokens, E {e}, W {TAPS}, SiLU"),
        tokens: Some(tokens),
        work: Work::bytes(passes * wide),
        counted,
    };
    bench.measure(task("causal_conv1d forward", 2.0, "reads x, writes y"), |call| {
        Ok(conv::forward(&gpu, &inputs(call % sets)).map(drop)?)
    })?;
    bench.measure(task("causal_conv1d backward", 3.0, "reads x and dy, writes dx"), |call| {
        let dy = Rows::new(&dy[call % sets], e);
        Ok(conv::backward(&gpu, &inputs(call % sets), dy, None, None).map(drop)?)
    })?;
    drop((x, dy));
    Ok(gpu.trim()?)
}

fn norms(bench: &mut Bench, tokens: usize, width: usize) -> Result<()> {
    let gpu = bench.gpu.clone();
    let weight = gpu.upload(&values::wide(1, width, 0.5, 1.5))?;
    let norm =
        norm::Norm { width, center: false, eps: 1e-5, weight: Some(weight.slice()), bias: None };
    let sets = sets(tokens * width);
    let x = (0..sets as u64).map(|set| typed(&gpu, set, tokens * width));
    let x = x.collect::<Result<Vec<_>>>()?;
    let residual = (0..sets as u64).map(|set| values::wide(set, tokens * width, -1.0, 1.0));
    let residual = residual.map(|values| Ok(gpu.upload(&values)?)).collect::<Result<Vec<_>>>()?;
    let x = |call: usize| Rows::new(&x[call % sets], width);
    let residual = |call: usize| Rows::new(&residual[call % sets], width);
    let elements = (tokens * width) as f64;
    let task = |name, bytes: f64, counted| Task {
        name,
        shape: format!("{tokens} tokens, D {width}, with residual"),
        tokens: Some(tokens),
        work: Work::bytes(bytes * elements),
        counted,
    };
    let counted = "reads x (bf16) and residual (f32), writes y (bf16) and their sum (f32)";
    bench.measure(task("rms_norm forward", 12.0, counted), |call| {
        let (x, residual) = (x(call), Some(residual(call)));
        Ok(norm::forward::<bf16, bf16>(&gpu, &norm, tokens, x, residual).map(drop)?)
    })?;
    let counted =
        "reads the sum and its gradient (f32) and dy (bf16), writes the gradient (f32, bf16)";
    bench.measure(task("rms_norm backward", 16.0, counted), |call| {
        let (r, dy) = (residual(call), x(call));
        let dsum = Some(residual(call + 1));
        Ok(norm::backward(&gpu, &norm, tokens, r, dy, dsum).map(drop)?)
    })?;
    Ok(gpu.trim()?)
}
