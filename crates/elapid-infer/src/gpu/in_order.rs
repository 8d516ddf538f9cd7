//! Logits of a call's decode steps and of its prompts, which are made apart, given out in the order of the tokens.

use std::collections::VecDeque;
use std::ops::ControlFlow;

use crate::{Logits, Receiver};

/// What takes a call's logits, and those that wait for their turn.
pub(super) struct InOrder<'a, 'r> {
    vocabulary: usize,
    /// Places among the wanted tokens, ascending, and their logits.
    waiting: VecDeque<(usize, &'a [f32])>,
    receive: &'a mut Receiver<'r>,
    over: bool,
}

impl<'a, 'r> InOrder<'a, 'r> {
    /// `made` are logits that are there already, by their places among the wanted tokens, ascending.
    pub(super) fn new(
        vocabulary: usize,
        made: VecDeque<(usize, &'a [f32])>,
        receive: &'a mut Receiver<'r>,
    ) -> Self {
        Self { vocabulary, waiting: made, receive, over: false }
    }

    /// Rows of logits for the first of `places`, after all that come before them.
    pub(super) fn pass(&mut self, places: &[usize], values: &[f32]) -> ControlFlow<()> {
        let mut rows = values;
        let count = values.len() / self.vocabulary;
        for run in places[..count].chunk_by(|a, b| a + 1 == *b) {
            let (own, rest) = rows.split_at(run.len() * self.vocabulary);
            rows = rest;
            self.give_before(run[0]);
            self.give(run[0], own);
        }
        if self.over { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// Gives what is left.
    pub(super) fn finish(mut self) {
        self.give_before(usize::MAX);
    }

    fn give_before(&mut self, place: usize) {
        while let Some(&(first, values)) = self.waiting.front().filter(|(first, _)| *first < place)
        {
            self.waiting.pop_front();
            self.give(first, values);
        }
    }

    fn give(&mut self, first: usize, values: &[f32]) {
        self.over = self.over || (self.receive)(Logits { first, values }).is_break();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_in_order_and_stop_when_no_more_are_wanted() {
        for most in [usize::MAX, 3] {
            let mut seen = Vec::new();
            let mut receive = |Logits { first, values }: Logits<'_>| {
                seen.extend(values.chunks(2).zip(first..).map(|(row, place)| (place, row[0])));
                if seen.len() < most { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            };
            let made: [(usize, &[f32]); 3] = [(0, &[0.0; 2]), (3, &[3.0; 2]), (6, &[6.0; 2])];
            let mut out = InOrder::new(2, made.into(), &mut receive);
            let places = [1, 2, 4, 5];
            let first = out.pass(&places, &[1.0, 1.0, 2.0, 2.0, 4.0, 4.0]);
            assert_eq!(first.is_break(), most == 3);
            if first.is_continue() {
                assert!(out.pass(&places[3..], &[5.0, 5.0]).is_continue());
            }
            out.finish();
            let count = if most == 3 { 3u8 } else { 7 };
            let all: Vec<(usize, f32)> = (0..count).map(|i| (i.into(), i.into())).collect();
            assert_eq!(seen, all);
        }
    }
}
