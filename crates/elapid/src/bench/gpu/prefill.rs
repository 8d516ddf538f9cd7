//! Reading prompts of 1 to 131,072 tokens as generation does: in chunks, so that memory does not grow with the length, by
//! the host's clock, as a prompt is read when the host has its logits. Beside each time stands the most memory of the card
//! that was in use, the weights included.

use std::ops::ControlFlow;

use anyhow::Result;
use elapid_infer::{ModelRunner, Options, Request, Runner, generate};
use elapid_models::MambaConfig;
use elapid_tensor::DType;

use super::limits::Limits;
use super::sampling::{Figure, Task, Times, Work};
use super::{Bench, ModelShape, values};

/// Tokens of a prompt alone.
const LENGTHS: [usize; 11] = [1, 4, 16, 64, 256, 512, 1024, 2048, 8192, 32_768, 131_072];
/// Tokens of each prompt of several.
const SEVERAL: usize = 2048;

/// Measures each model with each number of prompts of each length; the usual lengths if none is given.
pub fn run(
    bench: &mut Bench,
    models: &[ModelShape],
    batches: &[usize],
    lengths: &[usize],
) -> Result<()> {
    let usual: ModelShape =
        if bench.quick { "tiny" } else { "130m" }.parse().map_err(anyhow::Error::msg)?;
    let usual = [usual];
    let models = if models.is_empty() { &usual } else { models };
    let batches = if batches.is_empty() { &[1] } else { batches };
    for shape in models {
        let (name, config) = shape.model();
        let mut model = values::model(config, bench.device(), DType::BF16)?;
        model.run_only()?;
        let mut runner = ModelRunner::new(&model);
        for &batch in batches {
            let usual: &[usize] = match (bench.quick, batch) {
                (true, _) => &[1, 33],
                (false, 1) => &LENGTHS,
                (false, _) => &[SEVERAL],
            };
            for &length in if lengths.is_empty() { usual } else { lengths } {
                measure(bench, &mut runner, name, config, batch, length)?;
            }
        }
        drop(runner);
        drop(model);
        bench.gpu.trim()?;
    }
    Ok(())
}

fn measure(
    bench: &mut Bench,
    runner: &mut ModelRunner<'_>,
    name: &str,
    config: &MambaConfig,
    batch: usize,
    length: usize,
) -> Result<()> {
    let tokens = batch * length;
    let prompts = values::tokens(tokens, config.vocab_size);
    let request = |prompt: &[u32], id| Request { prompt: prompt.into(), id, ..Request::default() };
    let requests: Vec<Request> =
        prompts.chunks(length).zip(0..).map(|(prompt, id)| request(prompt, id)).collect();
    let chunk = runner.reading().tokens;
    let options = Options { max_tokens: 0, chunk, ..Options::default() };
    let mut read = || -> Result<f64> {
        let read = generate(runner, &requests, &options, &mut |_| ControlFlow::Continue(()))?;
        Ok(read.timing.prefill.as_secs_f64())
    };
    bench.gpu.reset_peak();
    let first = read()?;
    // What takes a second was not slow because it was the first.
    if first < 1.0 {
        read()?;
    }
    let samples: Vec<f64> = (0..bench.repeats).map(|_| read()).collect::<Result<_>>()?;
    let parameters = config.parameter_count();
    let embedding = config.padded_vocab_size() * config.d_model;
    let flops =
        2.0 * ((parameters - embedding) as f64 * tokens as f64 + (embedding * batch) as f64);
    let updates = (config.d_inner() * config.d_state * config.n_layer * tokens) as f64;
    let task = Task {
        name: "prefill",
        shape: format!("{name}, {batch} x {length} tokens, {}", DType::BF16),
        tokens: Some(tokens),
        work: Work {
            bytes: (2 * parameters) as f64,
            forward_updates: updates,
            ..Work::flops(Limits::of_products(DType::BF16), flops)
        },
        counted: "every weight is read once; 2 FLOP a token and parameter outside the embedding, the head for the last \
                  token; E N updates a token and layer",
    };
    let peak_bytes = Some(bench.gpu.usage().peak);
    let figure = Figure::new(task, Times { samples, runs_per_sample: 1 }, &bench.limits);
    bench.add(Figure { prompt_tokens: Some(length), peak_bytes, ..figure });
    Ok(())
}
