//! Logits of given tokens, piece by piece, so that [T, V] need never be held whole.

use std::ops::ControlFlow;

use elapid_models::State;

use crate::prefill::{Feed, Part, check_tokens, plan, run};
use crate::{Error, Logits, Result, Runner};

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
    runner: &mut dyn Runner,
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
    let mut feeds = feeds(runner, sequences, state).map_err(E::from)?;
    let mut row = 0;
    let lengths: Vec<usize> = sequences.iter().map(Vec::len).collect();
    for parts in plan(&lengths, chunk) {
        row += call(runner, &mut feeds, &parts, row, &mut on_piece)?;
    }
    let states: Vec<&State> = feeds.iter().map(|feed| &feed.state).collect();
    if states.is_empty() {
        return runner.fresh_state(0).map_err(E::from);
    }
    State::join(&states).map_err(|error| E::from(error.into()))
}

fn feeds<'a>(
    runner: &dyn Runner,
    sequences: &'a [Vec<u32>],
    state: Option<State>,
) -> Result<Vec<Feed<'a>>> {
    sequences
        .iter()
        .enumerate()
        .map(|(index, tokens)| {
            check_tokens(runner, index, tokens)?;
            let state = state.as_ref().map(|state| state.select(&[index])).transpose()?;
            Feed::new(runner, tokens, index as u64, state)
        })
        .collect()
}

/// One call; returns its number of rows.
fn call<E: From<Error>>(
    runner: &mut dyn Runner,
    feeds: &mut [Feed<'_>],
    parts: &[Part],
    row: usize,
    on_piece: &mut impl FnMut(Piece<'_>) -> Result<(), E>,
) -> Result<usize, E> {
    let rows: Vec<usize> = (0..parts.iter().map(|part| part.tokens.len()).sum()).collect();
    let mut refused = None;
    run(runner, feeds, parts, &rows, &mut |Logits { first, values }| match on_piece(Piece {
        row: row + first,
        logits: values,
    }) {
        Ok(()) => ControlFlow::Continue(()),
        Err(error) => {
            refused = Some(error);
            ControlFlow::Break(())
        }
    })
    .map_err(E::from)?;
    refused.map_or(Ok(rows.len()), Err)
}
