//! Decode steps of the engine, by the card's clock: tokens are chosen on the card and read there by the next step, as in
//! generation, so the host is in nobody's way.
//!
//! Sequences go on after a prompt of random tokens. It is read once a model, and every sequence starts from a copy of the
//! state that it leaves: what a step costs does not depend on whose state it is.

use std::ops::ControlFlow;

use anyhow::Result;
use elapid_infer::{GpuEngine, Logits, Runner as _, Sampling, Start};
use elapid_models::State;
use elapid_ops::decode_step::Encoding;
use elapid_tensor::{DType, Sequences};

use super::limits::Limits;
use super::sampling::{Figure, Task, Times, Work};
use super::{Bench, ModelShape, values};

/// Sequences of a step, if nothing else is asked for.
const BATCHES: [usize; 6] = [1, 8, 32, 64, 128, 256];
/// Tokens of the prompt, if nothing else is asked for.
const PROMPT: usize = 2048;
/// Steps of a sample.
const STEPS: usize = 64;

/// The state that a prompt of random tokens leaves.
struct Prompt {
    tokens: usize,
    state: State,
}

/// Measures steps of each model with each type of weights and number of sequences, after a prompt of each length (0:
/// from nothing).
pub fn run(
    bench: &mut Bench,
    models: &[ModelShape],
    batches: &[usize],
    lengths: &[usize],
    encodings: &[Encoding],
    state: DType,
) -> Result<()> {
    let usual: ModelShape =
        if bench.quick { "tiny" } else { "130m" }.parse().map_err(anyhow::Error::msg)?;
    let usual = [usual];
    let models = if models.is_empty() { &usual } else { models };
    let batches = match (batches, bench.quick) {
        ([], true) => &[1, 3],
        ([], false) => BATCHES.as_slice(),
        (some, _) => some,
    };
    let lengths = match (lengths, bench.quick) {
        ([], true) => &[5],
        ([], false) => &[PROMPT],
        (some, _) => some,
    };
    let encodings =
        if encodings.is_empty() { &[Encoding::Bf16, Encoding::Q8][..] } else { encodings };
    for shape in models {
        let (name, config) = shape.model();
        let mut model = values::model(config, bench.device(), DType::BF16)?;
        let mut prompts = Vec::new();
        for &encoding in encodings {
            let mut engine = GpuEngine::new(&mut model, encoding)?.with_state(state)?;
            if prompts.is_empty() {
                prompts = read(&mut engine, name, lengths)?;
            }
            for prompt in &prompts {
                for &batch in batches {
                    measure(bench, &mut engine, name, prompt, batch)?;
                }
            }
        }
        drop(prompts);
        drop(model);
        bench.gpu.trim()?;
    }
    Ok(())
}

/// Reads a prompt of each length, as many tokens at a time as the engine reads best.
fn read(engine: &mut GpuEngine<'_>, name: &str, lengths: &[usize]) -> Result<Vec<Prompt>> {
    let mut prompts = Vec::with_capacity(lengths.len());
    for &tokens in lengths {
        let ids = values::tokens(tokens, engine.config().vocab_size);
        let mut state = engine.fresh_state(1)?;
        for piece in ids.chunks(engine.reading().tokens) {
            let sequences = Sequences::continued(&[piece.len()], &state.positions)?;
            let mut receive = |_: Logits<'_>| ControlFlow::Continue(());
            state = engine.run(piece, &sequences, Some(state), &[], &mut receive)?;
        }
        if tokens > 0 {
            eprintln!("  {name}: one prompt of {tokens} tokens read, its state for every sequence");
        }
        prompts.push(Prompt { tokens, state });
    }
    Ok(prompts)
}

fn measure(
    bench: &mut Bench,
    engine: &mut GpuEngine<'_>,
    name: &str,
    prompt: &Prompt,
    batch: usize,
) -> Result<()> {
    let (count, warm) = if bench.quick { (2, 2) } else { (STEPS, 8) };
    let last = values::tokens(batch, engine.config().vocab_size);
    let starts: Vec<Start<'_>> = last
        .chunks(1)
        .zip(0..)
        .map(|(history, id)| Start { id, history, max_tokens: usize::MAX >> 1 })
        .collect();
    let weights = engine.weight_bytes();
    let state = prompt.state.select(&vec![0; batch])?;
    let mut steps = engine.sample(state, &starts, &Sampling::greedy(), &[])?;
    for _ in 0..warm {
        steps.launch_unread()?;
    }
    let mut samples = Vec::with_capacity(bench.repeats);
    for _ in 0..bench.repeats {
        let begin = bench.gpu.event()?;
        for _ in 0..count {
            steps.launch_unread()?;
        }
        samples.push(bench.gpu.event()?.since(&begin)? / 1e3 / count as f64);
    }
    steps.finish()?;
    let config = engine.config();
    let kept =
        config.d_state * engine.state_dtype().size() + (config.d_conv - 1) * DType::F32.size();
    let bytes = weights + 2 * config.n_layer * config.d_inner() * kept * batch;
    let flops = 2.0 * (config.parameter_count() * batch) as f64;
    let state = match engine.state_dtype() {
        DType::F32 => String::new(),
        narrow => format!(", state {narrow}"),
    };
    let after = match prompt.tokens {
        0 => "from nothing".to_owned(),
        tokens => format!("after {tokens} tokens"),
    };
    let task = Task {
        name: "decode step",
        shape: format!("{name}, batch {batch}, {}{state}, {after}", engine.encoding()),
        tokens: Some(batch),
        work: Work { bytes: bytes as f64, ..Work::flops(Limits::of_products(DType::BF16), flops) },
        counted: "every weight is read once a step (the embedding as the head), states of all sequences once and \
                  written once; 2 FLOP a token and parameter; all sequences start from copies of one prompt's state",
    };
    let times = Times { samples, runs_per_sample: count };
    let figure = Figure::new(task, times, &bench.limits);
    bench.add(Figure { prompt_tokens: Some(prompt.tokens), ..figure });
    Ok(())
}
