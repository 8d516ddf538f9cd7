//! Running many tokens through a model in constant memory.
//!
//! Each sequence is cut at multiples of the chunk length counted from its own first token, so where it is
//! cut does not depend on the batch; parts of neighbouring sequences share a call where they fit.

use std::ops::Range;

use elapid_models::State;
use elapid_tensor::{Sequence, Sequences};

use crate::{Error, Receiver, Result, Runner};

/// One sequence on its way through the model.
#[derive(Debug)]
pub(crate) struct Feed<'a> {
    pub tokens: &'a [u32],
    pub id: u64,
    /// One slot; ignored before the first part of a fresh sequence.
    pub state: State,
    pub continued: bool,
}

impl<'a> Feed<'a> {
    /// A sequence that goes on from `state`, or starts from nothing.
    pub fn new(
        runner: &dyn Runner,
        tokens: &'a [u32],
        id: u64,
        state: Option<State>,
    ) -> Result<Self> {
        let continued = state.is_some();
        let state = match state {
            Some(state) if state.slots() != 1 => {
                return Err(Error::Option {
                    name: "state",
                    expected: "one slot a sequence",
                    found: format!("{} slots", state.slots()),
                });
            }
            Some(state) => {
                runner.check_state(&state)?;
                state
            }
            None => runner.fresh_state(1)?,
        };
        Ok(Self { tokens, id, state, continued })
    }
}

/// A stretch of one sequence's tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub sequence: usize,
    pub tokens: Range<usize>,
}

/// Parts of at most `chunk` tokens, grouped into calls of at most `chunk` tokens, in order. Sequences
/// without tokens have no part.
pub(crate) fn plan(lengths: &[usize], chunk: usize) -> Vec<Vec<Part>> {
    let chunk = chunk.max(1);
    let mut calls: Vec<Vec<Part>> = Vec::new();
    let mut room = 0;
    for (sequence, &length) in lengths.iter().enumerate() {
        for start in (0..length).step_by(chunk) {
            let part = Part { sequence, tokens: start..length.min(start + chunk) };
            let own = part.tokens.len();
            // A sequence's second part needs the state that its first one leaves.
            match calls.last_mut().filter(|_| own <= room && start == 0) {
                Some(call) => call.push(part),
                None => {
                    calls.push(vec![part]);
                    room = chunk;
                }
            }
            room -= own;
        }
    }
    calls
}

/// Runs one call, of whose tokens the logits of `wanted` are received. The feeds' states move on.
pub(crate) fn run(
    runner: &mut dyn Runner,
    feeds: &mut [Feed<'_>],
    parts: &[Part],
    wanted: &[usize],
    receive: &mut Receiver<'_>,
) -> Result<()> {
    let mut ids = Vec::new();
    let mut sequences = Vec::with_capacity(parts.len());
    for (slot, part) in parts.iter().enumerate() {
        let feed = &feeds[part.sequence];
        sequences.push(Sequence {
            start: ids.len(),
            len: part.tokens.len(),
            slot,
            continued: feed.continued,
            position: feed.state.positions[0],
            id: feed.id,
        });
        ids.extend_from_slice(&feed.tokens[part.tokens.clone()]);
    }
    let state = match parts {
        // Passed by value, a single state can be updated in place.
        [part] => std::mem::take(&mut feeds[part.sequence].state),
        _ => State::join(&parts.iter().map(|p| &feeds[p.sequence].state).collect::<Vec<_>>())?,
    };
    let sequences = Sequences::new(sequences, parts.len())?;
    let state = runner.run(&ids, &sequences, Some(state), wanted, receive)?;
    for part in parts {
        feeds[part.sequence].continued = true;
    }
    match parts {
        [part] => feeds[part.sequence].state = state,
        _ => {
            for (slot, part) in parts.iter().enumerate() {
                feeds[part.sequence].state = state.select(&[slot])?;
            }
        }
    }
    Ok(())
}

/// Checks that every token has a row in the embedding.
pub(crate) fn check_tokens(runner: &dyn Runner, sequence: usize, tokens: &[u32]) -> Result<()> {
    let vocabulary = runner.config().padded_vocab_size();
    match tokens.iter().position(|&token| token as usize >= vocabulary) {
        None => Ok(()),
        Some(place) => Err(Error::Token { sequence, place, token: tokens[place], vocabulary }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn short_sequences_share_a_call_and_long_ones_are_cut() {
        let part = |sequence, tokens| Part { sequence, tokens };
        assert_eq!(
            plan(&[10, 0, 3, 5, 1], 4),
            [
                vec![part(0, 0..4)],
                vec![part(0, 4..8)],
                vec![part(0, 8..10)],
                vec![part(2, 0..3)],
                vec![part(3, 0..4)],
                vec![part(3, 4..5), part(4, 0..1)],
            ]
        );
    }

    proptest! {
        #[test]
        fn calls_cover_every_token_once_in_order(
            lengths in prop::collection::vec(0usize..30, 0..8),
            chunk in 1usize..12,
        ) {
            let calls = plan(&lengths, chunk);
            for call in &calls {
                prop_assert!(call.iter().map(|part| part.tokens.len()).sum::<usize>() <= chunk);
                prop_assert!(call.windows(2).all(|pair| pair[0].sequence < pair[1].sequence));
            }
            let seen: Vec<(usize, usize)> =
                calls.concat().into_iter().flat_map(|p| p.tokens.map(move |t| (p.sequence, t))).collect();
            let all: Vec<(usize, usize)> =
                lengths.iter().enumerate().flat_map(|(s, &n)| (0..n).map(move |t| (s, t))).collect();
            prop_assert_eq!(seen, all);
            prop_assert!(calls.concat().iter().all(|part| part.tokens.start % chunk == 0));
        }
    }
}
