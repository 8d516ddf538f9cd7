//! Larger pieces of a training step: the embedding, the loss with the head, the optimizer, and a whole Mamba mixer.

use std::sync::Arc;

use anyhow::Result;
use elapid_models::{Context, MambaConfig};
use elapid_ops::adamw::{AdamW as Update, cuda as adamw};
use elapid_ops::embedding::cuda as embedding;
use elapid_ops::gpu::Rows;
use elapid_ops::linear_cross_entropy::{Reduction, Targets, linear_cross_entropy_prepared};
use elapid_tensor::autograd::{backward, no_grad};
use elapid_tensor::{DType, Sequences, Tensor};
use elapid_train::config::OptimizerConfig;
use elapid_train::optimizer::AdamW;

use super::Bench;
use super::limits::{Limit, Limits};
use super::sampling::{Task, Work};
use super::values;

const F32: f64 = 4.0;

/// Measures all of them.
pub fn run(bench: &mut Bench) -> Result<()> {
    let (tokens, width, classes) = if bench.quick { (32, 32, 61) } else { (16_384, 768, 50_277) };
    embeddings(bench, tokens, width, classes)?;
    loss(bench, tokens, width, classes)?;
    optimizer(bench)?;
    let (sequences, length, width) = if bench.quick { (2, 16, 32) } else { (8, 2048, 2560) };
    mixer(bench, sequences, length, width)?;
    Ok(bench.gpu.trim()?)
}

/// V of so many real classes.
fn padded(classes: usize) -> usize {
    classes.next_multiple_of(8)
}

fn embeddings(bench: &mut Bench, tokens: usize, width: usize, classes: usize) -> Result<()> {
    let gpu = bench.gpu.clone();
    let vocab = padded(classes);
    let ids = embedding::TokenIds::upload(&gpu, &values::tokens(tokens, classes), vocab)?;
    let table = gpu.upload(&values::wide(1, vocab * width, -0.1, 0.1))?;
    let dy = gpu.upload(&values::wide(2, tokens * width, -0.1, 0.1))?;
    let (rows, table_bytes) = (F32 * (tokens * width) as f64, F32 * (vocab * width) as f64);
    let task = |name, bytes, counted| Task {
        name,
        shape: format!("{tokens} tokens, D {width}, V {vocab}"),
        tokens: Some(tokens),
        work: Work::bytes(bytes),
        counted,
    };
    let counted = "reads a row and writes it, f32, a token";
    bench.measure(task("embedding forward", 2.0 * rows, counted), |_| {
        Ok(embedding::forward::<f32>(&gpu, table.slice(), &ids, width).map(drop)?)
    })?;
    let counted = "reads dy, writes the gradient of the whole table, f32";
    bench.measure(task("embedding backward", rows + table_bytes, counted), |_| {
        Ok(embedding::backward(&gpu, &ids, Rows::new(&dy, width), width).map(drop)?)
    })?;
    drop((table, dy));
    Ok(gpu.trim()?)
}

/// The loss makes its gradients along with its value, so forward and backward together are the second figure.
fn loss(bench: &mut Bench, tokens: usize, width: usize, classes: usize) -> Result<()> {
    let gpu = bench.gpu.clone();
    let vocab = padded(classes);
    let x = values::tensor(&gpu, DType::BF16, [tokens, width], -1.0, 1.0)?.requires_grad();
    let weight = values::tensor(&gpu, DType::F32, [vocab, width], -0.1, 0.1)?.requires_grad();
    let targets: Vec<i64> = values::tokens(tokens, classes).into_iter().map(i64::from).collect();
    let targets = Arc::new(Targets::upload(&gpu, &targets, classes, (Reduction::Mean, 1.0))?);
    let loss = || linear_cross_entropy_prepared(&x, &weight, &targets);
    let flops = 2.0 * (tokens * width * vocab) as f64;
    let task = |name, flops: f64, counted| Task {
        name,
        shape: format!("{tokens} tokens, D {width}, V {vocab}"),
        tokens: Some(tokens),
        work: Work::flops(Limit::MatrixBf16, flops),
        counted,
    };
    bench.measure(task("linear_cross_entropy forward", flops, "2 T D V FLOP"), |_| {
        Ok(no_grad(loss).map(drop)?)
    })?;
    let name = "linear_cross_entropy forward and backward";
    bench.measure(task(name, 3.0 * flops, "6 T D V FLOP"), |_| {
        let root = (&loss()?, Some(Tensor::scalar(1f32)));
        Ok(backward(&[root], &[&x, &weight]).map(drop)?)
    })?;
    drop((x, weight));
    Ok(gpu.trim()?)
}

fn optimizer(bench: &mut Bench) -> Result<()> {
    let gpu = bench.gpu.clone();
    let (name, config) = if bench.quick {
        ("bytes D 16, 1 layer", MambaConfig::bytes(16, 1))
    } else {
        ("mamba-130m", MambaConfig::preset("mamba-130m")?)
    };
    let mut model = values::model(&config, bench.device(), DType::F32)?;
    let options = OptimizerConfig::default();
    let mut optimizer = AdamW::new(&options, &mut model)?;
    let (mut gradients, mut lengths) = (Vec::new(), Vec::new());
    model.visit(&mut |parameter| {
        lengths.push(parameter.tensor.elements());
        gradients.push(Some(parameter.tensor.detach()));
        Ok(())
    })?;
    let mut step = adamw::Step::new(&gpu, &lengths)?;
    optimizer.bind(&mut model, &gradients, &mut step)?;
    step.configure(&adamw::Numbers {
        update: Update {
            learning_rate: 1e-4,
            beta1: options.betas[0],
            beta2: options.betas[1],
            epsilon: options.eps,
            weight_decay: 0.0,
        },
        step: 1,
        clip_norm: 1.0,
        limit: 0.0,
    })?;
    let parameters = config.parameter_count();
    let task = Task {
        name: "adamw step",
        shape: format!("{parameters} parameters in {} tensors, {name}", lengths.len()),
        tokens: None,
        work: Work::bytes(8.0 * F32 * parameters as f64),
        counted: "reads the gradient for its norm; reads p, g, m, v, writes p, m, v, f32",
    };
    bench.measure(task, |_| {
        // SAFETY: the model, the optimizer and the gradients hold what was bound, and nobody else has it.
        unsafe { step.launch()? };
        Ok(())
    })?;
    drop((model, optimizer, gradients, step));
    Ok(gpu.trim()?)
}

fn mixer(bench: &mut Bench, sequences: usize, length: usize, width: usize) -> Result<()> {
    let gpu = bench.gpu.clone();
    let tokens = sequences * length;
    let config = MambaConfig::bytes(width, 1);
    let mut model = values::model(&config, bench.device(), bench.dtype)?;
    let x = values::tensor(&gpu, bench.dtype, [tokens, width], -1.0, 1.0)?.requires_grad();
    let dy = values::tensor(&gpu, bench.dtype, [tokens, width], -0.01, 0.01)?;
    let mut leaves = vec![x.clone()];
    model.visit(&mut |parameter| {
        if parameter.name.contains(".mixer.") {
            leaves.push(parameter.tensor.clone());
        }
        Ok(())
    })?;
    let leaves: Vec<&Tensor> = leaves.iter().collect();
    let batch = Sequences::uniform(sequences, length);
    let Some(block) = model.layers().first() else { return Ok(()) };
    let forward = || block.mixer().forward(&x, &batch, None, &mut Context::new());

    let (e, n, r) = (config.d_inner(), config.d_state, config.dt_rank());
    let weights = 3 * e * width + (2 * r + 2 * n) * e;
    let flops = 2.0 * weights as f64 * tokens as f64;
    let updates = (tokens * e * n) as f64;
    let limit = Limits::of_products(bench.dtype);
    let task = |name, work, counted| Task {
        name,
        shape: format!("{sequences} x {length} tokens, D {width}, {}", bench.dtype),
        tokens: Some(tokens),
        work,
        counted,
    };
    let first = task(
        "mamba mixer forward",
        Work { forward_updates: updates, ..Work::flops(limit, flops) },
        "2 FLOP a token and weight of the four projections; T E N updates",
    );
    let both = task(
        "mamba mixer forward and backward",
        Work {
            forward_updates: updates,
            backward_updates: updates,
            ..Work::flops(limit, 3.0 * flops)
        },
        "6 FLOP a token and weight of the four projections; T E N updates forward and backward",
    );
    bench.measure(first, |_| Ok(no_grad(forward).map(drop)?))?;
    bench.measure(both, |_| {
        let (y, _) = forward()?;
        Ok(backward(&[(&y, Some(dy.clone()))], &leaves).map(drop)?)
    })
}
