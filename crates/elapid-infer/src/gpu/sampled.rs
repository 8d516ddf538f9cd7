//! Decode steps that choose their tokens on the card: the next step reads what the last one chose, and the host reads
//! tokens when it comes to it, one or more steps behind.

use std::collections::VecDeque;

use elapid_models::State;
use elapid_ops::decode_step::{Room, Sampled, Sampling as OnCard, Slot};
use elapid_tensor::cuda::{Event, Graph};

use super::GpuEngine;
use super::choosing::{WINDOW, choice, takes};
use super::steps::columns_for;
use crate::{Error, Result, Sampling};

/// Steps under way at most.
const RING: usize = 8;

/// A sequence that goes on: its state has read all tokens of its history but the last.
#[derive(Debug, Clone, Copy)]
pub struct Start<'a> {
    /// Keys the random draws.
    pub id: u64,
    /// Prompt and new tokens so far, at least one.
    pub history: &'a [u32],
    /// Tokens wanted, at least 1.
    pub max_tokens: usize,
}

/// Sequences that are being continued, slot i of the state being sequence i's.
pub struct SampledSteps<'e, 'm> {
    engine: &'e mut GpuEngine<'m>,
    sampler: OnCard,
    columns: usize,
    sequences: Vec<Progress>,
    /// Recorded in the second step, as the first one compiles kernels.
    graph: Option<Graph>,
    warm: bool,
    pending: VecDeque<Event>,
}

/// Where a sequence stands as far as the host knows.
struct Progress {
    read: u64,
    ended: bool,
}

impl<'m> GpuEngine<'m> {
    /// True if tokens can be chosen on the card under these options; else their logits have to be read.
    pub fn can_sample(&self, sampling: &Sampling) -> bool {
        let window = sampling.repetition_window;
        takes(self.model.config().vocab_size)
            && (sampling.repetition_penalty == 1.0 || (1..=WINDOW).contains(&window))
    }

    /// Goes on with `sequences` from a state of as many slots; a token of `ends` ends a sequence, as does its number of
    /// tokens.
    ///
    /// # Errors
    /// If an option makes no sense or [`GpuEngine::can_sample`] is false, a history is empty, or there is no memory.
    pub fn sample(
        &mut self,
        state: State,
        sequences: &[Start<'_>],
        sampling: &Sampling,
        ends: &[u32],
    ) -> Result<SampledSteps<'_, 'm>> {
        sampling.validate()?;
        let slots = sequences.len();
        let refuse = |name, expected, found| Err(Error::Option { name, expected, found });
        if state.slots() != slots || slots == 0 {
            let found = format!("{} slots for {slots} sequences", state.slots());
            return refuse("state", "a slot for each sequence", found);
        }
        if !self.can_sample(sampling) {
            let found = sampling.repetition_window.to_string();
            return refuse("repetition_window", "1 to 4096 tokens on a GPU", found);
        }
        if let Some(sequence) =
            sequences.iter().position(|s| s.history.is_empty() || s.max_tokens == 0)
        {
            return Err(Error::EmptyPrompt { sequence });
        }
        let choice = choice(sampling, sampling.repetition_window);
        let columns = columns_for(slots);
        let classes = self.model.config().vocab_size;
        let room = Room { classes, slots, window: choice.window as usize, ring: RING };
        let mut sampler = OnCard::new(&self.gpu, room, ends)?;
        for (slot, sequence) in sequences.iter().enumerate() {
            let own = Slot {
                id: sequence.id,
                position: state.positions[slot],
                produced: 0,
                left: sequence.max_tokens as u64,
                seen: sequence.history.len() as u64,
                choice,
            };
            sampler.set(slot, &own, sequence.history)?;
        }
        let ids: Vec<u32> = sequences.iter().filter_map(|s| s.history.last().copied()).collect();
        let vocabulary = self.sizes.classes;
        if let Some(sequence) = ids.iter().position(|&id| id as usize >= vocabulary) {
            let place = sequences[sequence].history.len() - 1;
            return Err(Error::Token { sequence, place, token: ids[sequence], vocabulary });
        }
        let state = state.to(self.model.device())?;
        let steps = self.steps_for(state)?;
        let slots: Vec<usize> = (0..slots).collect();
        steps.set(&ids, &slots, columns)?;
        // From here on the card alone knows what its columns hold.
        steps.forget();
        let sequences = slots.iter().map(|_| Progress { read: 0, ended: false }).collect();
        let pending = VecDeque::new();
        Ok(SampledSteps {
            engine: self,
            sampler,
            columns,
            sequences,
            graph: None,
            warm: false,
            pending,
        })
    }
}

impl SampledSteps<'_, '_> {
    /// Steps whose tokens have not been taken.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// True while a sequence is known to go on.
    pub fn running(&self) -> bool {
        self.sequences.iter().any(|sequence| !sequence.ended)
    }

    /// Launches a step, which runs on while this call returns. It does nothing for sequences that have ended.
    ///
    /// # Errors
    /// If eight steps are pending, or the GPU fails.
    pub fn launch(&mut self) -> Result<()> {
        if self.pending.len() == RING {
            return Err(Error::Option {
                name: "pending",
                expected: "at most eight steps whose tokens were not taken",
                found: RING.to_string(),
            });
        }
        self.carry_out()?;
        self.pending.push_back(self.engine.gpu.event()?);
        Ok(())
    }

    /// Launches a step whose tokens nobody will take: for measurements.
    ///
    /// # Errors
    /// If the GPU fails.
    pub fn launch_unread(&mut self) -> Result<()> {
        self.carry_out()
    }

    fn carry_out(&mut self) -> Result<()> {
        let Self { engine, sampler, columns, graph, warm, .. } = self;
        let GpuEngine { gpu, steps: Some(steps), weights, .. } = &**engine else {
            return Ok(());
        };
        let run = || -> Result<()> {
            steps.launch(weights, *columns)?;
            steps.choose(sampler, *columns)
        };
        match graph {
            // SAFETY: buffers and weights are where they were for as long as this value lives.
            Some(graph) => unsafe { graph.launch()? },
            None if !*warm => {
                run()?;
                *warm = true;
            }
            None => {
                let ((), recorded) = gpu.record(run)?;
                // SAFETY: as above.
                unsafe { recorded.launch()? };
                *graph = Some(recorded);
            }
        }
        Ok(())
    }

    /// Waits for the oldest pending step: the token of each sequence that it went on with. Without a pending step, nothing.
    ///
    /// # Errors
    /// If a logit cannot be sampled from, or the GPU failed.
    pub fn take(&mut self) -> Result<Vec<(usize, Sampled)>> {
        let Some(event) = self.pending.pop_front() else { return Ok(Vec::new()) };
        event.wait()?;
        let mut tokens = Vec::new();
        for (column, sequence) in self.sequences.iter_mut().enumerate() {
            if sequence.ended {
                continue;
            }
            let sampled = self.sampler.token(column, sequence.read);
            sequence.read += 1;
            sequence.ended = sampled.ended == 1;
            if sampled.broken == 1 {
                let position = self.sampler.read()?[column].position;
                let (token, value) = (sampled.token, sampled.value);
                return Err(Error::Logits { token, position, value });
            }
            tokens.push((column, sampled));
        }
        Ok(tokens)
    }

    /// Ends a sequence from the next launch on.
    ///
    /// # Errors
    /// If the GPU fails.
    pub fn end(&mut self, sequence: usize) -> Result<()> {
        self.sequences[sequence].ended = true;
        if let Some(steps) = &mut self.engine.steps {
            steps.leave(sequence)?;
        }
        Ok(())
    }

    /// Waits for all steps: the state after them.
    ///
    /// # Errors
    /// If the GPU failed.
    pub fn finish(self) -> Result<State> {
        let positions: Vec<u64> = self.sampler.read()?.iter().map(|own| own.position).collect();
        match self.engine.steps.as_mut() {
            Some(steps) => steps.finish(positions),
            None => Ok(State::default()),
        }
    }
}
