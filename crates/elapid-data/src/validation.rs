//! Validation: one pass over held-out spans in order, in windows that start from a fresh state.
//!
//! The same windows can be had as text, so that compressors and counting models are measured on the very
//! bytes that the model is.

use crate::batch::BatchBuilder;
use crate::windows::Windows;
use crate::{Batch, Documents, Error, Result, Span};

/// The held-out windows.
#[derive(Debug, Clone)]
pub struct Validation {
    documents: Documents,
    windows: Windows,
    batch_tokens: usize,
    count: u64,
}

impl Validation {
    /// Windows of up to `context` bytes, in batches of up to `batch_tokens` tokens, until the next one
    /// would bring the input above `max_bytes` (the first is always taken).
    ///
    /// # Errors
    /// A context of 0, a batch that cannot hold one window, or no span with two bytes.
    pub fn new(
        documents: Documents,
        spans: Vec<Span>,
        context: usize,
        batch_tokens: usize,
        max_bytes: Option<u64>,
    ) -> Result<Self> {
        if context == 0 {
            return Err(Error::option("context", "at least 1", 0));
        }
        if batch_tokens < context {
            let expected = format!("at least the context, {context}");
            return Err(Error::option("batch_tokens", expected, batch_tokens));
        }
        let bytes = spans.iter().map(|span| span.len() as u64).sum();
        let too_small = Error::TooSmall { part: "validation", documents: spans.len(), bytes };
        let windows = Windows::new(documents.clone(), spans, context);
        let mut total = 0;
        let count = (0..windows.len())
            .take_while(|&index| {
                total += windows.tokens(windows.run(index), 0) as u64;
                index == 0 || max_bytes.is_none_or(|most| total <= most)
            })
            .count() as u64;
        match count {
            0 => Err(too_small),
            _ => Ok(Self { documents, windows, batch_tokens, count }),
        }
    }

    /// The batches in order; each sequence is fresh, and its id is the number of its window.
    pub fn batches(&self) -> impl Iterator<Item = Result<Batch>> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let mut batch = BatchBuilder::with_capacity(self.batch_tokens);
            while next < self.count {
                let run = self.windows.run(next);
                if batch.tokens() + self.windows.tokens(run, 0) > self.batch_tokens {
                    break;
                }
                self.windows.push(run, 0, batch.len(), next, &mut batch);
                next += 1;
            }
            let slots = batch.len();
            (slots > 0).then(|| batch.finish(slots, None))
        })
    }

    /// The input bytes of each window.
    pub fn windows(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.count).map(|index| self.windows.bytes(self.windows.run(index), 0))
    }

    /// The stretches that the windows cover, the last target included: a batch predicts every byte of
    /// these but the first of each.
    pub fn spans(&self) -> Vec<Span> {
        self.windows.covered(self.count)
    }

    /// The covered text of each stretch, as [`spans`](Self::spans).
    pub fn texts(&self) -> Vec<&[u8]> {
        self.spans()
            .into_iter()
            .map(|span| &self.documents.get(span.document)[span.bytes])
            .collect()
    }

    /// Number of bytes that a whole pass predicts.
    pub fn predicted(&self) -> u64 {
        self.spans().iter().map(|span| span.len() as u64 - 1).sum()
    }
}
