//! The operations of one layer of the training step's model, forward (recording nothing) and backward
//! (through autograd), with the views that the model gives them.

use anyhow::Result;
use elapid_ops::causal_conv1d::{Activation, causal_conv1d};
use elapid_ops::linear_cross_entropy::{Reduction, linear_cross_entropy};
use elapid_ops::matmul::linear;
use elapid_ops::norm::rms_norm;
use elapid_ops::selective_scan::{Inputs as Scan, selective_scan};
use elapid_tensor::autograd::{backward, no_grad};
use elapid_tensor::{Sequences, Tensor};

use super::Bench;
use super::inputs::Inputs;
use super::sampling::{Task, Work};

const F32: f64 = 4.0;

/// Sizes of a layer and its batch.
#[derive(Debug, Clone, Copy)]
struct Layer {
    sequences: usize,
    length: usize,
    /// D.
    width: usize,
    /// N.
    states: usize,
    /// V.
    vocabulary: usize,
}

impl Layer {
    fn of(quick: bool) -> Self {
        let (sequences, length, width) = if quick { (2, 64, 64) } else { (8, 512, 256) };
        Self { sequences, length, width, states: 16, vocabulary: 256 }
    }

    fn tokens(&self) -> usize {
        self.sequences * self.length
    }

    /// E.
    fn inner(&self) -> usize {
        2 * self.width
    }

    /// R.
    fn rank(&self) -> usize {
        self.width.div_ceil(16)
    }

    fn batch(&self) -> Sequences {
        Sequences::uniform(self.sequences, self.length)
    }
}

/// A function of leaves whose backward is timed.
type Function<'a> = &'a dyn Fn() -> Result<Vec<Tensor>>;

/// Measures all operations.
pub fn run(bench: &mut Bench) -> Result<()> {
    let layer = Layer::of(bench.quick);
    scan(bench, &layer)?;
    convolution(bench, &layer)?;
    norm(bench, &layer)?;
    products(bench, &layer)?;
    head(bench, &layer)
}

/// Forward or backward of an operation: name, least work, and how it is counted.
type Pass = (&'static str, Work, &'static str);

/// Measures `function`, forward and backward.
fn both(
    bench: &mut Bench,
    shape: &str,
    tokens: usize,
    passes: [Pass; 2],
    leaves: &[&Tensor],
    function: Function<'_>,
) -> Result<()> {
    let [forward, backward_pass] = passes.map(|(name, work, counted)| Task {
        name,
        shape: shape.into(),
        tokens,
        work,
        counted: counted.into(),
    });
    bench.measure(forward, || Ok(()), |()| no_grad(function))?;
    let gradients: Vec<Tensor> =
        function()?.iter().map(|out| Tensor::filled(0.01f32, out.shape())).collect();
    bench.measure(backward_pass, function, |outputs: Vec<Tensor>| {
        let roots: Vec<_> =
            outputs.iter().zip(&gradients).map(|(out, grad)| (out, Some(grad.clone()))).collect();
        Ok(backward(&roots, leaves)?)
    })
}

fn scan(bench: &mut Bench, layer: &Layer) -> Result<()> {
    let (t, e, n, r) = (layer.tokens(), layer.inner(), layer.states, layer.rank());
    let mut inputs = Inputs::new();
    let u = inputs.uniform([t, e], -1.0, 1.0)?.requires_grad();
    let delta = inputs.uniform([t, e], -1.0, 1.0)?.requires_grad();
    // The gate is half of what in_proj gave, B and C are parts of what x_proj gave.
    let z = inputs.uniform([t, 2 * e], -2.0, 2.0)?.narrow(1, e, e)?.requires_grad();
    let projected = inputs.uniform([t, r + 2 * n], -1.0, 1.0)?;
    let b = projected.narrow(1, r, n)?.unsqueeze(1)?.requires_grad();
    let c = projected.narrow(1, r + n, n)?.unsqueeze(1)?.requires_grad();
    let rates: Vec<f32> = (0..e * n).map(|i| -((i % n) as f32 + 1.0)).collect();
    let a = Tensor::from_slice(&rates, [e, n])?.requires_grad();
    let d = inputs.uniform([e], 0.0, 1.0)?.requires_grad();
    let bias = inputs.uniform([e], -5.0, -3.0)?.requires_grad();
    let batch = layer.batch();

    let (t64, e64, n64) = (t as f64, e as f64, n as f64);
    let updates = t64 * e64 * n64;
    let (wide, narrow) = (F32 * t64 * e64, F32 * t64 * n64);
    both(
        bench,
        &format!("{} x {} tokens, E {e}, N {n}", layer.sequences, layer.length),
        t,
        [
            (
                "selective_scan forward",
                Work { bytes: 4.0 * wide + 2.0 * narrow, updates, ..Work::default() },
                "T E N updates; reads u, delta, z, B, C, writes y",
            ),
            (
                "selective_scan backward",
                Work {
                    bytes: 7.0 * wide + 4.0 * narrow,
                    updates: 2.0 * updates,
                    ..Work::default()
                },
                "2 T E N updates; reads u, delta, z, B, C, dy, writes the gradients of the first five",
            ),
        ],
        &[&u, &delta, &z, &a, &b, &c, &d, &bias],
        &|| {
            let scan = Scan {
                u: &u,
                delta: &delta,
                a: &a,
                b: &b,
                c: &c,
                d: Some(&d),
                z: Some(&z),
                delta_bias: Some(&bias),
                delta_softplus: true,
                state: None,
            };
            Ok(vec![selective_scan(&scan, &batch)?.0])
        },
    )
}

fn convolution(bench: &mut Bench, layer: &Layer) -> Result<()> {
    const TAPS: usize = 4;
    let (t, e) = (layer.tokens(), layer.inner());
    let mut inputs = Inputs::new();
    let x = inputs.uniform([t, 2 * e], -1.0, 1.0)?.narrow(1, 0, e)?.requires_grad();
    let weight = inputs.uniform([e, TAPS], -0.5, 0.5)?.requires_grad();
    let bias = inputs.uniform([e], -0.5, 0.5)?.requires_grad();
    let batch = layer.batch();
    let wide = F32 * (t * e) as f64;
    both(
        bench,
        &format!("{} x {} tokens, E {e}, W {TAPS}, SiLU", layer.sequences, layer.length),
        t,
        [
            (
                "causal_conv1d forward",
                Work { bytes: 2.0 * wide, ..Work::default() },
                "reads x, writes y",
            ),
            (
                "causal_conv1d backward",
                Work { bytes: 3.0 * wide, ..Work::default() },
                "reads x and dy, writes dx",
            ),
        ],
        &[&x, &weight, &bias],
        &|| {
            let bias = Some(&bias);
            Ok(vec![causal_conv1d(&x, &weight, bias, Activation::Silu, &batch, None)?.0])
        },
    )
}

fn norm(bench: &mut Bench, layer: &Layer) -> Result<()> {
    let (t, d) = (layer.tokens(), layer.width);
    let mut inputs = Inputs::new();
    let x = inputs.uniform([t, d], -1.0, 1.0)?.requires_grad();
    let residual = inputs.uniform([t, d], -1.0, 1.0)?.requires_grad();
    let weight = inputs.uniform([d], 0.5, 1.5)?.requires_grad();
    let work = Work { bytes: 4.0 * F32 * (t * d) as f64, ..Work::default() };
    both(
        bench,
        &format!("{t} tokens, D {d}, with residual"),
        t,
        [
            ("rms_norm forward", work, "reads x and residual, writes y and their sum"),
            (
                "rms_norm backward",
                work,
                "reads the sum and the gradients of y and of the sum, writes one gradient",
            ),
        ],
        &[&x, &residual, &weight],
        &|| {
            let (y, sum) = rms_norm(&x, Some(&weight), Some(&residual), 1e-5)?;
            Ok(vec![y, sum])
        },
    )
}

fn products(bench: &mut Bench, layer: &Layer) -> Result<()> {
    let (d, e, n, r) = (layer.width, layer.inner(), layer.states, layer.rank());
    let all = [
        (["matmul in_proj forward", "matmul in_proj backward"], d, 2 * e),
        (["matmul x_proj forward", "matmul x_proj backward"], e, r + 2 * n),
        (["matmul dt_proj forward", "matmul dt_proj backward"], r, e),
        (["matmul out_proj forward", "matmul out_proj backward"], e, d),
    ];
    for (names, from, to) in all {
        let t = layer.tokens();
        let mut inputs = Inputs::new();
        let x = inputs.uniform([t, from], -1.0, 1.0)?.requires_grad();
        let weight = inputs.uniform([to, from], -0.1, 0.1)?.requires_grad();
        let (t64, from64, to64) = (t as f64, from as f64, to as f64);
        let flops = 2.0 * t64 * from64 * to64;
        let (input, output, weights) = (t64 * from64, t64 * to64, from64 * to64);
        both(
            bench,
            &format!("[{t}, {from}] x [{from}, {to}]"),
            t,
            [
                (
                    names[0],
                    Work { bytes: F32 * (input + output + weights), flops, updates: 0.0 },
                    "2 T K N FLOP; reads x and weight, writes y",
                ),
                (
                    names[1],
                    Work {
                        bytes: F32 * (2.0 * input + output + 2.0 * weights),
                        flops: 2.0 * flops,
                        updates: 0.0,
                    },
                    "4 T K N FLOP; reads x, weight and dy, writes dx and dweight",
                ),
            ],
            &[&x, &weight],
            &|| Ok(vec![linear(&x, &weight, None)?]),
        )?;
    }
    Ok(())
}

/// The loss makes its gradients along with its value, so forward and backward together are the second figure.
fn head(bench: &mut Bench, layer: &Layer) -> Result<()> {
    let (t, d, v) = (layer.tokens(), layer.width, layer.vocabulary);
    let mut inputs = Inputs::new();
    let x = inputs.uniform([t, d], -1.0, 1.0)?.requires_grad();
    let weight = inputs.uniform([v, d], -0.1, 0.1)?.requires_grad();
    let targets: Vec<i64> = inputs.tokens(t, v).into_iter().map(i64::from).collect();
    let targets = Tensor::from_slice(&targets, [t])?;
    let loss = || linear_cross_entropy(&x, &weight, &targets, v, Reduction::Mean);
    let flops = 2.0 * (t * d * v) as f64;
    let once = F32 * (t * d + v * d) as f64;
    let task = |name, work, counted: &str| Task {
        name,
        shape: format!("{t} tokens, D {d}, V {v}"),
        tokens: t,
        work,
        counted: counted.into(),
    };
    bench.measure(
        task(
            "linear_cross_entropy forward",
            Work { bytes: once, flops, updates: 0.0 },
            "2 T D V FLOP; reads x and weight",
        ),
        || Ok(()),
        |()| Ok(no_grad(loss)?),
    )?;
    bench.measure(
        task(
            "linear_cross_entropy forward and backward",
            Work { bytes: 2.0 * once, flops: 3.0 * flops, updates: 0.0 },
            "6 T D V FLOP; reads x and weight, writes dx and dweight",
        ),
        || Ok(()),
        |()| Ok(backward(&[(&loss()?, None)], &[&x, &weight])?),
    )
}
