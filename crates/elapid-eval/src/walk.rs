//! The way through a text: documents to stretches that start from nothing, and these to calls of a bounded number of
//! tokens.
//!
//! A stretch reads tokens and predicts the one after each. With the state carried through, a document is one stretch.
//! A sliding window of W tokens that moves by M makes one stretch for each of its places, and only the predictions
//! that no earlier place has made count: every token but a document's first is predicted once, those after the first
//! window from W-M+1 to W tokens. Short stretches share a call, long ones take several, at multiples of the chunk
//! length from their own first token; so a result depends on neither.

use std::iter::Peekable;
use std::ops::{ControlFlow, Range};

use elapid_infer::{Logits, Runner};
use elapid_models::State;
use elapid_tensor::{Sequence, Sequences};

use crate::{Document, Error, Result};

/// What a token is predicted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reading {
    /// All tokens before it in its document: the state is carried through.
    Carried,
    /// The tokens before it in a window of `window` tokens, which moves by `stride`.
    Windows {
        /// Tokens that are read from nothing.
        window: usize,
        /// Tokens by which the window moves, at most its length.
        stride: usize,
    },
}

/// How to evaluate.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// What a token is predicted from.
    pub reading: Reading,
    /// Tokens that run at once, which bounds memory.
    pub chunk: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { reading: Reading::Carried, chunk: 2048 }
    }
}

/// How far an evaluation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Predictions made.
    pub done: u64,
    /// Predictions in all.
    pub all: u64,
}

impl Options {
    fn check(&self) -> Result<()> {
        let refuse = |name, expected, found: String| Err(Error::Option { name, expected, found });
        if self.chunk == 0 {
            return refuse("chunk", "at least one token", "0".into());
        }
        match self.reading {
            Reading::Windows { window: 0, .. } => {
                refuse("window", "at least one token", "0".into())
            }
            Reading::Windows { window, stride } if stride == 0 || stride > window => refuse(
                "stride",
                "at least one token and at most the window's length",
                format!("{stride} for a window of {window}"),
            ),
            _ => Ok(()),
        }
    }
}

/// Tokens that are read from nothing: `tokens` of a document, of which those from `counts` on predict what counts.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stretch {
    document: usize,
    tokens: Range<usize>,
    counts: usize,
}

impl Reading {
    /// The stretches of a document of `len` tokens, the last of which only is predicted.
    fn stretches(self, document: usize, len: usize) -> impl Iterator<Item = Stretch> {
        let read = len.saturating_sub(1);
        let (window, stride) = match self {
            Self::Carried => (read, read),
            Self::Windows { window, stride } => (window, stride),
        };
        let mut next = (read > 0).then_some(0usize);
        std::iter::from_fn(move || {
            let start = next?;
            let end = read.min(start.saturating_add(window));
            next = (end < read).then_some(start + stride);
            let counts = if start == 0 { 0 } else { start + window - stride };
            Some(Stretch { document, tokens: start..end, counts })
        })
    }
}

/// A predicted token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    pub document: usize,
    /// Index in the document.
    pub place: usize,
    pub token: u32,
}

/// One call of a model.
#[derive(Debug)]
pub(crate) struct Call {
    pub ids: Vec<u32>,
    pub sequences: Sequences,
    /// True if every sequence starts from nothing.
    pub fresh: bool,
    /// The tokens whose predictions count.
    pub wanted: Vec<usize>,
    /// What they predict.
    pub targets: Vec<Target>,
}

/// The calls that an evaluation takes, in order.
pub(crate) struct Walk<'a> {
    documents: &'a [Document<'a>],
    stretches: Peekable<Box<dyn Iterator<Item = Stretch> + 'a>>,
    chunk: usize,
    /// The rest of a stretch that is longer than a chunk.
    rest: Option<Stretch>,
    vocabulary: usize,
}

impl<'a> Walk<'a> {
    /// Through all documents; a token of a text must be among `vocabulary` tokens.
    pub fn new(
        documents: &'a [Document<'a>],
        options: &Options,
        vocabulary: usize,
    ) -> Result<Self> {
        options.check()?;
        let reading = options.reading;
        let stretches: Box<dyn Iterator<Item = Stretch> + 'a> = Box::new(
            documents
                .iter()
                .enumerate()
                .flat_map(move |(index, document)| reading.stretches(index, document.len())),
        );
        let walk = Self {
            documents,
            stretches: stretches.peekable(),
            chunk: options.chunk,
            rest: None,
            vocabulary,
        };
        if walk.predictions() == 0 {
            let tokens = documents.iter().map(|document| document.own() as u64).sum();
            return Err(Error::Nothing { documents: documents.len(), tokens });
        }
        Ok(walk)
    }

    /// Predictions that count, in all.
    pub fn predictions(&self) -> u64 {
        self.documents.iter().map(|document| document.len().saturating_sub(1) as u64).sum()
    }

    /// The next call.
    pub fn next(&mut self) -> Result<Option<Call>> {
        if let Some(stretch) = self.rest.take() {
            return self.call(vec![stretch], false).map(Some);
        }
        let Some(first) = self.stretches.next() else {
            return Ok(None);
        };
        let mut room = self.chunk.saturating_sub(first.tokens.len());
        let mut group = vec![first];
        while let Some(next) = self.stretches.next_if(|next| next.tokens.len() <= room) {
            room -= next.tokens.len();
            group.push(next);
        }
        self.call(group, true).map(Some)
    }

    fn call(&mut self, group: Vec<Stretch>, fresh: bool) -> Result<Call> {
        let mut ids = Vec::new();
        let (mut wanted, mut targets) = (Vec::new(), Vec::new());
        let mut sequences = Vec::with_capacity(group.len());
        for (slot, stretch) in group.into_iter().enumerate() {
            let Range { start, end } = stretch.tokens;
            let cut = end.min(start + self.chunk);
            sequences.push(Sequence {
                start: ids.len(),
                len: cut - start,
                slot,
                continued: !fresh,
                position: start as u64,
                id: stretch.document as u64,
            });
            let document = &self.documents[stretch.document];
            let first = ids.len();
            // One more than is read: the last prediction's target.
            document.append(start..cut + 1, &mut ids);
            self.check(stretch.document, start, &ids[first..])?;
            for place in start.max(stretch.counts)..cut {
                wanted.push(first + place - start);
                let token = ids[first + place + 1 - start];
                targets.push(Target { document: stretch.document, place: place + 1, token });
            }
            ids.pop();
            if cut < end {
                self.rest = Some(Stretch { tokens: cut..end, ..stretch });
            }
        }
        let slots = sequences.len();
        let sequences = Sequences::new(sequences, slots)?;
        Ok(Call { ids, sequences, fresh, wanted, targets })
    }

    fn check(&self, document: usize, start: usize, ids: &[u32]) -> Result<()> {
        match ids.iter().position(|&token| token as usize >= self.vocabulary) {
            None => Ok(()),
            Some(at) => Err(Error::Token {
                document,
                place: start + at,
                token: ids[at],
                vocabulary: self.vocabulary,
            }),
        }
    }
}

/// Runs a call; `receive` is given the index of the first of some wanted tokens, and their logits [rows, V], padded
/// rows of the vocabulary included.
pub(crate) fn run(
    runner: &mut dyn Runner,
    call: &Call,
    state: Option<State>,
    mut receive: impl FnMut(usize, &[f32]) -> Result<()>,
) -> Result<State> {
    let mut refused = None;
    let state = if call.fresh { None } else { state };
    let state = runner.run(
        &call.ids,
        &call.sequences,
        state,
        &call.wanted,
        &mut |Logits { first, values }| match receive(first, values) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                refused = Some(error);
                ControlFlow::Break(())
            }
        },
    )?;
    refused.map_or(Ok(state), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_window_moves_and_counts_what_is_new() {
        let windows = |window, stride, len| -> Vec<(Range<usize>, usize)> {
            let reading = Reading::Windows { window, stride };
            reading.stretches(0, len).map(|s| (s.tokens, s.counts)).collect()
        };
        assert_eq!(windows(4, 2, 10), [(0..4, 0), (2..6, 4), (4..8, 6), (6..9, 8)]);
        assert_eq!(windows(4, 4, 9), [(0..4, 0), (4..8, 4)]);
        assert_eq!(windows(4, 4, 10), [(0..4, 0), (4..8, 4), (8..9, 8)]);
        assert_eq!(windows(9, 1, 3), [(0..2, 0)]);
        assert!(windows(4, 2, 1).is_empty() && windows(4, 2, 0).is_empty());
        let whole: Vec<Stretch> = Reading::Carried.stretches(3, 7).collect();
        assert_eq!(whole, [Stretch { document: 3, tokens: 0..6, counts: 0 }]);
    }

    proptest! {
        #[test]
        fn every_token_but_the_first_is_predicted_once(
            lengths in prop::collection::vec(0usize..40, 1..6),
            window in 0usize..20,
            stride in 1usize..20,
            chunk in 1usize..30,
            start in prop::option::of(0u32..5),
        ) {
            // A window of 0 stands for none.
            let reading = match window {
                0 => Reading::Carried,
                window => Reading::Windows { window, stride: stride.min(window) },
            };
            let texts: Vec<Vec<u32>> = lengths
                .iter()
                .enumerate()
                .map(|(i, &len)| (0..len as u32).map(|t| i as u32 * 100 + t).collect())
                .collect();
            let documents: Vec<Document<'_>> =
                texts.iter().map(|ids| Document::ids(ids, b"").after(start)).collect();
            let all: Vec<(usize, u32)> = texts
                .iter()
                .enumerate()
                .flat_map(|(i, ids)| {
                    let skipped = usize::from(start.is_none());
                    ids.iter().skip(skipped).map(move |&id| (i, id))
                })
                .collect();
            let options = Options { reading, chunk };
            let walk = Walk::new(&documents, &options, 1000);
            if all.is_empty() {
                prop_assert!(walk.is_err());
                return Ok(());
            }
            let mut walk = walk.unwrap();
            prop_assert_eq!(walk.predictions(), all.len() as u64);
            let mut seen = Vec::new();
            while let Some(call) = walk.next().unwrap() {
                prop_assert!(call.ids.len() <= chunk && call.ids.len() == call.sequences.tokens());
                prop_assert_eq!(call.wanted.len(), call.targets.len());
                prop_assert!(call.fresh || call.sequences.len() == 1);
                for (&row, target) in call.wanted.iter().zip(&call.targets) {
                    let sequence = call.sequences.iter().find(|s| s.tokens().contains(&row)).unwrap();
                    prop_assert_eq!(sequence.position as usize + row - sequence.start + 1, target.place);
                    seen.push((target.document, target.token));
                }
            }
            prop_assert_eq!(seen, all);
        }
    }

    #[test]
    fn options_out_of_range_and_wild_tokens_are_named() {
        let documents = [Document::ids(&[1, 2, 300], b"x")];
        let walk = |reading, chunk| Walk::new(&documents, &Options { reading, chunk }, 256);
        let name = |reading, chunk| walk(reading, chunk).err().map(|e| e.to_string()).unwrap();
        assert!(name(Reading::Carried, 0).starts_with("chunk"));
        assert!(name(Reading::Windows { window: 0, stride: 0 }, 4).starts_with("window"));
        assert!(name(Reading::Windows { window: 4, stride: 0 }, 4).starts_with("stride"));
        assert!(name(Reading::Windows { window: 4, stride: 5 }, 4).contains("5 for a window of 4"));
        let error = walk(Reading::Carried, 8).unwrap().next().unwrap_err().to_string();
        assert!(error.contains("token 300 at place 2 of document 0"), "{error}");
        let one = [Document::bytes(b"x"), Document::bytes(b"")];
        let error = Walk::new(&one, &Options::default(), 256).err().unwrap().to_string();
        assert!(error.contains("2 document(s) with 1 token(s)"), "{error}");
    }
}
