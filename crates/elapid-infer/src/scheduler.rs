//! Continuous batching: requests come and go between steps, on a fixed number of slots of one state.
//!
//! A step gives waiting requests the free slots, reads a bounded piece of the prompts and decodes one token of every
//! sequence that has read its own. A sequence keeps its slot, so the state of the others is where it was when one
//! leaves or joins. Its tokens depend on its request alone, never on who ran beside it: its prompt is cut at multiples
//! of its own chunk length, its draws are keyed by its own id and position, and a [`Runner`] computes a sequence
//! alone and in a batch with the same bits.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use elapid_models::State;
use elapid_tensor::{DType, Sequence, Sequences};

use crate::generate::{Finish, Generated, Options, Request, Timing};
use crate::text::TokenText;
use crate::{Error, Logits, NextTokens, Reading, Result, Runner, Sampler, Sampling};

/// How much runs at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that run at once; each has its own slot of the state.
    pub slots: usize,
    /// Tokens of prompts that a step reads before it decodes, so that running sequences are not kept waiting. One
    /// piece is always read, whatever its request's chunk length.
    pub prefill_tokens: usize,
    /// Requests that may wait for a slot.
    pub queue: usize,
    /// Slots that must be free before waiting prompts are read, so that one call reads several; fewer if fewer wait, none
    /// if prompts are being read anyway.
    pub together: usize,
    /// Reads all prompts that have a slot before it decodes: running sequences wait, and run in larger batches.
    pub reads_first: bool,
}

impl Default for Limits {
    fn default() -> Self {
        let (queue, together, reads_first) = (usize::MAX, 1, false);
        Self { slots: 8, prefill_tokens: 2048, queue, together, reads_first }
    }
}

impl Limits {
    /// For many requests that are to end soon on the whole, while nobody waits for the next token of any.
    pub fn throughput(runner: &dyn Runner, slots: usize) -> Self {
        let Reading { tokens, wait_for_slots_in } = runner.reading();
        let together = (slots / wait_for_slots_in.max(1)).max(1);
        let (prefill_tokens, reads_first) = (tokens, true);
        Self { slots, prefill_tokens, together, reads_first, ..Self::default() }
    }
}

/// A request under way, counted from 0 in the order of submission.
pub type Handle = u64;

/// What a step has brought.
#[derive(Debug, Clone)]
pub enum Update {
    /// A new token.
    Token {
        /// The request.
        handle: Handle,
        /// The token.
        token: u32,
        /// Text that may be shown now; often empty in the middle of a character or of a possible stop string.
        text: String,
    },
    /// A sequence has ended.
    Finished {
        /// The request.
        handle: Handle,
        /// What came of it.
        generated: Generated,
    },
    /// A sequence could not go on; the others do.
    Failed {
        /// The request.
        handle: Handle,
        /// Why.
        error: Error,
    },
}

/// Runs requests as they come. Every request that was accepted ends in one [`Update::Finished`] or
/// [`Update::Failed`].
pub struct Scheduler<R> {
    runner: R,
    limits: Limits,
    /// One slot for each of [`Limits::slots`]; none before the first request, and after a failure of the runner.
    state: Option<State>,
    waiting: VecDeque<Running>,
    batch: Batch,
    next: Handle,
    timing: Timing,
}

/// What runs, and what samples it where the runner does not; apart from the runner, whose logits and tokens it receives.
struct Batch {
    slots: Vec<Option<Running>>,
    /// Slots whose prompts are being read, the next one to read first.
    reading: VecDeque<usize>,
    sampler: Sampler,
    updates: Vec<Update>,
    padded: usize,
}

/// One request under way.
struct Running {
    handle: Handle,
    /// Keys the draws.
    id: u64,
    options: Arc<Options>,
    /// What was seen before, the prompt, and the new tokens.
    history: Vec<u32>,
    /// The next token of the history to read.
    next: usize,
    /// Where the new tokens begin.
    new: usize,
    /// Tokens that its state has seen.
    position: u64,
    /// False until something was read or a state was given.
    continued: bool,
    /// The given state, until it is in its slot.
    state: Option<State>,
    /// What the next token is sampled from, if nothing is to be read first; at the end, what the last one came from.
    logits: Option<Arc<[f32]>>,
    shown: TokenText,
    text: String,
    finish: Option<Finish>,
}

impl Running {
    /// True once the prompt has been read.
    fn decodes(&self) -> bool {
        self.finish.is_none() && self.history.len() > self.new
    }

    /// The prompt's next piece.
    fn piece(&self) -> std::ops::Range<usize> {
        self.next..self.new.min(self.next + self.options.chunk)
    }

    /// As a sequence of `len` tokens that begin at `start` in a call; counts them as read.
    fn sequence(&mut self, start: usize, len: usize, slot: usize) -> Sequence {
        let sequence = Sequence {
            start,
            len,
            slot,
            continued: self.continued,
            position: self.position,
            id: self.id,
        };
        self.next += len;
        self.position += len as u64;
        self.continued = true;
        sequence
    }

    fn finished(mut self, state: State) -> Update {
        self.text += &self.shown.finish(self.finish == Some(Finish::Stop));
        let generated = Generated {
            tokens: self.history.split_off(self.new),
            text: self.text,
            finish: self.finish.unwrap_or(Finish::Interrupted),
            state,
            logits: self.logits,
        };
        Update::Finished { handle: self.handle, generated }
    }
}

impl<R: Runner> Scheduler<R> {
    /// A scheduler without requests.
    ///
    /// # Errors
    /// If a limit is zero.
    pub fn new(runner: R, limits: Limits) -> Result<Self> {
        for (name, value) in [("slots", limits.slots), ("prefill_tokens", limits.prefill_tokens)] {
            if value == 0 {
                let found = "0".to_owned();
                return Err(Error::Option { name, expected: "at least one", found });
            }
        }
        let config = runner.config();
        let batch = Batch {
            slots: (0..limits.slots).map(|_| None).collect(),
            reading: VecDeque::new(),
            sampler: Sampler::new(&Sampling::greedy(), config.vocab_size)?,
            updates: Vec::new(),
            padded: config.padded_vocab_size(),
        };
        let (waiting, timing) = (VecDeque::new(), Timing::default());
        Ok(Self { runner, limits, state: None, waiting, batch, next: 0, timing })
    }

    /// Accepts a request; it waits for a free slot. Each request has its own options.
    ///
    /// # Errors
    /// If the queue is full, an option makes no sense, there is nothing to predict a first token from, a token is
    /// outside the vocabulary, or the state is of another model or number of slots.
    pub fn submit(&mut self, request: Request, options: &Options) -> Result<Handle> {
        if self.waiting.len() >= self.limits.queue {
            return Err(Error::QueueFull { limit: self.limits.queue });
        }
        let running = self.check(request, options)?;
        self.waiting.push_back(running);
        self.next += 1;
        Ok(self.next - 1)
    }

    fn check(&self, request: Request, options: &Options) -> Result<Running> {
        let config = self.runner.config();
        let sequence = self.next as usize;
        options.sampling.validate()?;
        let refuse = |name, expected, found| Err(Error::Option { name, expected, found });
        if options.chunk == 0 {
            return refuse("chunk", "at least one token", "0".into());
        }
        let before = [request.history.as_slice(), request.prompt.as_slice()].concat();
        let shown = TokenText::new(options, config, &before)?;
        if let Some(state) = &request.state {
            if state.slots() != 1 {
                let found = format!("{} slots", state.slots());
                return refuse("state", "one slot a sequence", found);
            }
            self.runner.check_state(state)?;
        }
        if request.prompt.is_empty() {
            let logits = match (&request.state, &request.logits) {
                (Some(_), Some(logits)) => logits,
                _ => return Err(Error::EmptyPrompt { sequence }),
            };
            if logits.len() != config.padded_vocab_size() {
                let found = format!("{} logits", logits.len());
                return refuse("logits", "one for each row of the vocabulary", found);
            }
        }
        crate::prefill::check_tokens(&self.runner, sequence, &request.prompt)?;
        Ok(Running {
            handle: self.next,
            id: request.id,
            options: Arc::new(options.clone()),
            next: request.history.len(),
            new: before.len(),
            history: before,
            position: request.state.as_ref().map_or(0, |state| state.positions[0]),
            continued: request.state.is_some(),
            state: request.state,
            logits: request.logits.filter(|_| request.prompt.is_empty()),
            shown,
            text: String::new(),
            finish: None,
        })
    }

    /// Ends a request; what it has is in the next step's updates. False if it has ended already.
    pub fn cancel(&mut self, handle: Handle) -> bool {
        let mut all = self.batch.slots.iter_mut().flatten().chain(&mut self.waiting);
        match all.find(|running| running.handle == handle) {
            Some(running) if running.finish.is_none() => {
                running.finish = Some(Finish::Interrupted);
                true
            }
            _ => false,
        }
    }

    /// True if no request is left, and none has an update to be fetched.
    pub fn is_idle(&self) -> bool {
        self.running() == 0 && self.waiting.is_empty() && self.batch.updates.is_empty()
    }

    /// Requests that wait for a slot.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Requests that have a slot.
    pub fn running(&self) -> usize {
        self.batch.slots.iter().flatten().count()
    }

    /// Where the time of all steps went.
    pub fn timing(&self) -> Timing {
        self.timing
    }

    /// Reads a piece of the prompts, and decodes a token of every sequence that has read its own.
    pub fn step(&mut self) -> Vec<Update> {
        self.harvest();
        self.admit();
        let started = Instant::now();
        let read = self.read();
        if read > 0 {
            self.timing.prefill_tokens += read;
            self.timing.prefill += started.elapsed();
        }
        self.harvest();
        let started = Instant::now();
        let decoding = !self.limits.reads_first || self.batch.reading.is_empty();
        let decoded = if decoding { self.decode() } else { 0 };
        if decoded > 0 {
            self.timing.decode_tokens += decoded;
            self.timing.decode += started.elapsed();
        }
        self.harvest();
        std::mem::take(&mut self.batch.updates)
    }

    /// Takes the finished sequences out of their slots, and the cancelled ones out of the queue.
    fn harvest(&mut self) {
        for slot in 0..self.batch.slots.len() {
            let Some(running) = self.batch.slots[slot].take_if(|own| own.finish.is_some()) else {
                continue;
            };
            self.batch.reading.retain(|&other| other != slot);
            let state = match &self.state {
                Some(state) if running.continued => {
                    // All there is needs no copy.
                    let own =
                        if state.slots() == 1 { Ok(state.clone()) } else { state.select(&[slot]) };
                    own.and_then(|own| own.cast(DType::F32)).map_err(Error::from)
                }
                // What was cancelled before its first token was read has nothing in its slot.
                _ => self.runner.fresh_state(1),
            };
            let handle = running.handle;
            self.batch.updates.push(match state {
                Ok(state) => running.finished(state),
                Err(error) => Update::Failed { handle, error },
            });
        }
        if self.waiting.iter().any(|running| running.finish.is_some()) {
            for mut running in std::mem::take(&mut self.waiting) {
                if running.finish.is_none() {
                    self.waiting.push_back(running);
                    continue;
                }
                let state = running.state.take().map_or_else(|| self.runner.fresh_state(1), Ok);
                let handle = running.handle;
                self.batch.updates.push(match state {
                    Ok(state) => running.finished(state),
                    Err(error) => Update::Failed { handle, error },
                });
            }
        }
    }

    /// Gives waiting requests the free slots, unless it is better to wait for more.
    fn admit(&mut self) {
        let free = self.batch.slots.iter().filter(|slot| slot.is_none()).count();
        let wanted = self.limits.together.min(self.limits.slots).min(self.waiting.len());
        let reads = self.waiting.front().is_some_and(|running| running.logits.is_none());
        if free < wanted && reads && self.batch.reading.is_empty() {
            return;
        }
        while let Some(slot) = self.batch.slots.iter().position(Option::is_none) {
            let Some(mut running) = self.waiting.pop_front() else {
                return;
            };
            let handle = running.handle;
            if let Err(error) = self.place(&mut running, slot) {
                self.batch.updates.push(Update::Failed { handle, error });
                continue;
            }
            // With nothing to read, the first token comes from the given logits.
            let logits = running.logits.take();
            self.batch.slots[slot] = Some(running);
            match logits {
                Some(logits) => self.batch.choose(slot, &logits),
                None => self.batch.reading.push_back(slot),
            }
        }
    }

    fn place(&mut self, running: &mut Running, slot: usize) -> Result<()> {
        if self.state.is_none() {
            self.state = Some(self.runner.fresh_state(self.limits.slots)?);
        }
        if let Some(given) = running.state.take() {
            // A prompt is read from the state as it was given, however the runner keeps that of its steps.
            let own = self.state.take().map(|state| state.cast(DType::F32)).transpose();
            let own = own.inspect_err(|error| self.batch.fail(&error.clone().into()))?;
            self.state = own;
            if let Some(own) = &mut self.state {
                own.set_slot(slot, &given)?;
            }
        }
        Ok(())
    }

    /// Reads one piece each of as many prompts as fit; returns the number of tokens.
    fn read(&mut self) -> usize {
        let (mut ids, mut sequences) = (Vec::new(), Vec::new());
        let (mut wanted, mut slots) = (Vec::new(), Vec::new());
        for _ in 0..self.batch.reading.len() {
            let Some(&slot) = self.batch.reading.front() else { break };
            let Some(running) = &mut self.batch.slots[slot] else { break };
            let piece = running.piece();
            if !ids.is_empty() && ids.len() + piece.len() > self.limits.prefill_tokens {
                break;
            }
            self.batch.reading.pop_front();
            sequences.push(running.sequence(ids.len(), piece.len(), slot));
            ids.extend_from_slice(&running.history[piece.clone()]);
            if piece.end == running.new {
                wanted.push(ids.len() - 1);
                slots.push(slot);
            } else {
                self.batch.reading.push_back(slot);
            }
        }
        if ids.is_empty() {
            return 0;
        }
        let Self { runner, batch, state, limits, .. } = self;
        let after = Sequences::new(sequences, limits.slots).map_err(Error::from).and_then(|all| {
            runner.run(&ids, &all, state.take(), &wanted, &mut |Logits { first, values }| {
                for (&slot, row) in slots[first..].iter().zip(values.chunks_exact(batch.padded)) {
                    batch.choose(slot, row);
                }
                ControlFlow::Continue(())
            })
        });
        self.go_on(after);
        ids.len()
    }

    /// Decodes a token of every sequence that has read its prompt; returns how many.
    fn decode(&mut self) -> usize {
        let (mut ids, mut sequences) = (Vec::new(), Vec::new());
        for (slot, running) in self.batch.slots.iter_mut().enumerate() {
            let Some(running) = running.as_mut().filter(|running| running.decodes()) else {
                continue;
            };
            sequences.push(running.sequence(ids.len(), 1, slot));
            ids.extend(running.history.last());
        }
        if ids.is_empty() {
            return 0;
        }
        let Self { runner, batch, state, limits, .. } = self;
        let after = Sequences::new(sequences, limits.slots)
            .map_err(Error::from)
            .and_then(|all| runner.decode(&ids, &all, state.take(), batch));
        self.go_on(after);
        ids.len()
    }

    /// Goes on from the state after a call; without one, what ran has failed.
    fn go_on(&mut self, after: Result<State>) {
        match after {
            Ok(after) => self.state = Some(after),
            Err(error) => self.batch.fail(&error),
        }
    }
}

impl NextTokens for Batch {
    fn rule(&self, slot: usize) -> (&Sampling, &[u32]) {
        match &self.slots[slot] {
            Some(running) => (&running.options.sampling, &running.history),
            None => (self.sampler.sampling(), &[]),
        }
    }

    fn choose(&mut self, slot: usize, logits: &[f32]) {
        let Some(running) = &mut self.slots[slot] else {
            return;
        };
        if running.options.max_tokens == 0 {
            running.finish = Some(Finish::Length);
            running.logits = Some(logits.into());
            return;
        }
        self.sampler.set(&running.options.sampling);
        let token = self.sampler.sample(logits, &running.history, running.id, running.position);
        self.receive(slot, token, Some(logits));
    }

    fn take(&mut self, slot: usize, token: Result<u32>) {
        self.receive(slot, token, None);
    }
}

impl Batch {
    /// Takes a slot's next token on, and the logits that it came from, if they are here.
    fn receive(&mut self, slot: usize, token: Result<u32>, logits: Option<&[f32]>) {
        let Some(running) = &mut self.slots[slot] else {
            return;
        };
        match token {
            Ok(token) => {
                let update = running.receive(token);
                if running.finish.is_some() {
                    running.logits = logits.map(Arc::from);
                }
                self.updates.push(update);
            }
            Err(error) => {
                self.updates.push(Update::Failed { handle: running.handle, error });
                self.slots[slot] = None;
                self.reading.retain(|&other| other != slot);
            }
        }
    }

    /// All that ran has lost its state.
    fn fail(&mut self, error: &Error) {
        for running in self.slots.iter_mut().filter_map(Option::take) {
            let error = error.clone();
            self.updates.push(Update::Failed { handle: running.handle, error });
        }
        self.reading.clear();
    }
}

impl Running {
    /// Turns a token into text, and decides whether the sequence ends.
    fn receive(&mut self, token: u32) -> Update {
        self.history.push(token);
        let ended = self.options.end_of_sequence.contains(&token);
        let (mut text, stopped) =
            if ended { (String::new(), false) } else { self.shown.push(token) };
        let full = self.history.len() - self.new >= self.options.max_tokens;
        // A cancelled sequence stays so.
        self.finish = self.finish.or(match (stopped, ended, full) {
            (true, ..) => Some(Finish::Stop),
            (_, true, _) => Some(Finish::EndOfSequence),
            (.., true) => Some(Finish::Length),
            _ => None,
        });
        if self.finish.is_some() {
            text += &self.shown.finish(stopped);
        }
        self.text += &text;
        Update::Token { handle: self.handle, token, text }
    }
}
