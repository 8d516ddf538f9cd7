//! Windows: documents cut to the length that a model reads at once.
//!
//! A span becomes consecutive windows of `context` bytes, the last one shorter. Byte `t` predicts byte
//! `t + 1` of the span, also across the end of a window, so every byte but a span's first is a target
//! exactly once. A last window of a single byte would predict nothing and is left out. Windows are counted
//! and not stored: a corpus of any size costs one number a span.
//!
//! Consecutive windows of one span form *runs*: of one window each when every window starts from a fresh
//! state, longer when the state is carried from window to window.

use std::ops::Range;

use crate::batch::BatchBuilder;
use crate::{Documents, Span};

/// A run of consecutive windows of one span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    span: usize,
    first: u64,
    /// Number of windows, at least 1.
    pub(crate) windows: u64,
}

/// The runs of a list of spans, in order.
#[derive(Debug, Clone)]
pub(crate) struct Windows {
    documents: Documents,
    spans: Vec<Span>,
    context: usize,
    run: u64,
    /// Number of runs before each span, and of all.
    before: Vec<u64>,
}

/// Number of windows with at least one target in a span of `len` bytes.
fn windows_in(len: usize, context: usize) -> u64 {
    (len.saturating_sub(1) as u64).div_ceil(context as u64)
}

impl Windows {
    /// Windows of up to `context` bytes (at least 1), each its own run.
    pub(crate) fn new(documents: Documents, spans: Vec<Span>, context: usize) -> Self {
        Self::with_runs(documents, spans, context, |_| 1)
    }

    /// Runs for `slots` states that are carried side by side: as long as the spans are, but never so
    /// long that a slot would have nothing to read.
    pub(crate) fn carried(
        documents: Documents,
        spans: Vec<Span>,
        context: usize,
        slots: usize,
    ) -> Self {
        Self::with_runs(documents, spans, context, |windows| windows.div_ceil(slots as u64).max(1))
    }

    fn with_runs(
        documents: Documents,
        spans: Vec<Span>,
        context: usize,
        run: impl Fn(u64) -> u64,
    ) -> Self {
        let counts = spans.iter().map(|span| windows_in(span.len(), context));
        let run = run(counts.clone().sum());
        let mut total = 0;
        let mut before = vec![0];
        before.extend(counts.map(|windows| {
            total += windows.div_ceil(run);
            total
        }));
        Self { documents, spans, context, run, before }
    }

    /// Number of runs.
    pub(crate) fn len(&self) -> u64 {
        self.before.last().copied().unwrap_or(0)
    }

    /// Tokens of all windows.
    pub(crate) fn total_tokens(&self) -> u64 {
        let tokens = |span: &Span| {
            (windows_in(span.len(), self.context) * self.context as u64).min(span.len() as u64)
        };
        self.spans.iter().map(tokens).sum()
    }

    /// Run `index`, which must be below the number of runs.
    pub(crate) fn run(&self, index: u64) -> Run {
        let span = self.before.partition_point(|&before| before <= index) - 1;
        let first = (index - self.before[span]) * self.run;
        let windows = windows_in(self.spans[span].len(), self.context) - first;
        Run { span, first, windows: windows.min(self.run) }
    }

    /// The bytes of one window, as a range of its span.
    fn range(&self, run: Run, window: u64) -> Range<usize> {
        let start = (run.first + window) as usize * self.context;
        start..(start + self.context).min(self.spans[run.span].len())
    }

    /// Tokens of window `window` of a run.
    pub(crate) fn tokens(&self, run: Run, window: u64) -> usize {
        self.range(run, window).len()
    }

    /// The bytes of window `window` of a run.
    pub(crate) fn bytes(&self, run: Run, window: u64) -> &[u8] {
        &self.spans[run.span].of(&self.documents)[self.range(run, window)]
    }

    /// The stretches of which the first `runs` runs read or predict every byte, one a span.
    pub(crate) fn covered(&self, runs: u64) -> Vec<Span> {
        let mut covered: Vec<Span> = Vec::new();
        for (at, span) in self.spans.iter().enumerate() {
            let count = runs.min(self.before[at + 1]).saturating_sub(self.before[at]);
            if count == 0 {
                continue;
            }
            let end = span.bytes.start + (count * self.run) as usize * self.context + 1;
            let bytes = span.bytes.start..end.min(span.bytes.end);
            covered.push(Span { document: span.document, bytes });
        }
        covered
    }

    /// Writes window `window` of a run to the batch, as a sequence that goes on from the state in its
    /// slot if it is not the run's first.
    pub(crate) fn push(
        &self,
        run: Run,
        window: u64,
        slot: usize,
        id: u64,
        batch: &mut BatchBuilder,
    ) {
        let range = self.range(run, window);
        let span = self.spans[run.span].of(&self.documents);
        let next = span.get(range.end).copied();
        batch.push(&span[range], next, slot, window * self.context as u64, window > 0, id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_but_the_first_is_a_target_once() {
        for context in [1, 2, 3, 7] {
            for slots in [1, 2, 5] {
                let lengths = [1usize, 2, 3, 7, 8, 15, 22, 0];
                let documents = Documents::from_memory(lengths.map(|n| (0..n as u8).collect()));
                let spans = crate::Split::whole(&documents);
                let mut seen: Vec<Vec<u8>> = documents.iter().map(|d| vec![0; d.len()]).collect();
                let windows = Windows::carried(documents.clone(), spans, context, slots);
                for index in 0..windows.len() {
                    let run = windows.run(index);
                    for window in 0..run.windows {
                        let range = windows.range(run, window);
                        assert!(!range.is_empty() && range.len() <= context);
                        let mut targets = 0;
                        for t in range.start + 1..=range.end {
                            if let Some(count) = seen[run.span].get_mut(t) {
                                *count += 1;
                                targets += 1;
                            }
                        }
                        assert!(targets > 0);
                    }
                }
                for document in &seen {
                    assert_eq!(document[0], 0);
                    assert!(document[1..].iter().all(|&c| c == 1), "{context} {slots} {seen:?}");
                }
            }
        }
    }

    #[test]
    fn one_long_document_gives_every_slot_a_run() {
        let documents = Documents::from_memory([vec![0; 8001]]);
        let spans = crate::Split::whole(&documents);
        let windows = Windows::carried(documents, spans, 100, 8);
        assert_eq!(windows.len(), 8);
        assert!((0..8).all(|index| windows.run(index).windows == 10));
    }
}
