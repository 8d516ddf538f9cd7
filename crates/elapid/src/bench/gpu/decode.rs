//! Decode steps of the engine, by the card's clock: tokens are chosen on the card and read there by the next step, as in
//! generation, so the host is in nobody's way.

use anyhow::Result;
use elapid_infer::{GpuEngine, Runner as _, Sampling, Start};
use elapid_models::MambaConfig;
use elapid_ops::decode_step::Encoding;
use elapid_tensor::DType;

use super::limits::Limits;
use super::sampling::{Figure, Task, Times, Work};
use super::{Bench, ModelShape, values};

/// Sequences of a step, if nothing else is asked for.
const BATCHES: [usize; 6] = [1, 8, 32, 64, 128, 256];
/// Steps of a sample.
const STEPS: usize = 64;

/// Measures steps of each model with each type of weights and number of sequences.
pub fn run(
    bench: &mut Bench,
    models: &[ModelShape],
    batches: &[usize],
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
    let encodings =
        if encodings.is_empty() { &[Encoding::Bf16, Encoding::Q8][..] } else { encodings };
    for shape in models {
        let (name, config) = shape.model();
        let mut model = values::model(config, bench.device(), DType::BF16)?;
        for &encoding in encodings {
            let mut engine = GpuEngine::new(&mut model, encoding)?.with_state(state)?;
            for &batch in batches {
                measure(bench, &mut engine, name, config, batch)?;
            }
        }
        drop(model);
        bench.gpu.trim()?;
    }
    Ok(())
}

fn measure(
    bench: &mut Bench,
    engine: &mut GpuEngine<'_>,
    name: &str,
    config: &MambaConfig,
    batch: usize,
) -> Result<()> {
    let (count, warm) = if bench.quick { (2, 2) } else { (STEPS, 8) };
    let prompts = values::tokens(batch, config.vocab_size);
    let starts: Vec<Start<'_>> = prompts
        .chunks(1)
        .zip(0..)
        .map(|(history, id)| Start { id, history, max_tokens: usize::MAX >> 1 })
        .collect();
    let weights = engine.weight_bytes();
    let state = engine.fresh_state(batch)?;
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
    let kept =
        config.d_state * engine.state_dtype().size() + (config.d_conv - 1) * DType::F32.size();
    let bytes = weights + 2 * config.n_layer * config.d_inner() * kept * batch;
    let flops = 2.0 * (config.parameter_count() * batch) as f64;
    let task = Task {
        name: "decode step",
        shape: match engine.state_dtype() {
            DType::F32 => format!("{name}, batch {batch}, {}", engine.encoding()),
            narrow => format!("{name}, batch {batch}, {}, state {narrow}", engine.encoding()),
        },
        tokens: Some(batch),
        work: Work { bytes: bytes as f64, ..Work::flops(Limits::of_products(DType::BF16), flops) },
        counted: "every weight is read once a step (the embedding as the head), states of all sequences once and \
                  written once; 2 FLOP a token and parameter",
    };
    let times = Times { samples, runs_per_sample: count };
    bench.add(Figure::new(task, times, &bench.limits));
    Ok(())
}
