//! `elapid forward`: the logits and states of given tokens, for parity checks and for people who look
//! inside. The file is written piece by piece, so [T, V] is never held in memory.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use elapid_formats::{atomic, load_continuation_checked, save_state};
use elapid_infer::{Runner, forward};
use elapid_models::State;
use elapid_tensor::Tensor;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::cli::{Global, JsonArgument, ModelArgument, WeightsArgument};
use crate::exit::Usage;
use crate::output::{grouped, print_json, rate};
use crate::ready_model::{ReadyModel, check_reading};

const EXAMPLES: &str = "\
Examples:
  echo '[72, 101, 108, 108, 111]' > ids.json
  elapid forward --model runs/first --tokens ids.json --out logits.safetensors
  elapid forward --model runs/first --tokens two-sequences.json --out l.safetensors --state-out s.state
  elapid forward --model mamba-130m-hf --weights q4_k --tokens ids.json --out q4.safetensors

FILE.json is an array of token ids, or an array of such arrays for several sequences.
The output has logits [T, V] (f32; all tokens of all sequences end to end, padding rows of the \
vocabulary included) and the states after each sequence: layers.{i}.conv_state [S, E, W-1], oldest \
first, and layers.{i}.ssm_state [S, E, N].";

/// Arguments of `elapid forward`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgument,
    /// JSON file with token ids
    #[arg(long, value_name = "FILE.json")]
    tokens: PathBuf,
    /// Where logits and states go
    #[arg(long, value_name = "FILE.safetensors")]
    out: PathBuf,
    /// Start from these states, one a sequence
    #[arg(long, value_name = "FILE")]
    state_in: Option<PathBuf>,
    /// Save the states in a file that --state-in takes
    #[arg(long, value_name = "FILE")]
    state_out: Option<PathBuf>,
    /// Read so many tokens at a time, which bounds memory
    #[arg(long, value_name = "N", default_value = "2048", value_parser = clap::value_parser!(u32).range(1..))]
    chunk: u32,
    #[command(flatten)]
    weights: WeightsArgument,
    #[command(flatten)]
    json: JsonArgument,
}

/// The tokens file.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Tokens {
    One(Vec<u32>),
    Several(Vec<Vec<u32>>),
}

/// Runs the model over the tokens.
pub fn run(arguments: &Arguments, global: &Global) -> Result<()> {
    let placement = global.placement()?;
    let sequences = read_tokens(&arguments.tokens)?;
    let weights = arguments.weights.weights;
    check_reading(weights, &placement)?;
    let mut ready = ReadyModel::open(&arguments.model.model, &placement, weights)?;
    let fingerprint = match (&arguments.state_in, &arguments.state_out) {
        (None, None) => None,
        _ => Some(ready.fingerprint()?),
    };
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    let started = std::time::Instant::now();
    let mut failed = None;
    let state = ready.with(|runner| {
        let state = match (&arguments.state_in, &fingerprint) {
            (Some(path), Some(fingerprint)) => {
                let check =
                    |state: &State| runner.check_state(state).map_err(|error| error.to_string());
                let config = runner.config();
                Some(load_continuation_checked(path, config, fingerprint, &check)?.0)
            }
            _ => None,
        };
        let written = atomic::write_file(&arguments.out, |out| {
            let chunk = arguments.chunk as usize;
            write(out, runner, &sequences, state, chunk).map_err(|error| {
                // The atomic writer speaks of io errors; the real one is kept beside it.
                let kind =
                    error.downcast_ref::<io::Error>().map_or(io::ErrorKind::Other, io::Error::kind);
                let text = error.to_string();
                failed = Some(error);
                io::Error::new(kind, text)
            })
        });
        match (written, failed) {
            (Ok(state), _) => Ok(state),
            (Err(_), Some(error)) if !error.is::<io::Error>() => Err(error),
            (Err(error), _) => Err(error.into()),
        }
    })?;
    let seconds = started.elapsed().as_secs_f64();
    if let (Some(path), Some(fingerprint)) = (&arguments.state_out, &fingerprint) {
        save_state(path, &state, fingerprint).context("the states were not saved")?;
    }
    let vocabulary = ready.config().padded_vocab_size();
    if arguments.json.json {
        return print_json(&json!({
            "out": arguments.out.display().to_string(),
            "tokens": tokens,
            "sequences": sequences.len(),
            "vocabulary": vocabulary,
            "seconds": seconds,
            "device": placement.device.to_string(),
            "dtype": ready.dtype(),
        }));
    }
    eprintln!(
        "wrote logits [{tokens}, {vocabulary}] and the states of {} to {} · {} tokens/s on {} in {}",
        match sequences.len() {
            1 => "1 sequence".into(),
            count => format!("{} sequences", grouped(count as u64)),
        },
        arguments.out.display(),
        rate(tokens as f64 / seconds.max(1e-9)),
        placement.device,
        ready.dtype()
    );
    Ok(())
}

fn read_tokens(path: &Path) -> Result<Vec<Vec<u32>>> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let expected = "expected a JSON array of token ids, or an array of such arrays";
    // Syntax first: the message of the choice below would not say where the text is broken.
    let value: Value = serde_json::from_slice(&text)
        .map_err(|error| Usage::new(format!("{}: {expected}: {error}", path.display())))?;
    match serde_json::from_value(value) {
        Ok(Tokens::One(ids)) => Ok(vec![ids]),
        Ok(Tokens::Several(sequences)) => Ok(sequences),
        Err(_) => Err(Usage::new(format!("{}: {expected}", path.display())).into()),
    }
}

/// Writes logits as they come, then the states.
fn write(
    out: &mut dyn Write,
    runner: &mut dyn Runner,
    sequences: &[Vec<u32>],
    state: Option<State>,
    chunk: usize,
) -> Result<State> {
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    out.write_all(&header(runner, sequences.len(), tokens)?)?;
    let mut bytes = Vec::new();
    let state =
        forward(runner, sequences, state, chunk, |piece| write_f32(out, piece.logits, &mut bytes))?;
    for layer in &state.layers {
        for (_, tensor) in sorted(layer.iter()) {
            write_f32(out, &tensor.to_vec::<f32>()?, &mut bytes)?;
        }
    }
    Ok(state)
}

fn write_f32(out: &mut dyn Write, values: &[f32], bytes: &mut Vec<u8>) -> Result<()> {
    for part in values.chunks(1 << 16) {
        bytes.clear();
        bytes.extend(part.iter().flat_map(|value| value.to_le_bytes()));
        out.write_all(bytes)?;
    }
    Ok(())
}

fn sorted<'a>(tensors: impl Iterator<Item = (&'a str, &'a Tensor)>) -> Vec<(&'a str, &'a Tensor)> {
    let mut tensors: Vec<_> = tensors.collect();
    tensors.sort_unstable_by_key(|&(name, _)| name);
    tensors
}

/// The safetensors header: every size is known before the first logit is.
fn header(runner: &dyn Runner, slots: usize, tokens: usize) -> Result<Vec<u8>> {
    let mut map = Map::new();
    map.insert("__metadata__".into(), json!({ "format": "pt", "made_by": "elapid forward" }));
    let mut offset = 0u64;
    let mut add = |name: String, shape: &[usize]| -> Result<()> {
        let elements = shape.iter().try_fold(4u64, |a, &b| a.checked_mul(b as u64));
        let end = elements
            .and_then(|size| size.checked_add(offset))
            .context("the output is too large")?;
        let info = json!({ "dtype": "F32", "shape": shape, "data_offsets": [offset, end] });
        map.insert(name, info);
        offset = end;
        Ok(())
    };
    add("logits".into(), &[tokens, runner.config().padded_vocab_size()])?;
    for (i, layer) in runner.fresh_state(1)?.layers.iter().enumerate() {
        for (name, tensor) in sorted(layer.iter()) {
            let mut shape = tensor.shape().to_vec();
            shape[0] = slots;
            add(format!("layers.{i}.{name}"), &shape)?;
        }
    }
    let mut text = Value::Object(map).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    Ok(bytes)
}
