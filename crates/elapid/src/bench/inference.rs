//! Reading a prompt and generating token by token, one sequence, as a model of the smallest published size
//! (random weights: values do not change the time).

use anyhow::{Context as _, Result};
use elapid_models::{Context, LanguageModel, MambaConfig, State};
use elapid_tensor::autograd::no_grad;
use elapid_tensor::{Sequences, Tensor};
use serde::Serialize;

use super::Bench;
use super::inputs::Inputs;
use super::sampling::{Task, Work};

/// What the figures do not tell.
#[derive(Debug, Serialize)]
pub struct Inference {
    /// Name of the model's shape.
    pub model: &'static str,
    /// Parameters.
    pub parameters: usize,
    /// Bytes of weights that a decode step reads.
    pub weight_bytes: usize,
    /// Bytes of the sequence's state, which a decode step reads and writes; the figure does not count them.
    pub state_bytes: usize,
}

/// Decode steps in a timed run.
const STEPS: usize = 8;

/// Measures one of them or both.
pub fn run(bench: &mut Bench, decode: bool, prefill: bool) -> Result<Inference> {
    let (name, config, prompt) = if bench.quick {
        ("bytes D 64, 2 layers", MambaConfig::bytes(64, 2), 64)
    } else {
        ("mamba-130m", MambaConfig::preset("mamba-130m")?, 512)
    };
    eprintln!("  making {} random weights ({name})", config.parameter_count());
    let model = LanguageModel::new(&config, 0)?;
    let ids = Inputs::new().tokens(prompt, config.vocab_size);
    let ids = Tensor::from_slice(&ids, [prompt])?;
    let read = |state: Option<State>| no_grad(|| advance(&model, &ids, state));

    let embedding = config.padded_vocab_size() * config.d_model;
    let blocks = config.parameter_count() - embedding;
    if prefill {
        let updates = (config.d_inner() * config.d_state * config.n_layer * prompt) as f64;
        let task = Task {
            name: "prefill",
            shape: format!("{name}, {prompt} tokens"),
            tokens: prompt,
            work: Work {
                bytes: 0.0,
                flops: 2.0 * (blocks as f64 * prompt as f64 + embedding as f64),
                updates,
            },
            counted: format!(
                "2 FLOP a token for each of {blocks} parameters outside the embedding, the head for the last \
                 token; E N updates a token and layer"
            ),
        };
        bench.measure(task, || Ok(()), |()| read(None))?;
    }
    let weight_bytes = size_of::<f32>() * config.parameter_count();
    let (_, state) = read(None)?;
    let state_bytes = state_bytes(&state);
    if decode {
        let mut state = Some(state);
        let id = Tensor::from_slice(&[1u32], [1])?;
        let task = Task {
            name: "decode step",
            shape: format!("{name}, batch 1, {STEPS} steps a run"),
            tokens: STEPS,
            work: Work { bytes: (weight_bytes * STEPS) as f64, ..Work::default() },
            counted: "every weight is read once a token (the embedding as the head)".into(),
        };
        bench.measure(
            task,
            || Ok(()),
            |()| {
                for _ in 0..STEPS {
                    let (logits, next) =
                        no_grad(|| advance(&model, &id, Some(state.take().context("no state")?)))?;
                    std::hint::black_box(logits.data::<f32>()?);
                    state = Some(next);
                }
                Ok(())
            },
        )?;
    }
    Ok(Inference { model: name, parameters: config.parameter_count(), weight_bytes, state_bytes })
}

/// Logits of the last of `ids`, and the state after it.
fn advance(model: &LanguageModel, ids: &Tensor, state: Option<State>) -> Result<(Tensor, State)> {
    let length = ids.dim(0);
    let sequences = match &state {
        None => Sequences::uniform(1, length),
        Some(state) => Sequences::continued(&[length], &state.positions)?,
    };
    let (hidden, state) = model.hidden(ids, &sequences, state, &mut Context::new())?;
    Ok((model.logits(&hidden.narrow(0, length - 1, 1)?)?, state))
}

fn state_bytes(state: &State) -> usize {
    let tensors = state.layers.iter().flat_map(|layer| layer.iter());
    tensors.map(|(_, tensor)| tensor.elements() * size_of::<f32>()).sum()
}
