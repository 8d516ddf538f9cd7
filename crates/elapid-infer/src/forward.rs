//! Logits of given tokens, piece by piece, so that [T, V] need never be held whole.

use elapid_models::{LanguageModel, State};
use elapid_tensor::Device;
use elapid_tensor::autograd::no_grad;

use crate::prefill::{Feed, Part, check_tokens, plan, run};
use crate::{Error, Result};

/// Logits are made for so many values at a time (16 MB).
const LOGITS_AT_ONCE: usize = 1 << 22;

/// Some rows of logits.
#[derive(Debug, Clone, Copy)]
pub struct Piece<'a> {
    /// First row, counted over the tokens of all sequences end to end.
    pub row: usize,
    /// [rows, V], padded rows of the vocabulary included.
    pub logits: &'a [f32],
}

/// Runs sequences of token ids through the model, at most `chunk` tokens at a time, and shows the logits
/// of every token in order. `state` has one slot a sequence; the state after each sequence is returned.
///
/// # Errors
/// If a token is outside the vocabulary, the state is of another model or number of sequences, or
/// `on_piece` fails.
pub fn forward<E: From<Error>>(
    model: &LanguageModel,
    sequences: &[Vec<u32>],
    state: Option<State>,
    chunk: usize,
    mut on_piece: impl FnMut(Piece<'_>) -> Result<(), E>,
) -> Result<State, E> {
    if let Some(state) = &state
        && state.slots() != sequences.len()
    {
        return Err(E::from(Error::Option {
            name: "state",
            expected: "one slot a sequence",
            found: format!("{} slots for {} sequences", state.slots(), sequences.len()),
        }));
    }
    no_grad(|| {
        let mut feeds = feeds(model, sequences, state).map_err(E::from)?;
        let mut row = 0;
        let lengths: Vec<usize> = sequences.iter().map(Vec::len).collect();
        for parts in plan(&lengths, chunk) {
            row += call(model, &mut feeds, &parts, row, &mut on_piece)?;
        }
        let states: Vec<&State> = feeds.iter().map(|feed| &feed.state).collect();
        if states.is_empty() {
            return model.fresh_state(0).map_err(|error| E::from(error.into()));
        }
        State::join(&states).map_err(|error| E::from(error.into()))
    })
}

fn feeds<'a>(
    model: &LanguageModel,
    sequences: &'a [Vec<u32>],
    state: Option<State>,
) -> Result<Vec<Feed<'a>>> {
    sequences
        .iter()
        .enumerate()
        .map(|(index, tokens)| {
            check_tokens(model, index, tokens)?;
            let state = state.as_ref().map(|state| state.select(&[index])).transpose()?;
            Feed::new(model, tokens, index as u64, state)
        })
        .collect()
}

/// One call; returns its number of rows.
fn call<E: From<Error>>(
    model: &LanguageModel,
    feeds: &mut [Feed<'_>],
    parts: &[Part],
    row: usize,
    on_piece: &mut impl FnMut(Piece<'_>) -> Result<(), E>,
) -> Result<usize, E> {
    let hidden = run(model, feeds, parts).map_err(E::from)?;
    let rows = hidden.dim(0);
    let step = (LOGITS_AT_ONCE / model.config().padded_vocab_size()).max(1);
    for start in (0..rows).step_by(step) {
        let logits = hidden
            .narrow(0, start, step.min(rows - start))
            .map_err(Error::from)
            .and_then(|hidden| Ok(model.logits(&hidden)?.to(Device::Cpu)?))
            .map_err(E::from)?;
        let logits = logits.data::<f32>().map_err(|error| E::from(error.into()))?;
        on_piece(Piece { row: row + start, logits })?;
    }
    Ok(rows)
}
