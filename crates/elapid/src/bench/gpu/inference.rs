//! Reading a prompt and generating token by token, one sequence, as `elapid generate` does, by the host's clock.

use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::{Context as _, Result};
use elapid_infer::{ModelRunner, Options, Request, Sampling, generate};
use elapid_models::{Context, LanguageModel, MambaConfig, State};
use elapid_tensor::autograd::no_grad;
use elapid_tensor::{Sequences, Tensor};
use serde::Serialize;

use super::limits::Limits;
use super::sampling::{Figure, Task, Times, Work};
use super::{Bench, values};

/// What the figures do not tell.
#[derive(Debug, Serialize)]
pub struct Inference {
    /// Name of the model's shape.
    pub model: &'static str,
    /// Parameters.
    pub parameters: usize,
    /// Bytes of weights.
    pub weight_bytes: usize,
    /// Bytes of the sequence's state, which a decode step reads and writes; the figure does not count them.
    pub state_bytes: usize,
}

/// Measures one of them or both.
pub fn run(bench: &mut Bench, decode: bool, prefill: bool) -> Result<Inference> {
    let (name, config, prompt, new) = if bench.quick {
        ("bytes D 32, 1 layer", MambaConfig::bytes(32, 1), 32, 4)
    } else {
        ("mamba-130m", MambaConfig::preset("mamba-130m")?, 2048, 256)
    };
    let model = values::model(&config, bench.device(), bench.dtype)?;
    let ids = values::tokens(prompt, config.vocab_size);
    let ids = Tensor::from_slice(&ids, [prompt])?;
    let (_, state) = read(&model, &ids)?;
    let parameters = config.parameter_count();
    let weight_bytes = size_of::<f32>() * parameters;
    if prefill {
        let embedding = config.padded_vocab_size() * config.d_model;
        let flops = 2.0 * ((parameters - embedding) as f64 * prompt as f64 + embedding as f64);
        let updates = (config.d_inner() * config.d_state * config.n_layer * prompt) as f64;
        let work = Work {
            bytes: weight_bytes as f64,
            forward_updates: updates,
            ..Work::flops(Limits::of_products(bench.dtype), flops)
        };
        let task = Task {
            name: "prefill",
            shape: format!("{name}, {prompt} tokens, {}", bench.dtype),
            tokens: Some(prompt),
            work,
            counted: "every weight is read once; 2 FLOP a token and parameter outside the embedding, the head for \
                      the last token; E N updates a token and layer",
        };
        time(bench, task, prompt, || {
            let begin = Instant::now();
            read(&model, &ids)?;
            Ok(begin.elapsed().as_secs_f64())
        })?;
    }
    if decode {
        let task = Task {
            name: "decode step",
            shape: format!(
                "{name}, batch 1, {new} steps a run, {}, after {prompt} tokens",
                bench.dtype
            ),
            tokens: Some(1),
            work: Work::bytes(weight_bytes as f64),
            counted: "every weight is read once a token (the embedding as the head)",
        };
        let options = Options {
            sampling: Sampling { temperature: 0.0, ..Sampling::default() },
            // The first comes out of the prefill.
            max_tokens: new + 1,
            ..Options::default()
        };
        let request = Request { prompt: vec![1], state: Some(state.clone()), ..Request::default() };
        let requests = std::slice::from_ref(&request);
        let mut runner = ModelRunner::new(&model);
        time(bench, task, prompt, || {
            let made =
                generate(&mut runner, requests, &options, &mut |_| ControlFlow::Continue(()))?;
            Ok(made.timing.decode.as_secs_f64() / made.timing.decode_tokens as f64)
        })?;
    }
    let tensors = state.layers.iter().flat_map(|layer| layer.iter());
    let state_bytes = tensors.map(|(_, tensor)| tensor.elements() * size_of::<f32>()).sum();
    Ok(Inference { model: name, parameters, weight_bytes, state_bytes })
}

/// Takes the seconds that `run` gives, after runs that are thrown away, and the most memory of the card meanwhile.
fn time(
    bench: &mut Bench,
    task: Task,
    prompt: usize,
    mut run: impl FnMut() -> Result<f64>,
) -> Result<()> {
    bench.gpu.reset_peak();
    for _ in 0..2 {
        run()?;
    }
    let samples: Vec<f64> = (0..bench.repeats).map(|_| run()).collect::<Result<_>>()?;
    let times = Times { samples, runs_per_sample: 1 };
    let peak_bytes = Some(bench.gpu.usage().peak);
    let figure = Figure::new(task, times, &bench.limits);
    bench.add(Figure { prompt_tokens: Some(prompt), peak_bytes, ..figure });
    Ok(())
}

/// Logits of the last of `ids`, on the host, and the state after it.
fn read(model: &LanguageModel, ids: &Tensor) -> Result<(Vec<f32>, State)> {
    let length = ids.dim(0);
    no_grad(|| {
        let batch = Sequences::uniform(1, length);
        let (hidden, state) = model.hidden(ids, &batch, None, &mut Context::new())?;
        let last = hidden.narrow(0, length.checked_sub(1).context("no token")?, 1)?;
        Ok((model.logits(&last)?.to_vec()?, state))
    })
}
