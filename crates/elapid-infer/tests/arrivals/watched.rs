//! A runner that notes what it is asked for.

use elapid_infer::{NextTokens, Reading, Receiver, Result, Runner, Sampling};
use elapid_models::{MambaConfig, State};
use elapid_tensor::Sequences;

/// Another runner, the lengths of the sequences of each call that reads, and who chose how many tokens of its decode steps.
pub struct Watched<R> {
    runner: R,
    pub read: Vec<Vec<usize>>,
    pub by_host: usize,
    pub by_runner: usize,
}

impl<R> Watched<R> {
    pub fn new(runner: R) -> Self {
        Self { runner, read: Vec::new(), by_host: 0, by_runner: 0 }
    }
}

struct Counted<'a> {
    next: &'a mut dyn NextTokens,
    by_host: usize,
    by_runner: usize,
}

impl NextTokens for Counted<'_> {
    fn rule(&self, slot: usize) -> (&Sampling, &[u32]) {
        self.next.rule(slot)
    }

    fn choose(&mut self, slot: usize, logits: &[f32]) {
        self.by_host += 1;
        self.next.choose(slot, logits);
    }

    fn take(&mut self, slot: usize, token: Result<u32>) {
        self.by_runner += 1;
        self.next.take(slot, token);
    }
}

impl<R: Runner> Runner for Watched<R> {
    fn config(&self) -> &MambaConfig {
        self.runner.config()
    }

    fn fresh_state(&self, slots: usize) -> Result<State> {
        self.runner.fresh_state(slots)
    }

    fn check_state(&self, state: &State) -> Result<()> {
        self.runner.check_state(state)
    }

    fn reading(&self) -> Reading {
        self.runner.reading()
    }

    fn run(
        &mut self,
        ids: &[u32],
        sequences: &Sequences,
        state: Option<State>,
        wanted: &[usize],
        receive: &mut Receiver<'_>,
    ) -> Result<State> {
        self.read.push(sequences.into_iter().map(|sequence| sequence.len).collect());
        self.runner.run(ids, sequences, state, wanted, receive)
    }

    fn decode(
        &mut self,
        ids: &[u32],
        sequences: &Sequences,
        state: Option<State>,
        next: &mut dyn NextTokens,
    ) -> Result<State> {
        let mut counted = Counted { next, by_host: 0, by_runner: 0 };
        let after = self.runner.decode(ids, sequences, state, &mut counted);
        self.by_host += counted.by_host;
        self.by_runner += counted.by_runner;
        after
    }
}
