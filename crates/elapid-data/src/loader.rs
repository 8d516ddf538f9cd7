//! The loader: an endless stream of batches over shuffled windows, whose place is a small value.
//!
//! Each epoch visits every window (or run of windows, when the state is carried) once, in an order that
//! only the seed and the epoch fix; epochs follow one another without a short batch between them.
//! `batch_tokens = batch_size · context` is the capacity of a batch. Windows of full length fill it with
//! `batch_size` of them; shorter ones are packed.
//!
//! With `carry_state` a batch has one sequence for each of `batch_tokens / context` slots, and a slot reads
//! the consecutive windows of one run before it takes the next run. A document that is longer than a
//! slot's fair share of the data is cut into several runs, so that one long document feeds every slot.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use crate::batch::BatchBuilder;
use crate::packing::{Packer, padding_rate};
use crate::shuffle::Permutation;
use crate::windows::{Run, Windows};
use crate::{Batch, Documents, Error, Result, Span};

/// How documents become batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoaderOptions {
    /// Longest window in tokens.
    pub context: usize,
    /// Capacity of a batch in tokens, at least `context`; `batch_size · context` for windows of equal length.
    pub batch_tokens: usize,
    /// Number of sequences that wait in the packing buffer; 1 packs in arrival order.
    pub window: usize,
    /// Carry the state from window to window of a document instead of starting each from nothing.
    pub carry_state: bool,
    /// Fill every batch up to `batch_tokens` with one masked sequence, for devices that replay fixed shapes.
    pub filler: bool,
    /// Fixes the order.
    pub seed: u64,
}

impl LoaderOptions {
    /// Batches of `batch_size` windows of `context` tokens (or as many tokens of shorter ones), states
    /// reset, no filler, a packing buffer of 128 sequences, seed 0.
    pub fn new(batch_size: usize, context: usize) -> Self {
        Self {
            context,
            batch_tokens: batch_size.saturating_mul(context),
            window: 128,
            carry_state: false,
            filler: false,
            seed: 0,
        }
    }

    fn check(&self) -> Result<()> {
        if self.context == 0 {
            return Err(Error::option("context", "at least 1", 0));
        }
        if self.batch_tokens < self.context {
            let expected = format!("at least the context, {}", self.context);
            return Err(Error::option("batch_tokens", expected, self.batch_tokens));
        }
        if self.window == 0 {
            return Err(Error::option("packing window", "at least 1", 0));
        }
        Ok(())
    }

    /// Number of carried states.
    fn slots(&self) -> usize {
        self.batch_tokens / self.context
    }
}

/// A place in the stream of batches: everything that decides the batches from there on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Batches handed out.
    pub step: u64,
    /// The epoch that is being drawn from, counted from 0; what waits to be packed is ahead of the batches.
    pub epoch: u64,
    /// Real tokens handed out.
    pub tokens: u64,
    /// Runs drawn from this epoch.
    drawn: u64,
    /// Runs that wait in the packing buffer, oldest first; with carried states, the run in each slot.
    held: Vec<Held>,
    /// Hash of the data and the options that this place belongs to.
    fingerprint: u64,
}

/// A run that was drawn and is not finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Held {
    epoch: u64,
    run: u64,
    /// Windows of it handed out.
    done: u64,
}

/// An endless, seekable stream of training batches.
#[derive(Debug, Clone)]
pub struct Loader {
    options: LoaderOptions,
    windows: Windows,
    permutation: Permutation,
    position: Position,
}

impl Loader {
    /// A loader at the beginning of the first epoch over `spans` of `documents`.
    ///
    /// # Errors
    /// An option out of range; no span with two bytes.
    pub fn new(documents: Documents, spans: Vec<Span>, options: LoaderOptions) -> Result<Self> {
        options.check()?;
        let fingerprint = fingerprint(&documents, &spans, &options);
        let bytes = spans.iter().map(|span| span.len() as u64).sum();
        let too_small = Error::TooSmall { part: "training", documents: spans.len(), bytes };
        let windows = match options.carry_state {
            true => Windows::carried(documents, spans, options.context, options.slots()),
            false => Windows::new(documents, spans, options.context),
        };
        if windows.len() == 0 {
            return Err(too_small);
        }
        let permutation = Permutation::new(options.seed, 0, windows.len());
        let position =
            Position { step: 0, epoch: 0, tokens: 0, drawn: 0, held: Vec::new(), fingerprint };
        Ok(Self { options, windows, permutation, position })
    }

    /// The options it was made with.
    pub fn options(&self) -> &LoaderOptions {
        &self.options
    }

    /// Where the next batch will be taken.
    pub fn position(&self) -> &Position {
        &self.position
    }

    /// Goes to a place that [`position`](Self::position) gave: the batches from here on are those that
    /// followed it then.
    ///
    /// # Errors
    /// The position belongs to other data or options, or contradicts itself; the loader stays where it was.
    pub fn seek(&mut self, position: &Position) -> Result<()> {
        let expected = self.position.fingerprint;
        if position.fingerprint != expected {
            return Err(Error::OtherData { expected, got: position.fingerprint });
        }
        let bad = |what: String| Err(Error::BadPosition(what));
        let runs = self.windows.len();
        if position.drawn > runs {
            return bad(format!("{} of {runs} runs drawn", position.drawn));
        }
        let most =
            if self.options.carry_state { self.options.slots() } else { self.options.window };
        if position.held.len() > most {
            return bad(format!("{} runs held, at most {most} can be", position.held.len()));
        }
        for held in &position.held {
            if held.run >= runs || held.done > self.windows.run(held.run).windows {
                return bad(format!("window {} of run {} of {runs}", held.done, held.run));
            }
        }
        self.position = position.clone();
        self.permutation = Permutation::new(self.options.seed, position.epoch, runs);
        Ok(())
    }

    /// Tokens of one epoch.
    pub fn epoch_tokens(&self) -> u64 {
        self.windows.total_tokens()
    }

    /// Epochs handed out, with their fraction.
    pub fn epochs(&self) -> f64 {
        self.position.tokens as f64 / self.epoch_tokens() as f64
    }

    /// Share of the capacity of all batches so far that held no data.
    pub fn padding_rate(&self) -> f64 {
        padding_rate(self.position.tokens, self.position.step, self.options.batch_tokens)
    }

    /// The next batch.
    ///
    /// # Errors
    /// Only if a batch contradicts itself, which it does not.
    pub fn next_batch(&mut self) -> Result<Batch> {
        let batch = if self.options.carry_state { self.carried() } else { self.packed() }?;
        self.position.step += 1;
        self.position.tokens += batch.real_tokens as u64;
        Ok(batch)
    }

    fn packed(&mut self) -> Result<Batch> {
        let Self { options, windows, permutation, position } = self;
        let mut held = std::mem::take(&mut position.held);
        let mut packer = Packer::new(options.batch_tokens, options.window);
        let sized = |held: Held| (held, windows.tokens(windows.run(held.run), 0));
        packer.restore(held.drain(..).map(sized).collect());
        let pack =
            packer.next_pack(|| Some(sized(draw(position, permutation, options.seed, windows))));
        position.held = packer.buffer().iter().map(|&(held, _)| held).collect();
        let mut batch = BatchBuilder::with_capacity(options.batch_tokens);
        for (slot, (held, _)) in pack.into_iter().flatten().enumerate() {
            windows.push(windows.run(held.run), 0, slot, id(windows, held), &mut batch);
        }
        let slots = batch.len();
        batch.finish(slots, options.filler.then_some(options.batch_tokens))
    }

    fn carried(&mut self) -> Result<Batch> {
        let Self { options, windows, permutation, position } = self;
        let mut held = std::mem::take(&mut position.held);
        let mut batch = BatchBuilder::with_capacity(options.batch_tokens);
        for slot in 0..options.slots() {
            let current = held.get(slot).map(|&held| (held, windows.run(held.run)));
            let (mut now, run): (Held, Run) = match current {
                Some((now, run)) if now.done < run.windows => (now, run),
                _ => {
                    let now = draw(position, permutation, options.seed, windows);
                    (now, windows.run(now.run))
                }
            };
            windows.push(run, now.done, slot, id(windows, now), &mut batch);
            now.done += 1;
            match held.get_mut(slot) {
                Some(held) => *held = now,
                None => held.push(now),
            }
        }
        position.held = held;
        batch.finish(options.slots(), options.filler.then_some(options.batch_tokens))
    }
}

/// The next run of the epoch's order, or the first of the next epoch's.
fn draw(
    position: &mut Position,
    permutation: &mut Permutation,
    seed: u64,
    windows: &Windows,
) -> Held {
    if position.drawn == windows.len() {
        position.epoch += 1;
        position.drawn = 0;
        *permutation = Permutation::new(seed, position.epoch, windows.len());
    }
    let run = permutation.get(position.drawn);
    position.drawn += 1;
    Held { epoch: position.epoch, run, done: 0 }
}

/// Key of a sequence's random draws: another one for every run and epoch.
fn id(windows: &Windows, held: Held) -> u64 {
    held.epoch.wrapping_mul(windows.len()).wrapping_add(held.run)
}

fn fingerprint(documents: &Documents, spans: &[Span], options: &LoaderOptions) -> u64 {
    let mut hash = Xxh3::new();
    let mut add = |value: u64| hash.update(&value.to_le_bytes());
    for span in spans {
        add(documents.hash(span.document));
        add(span.bytes.start as u64);
        add(span.bytes.end as u64);
    }
    add(options.context as u64);
    add(options.batch_tokens as u64);
    add(options.window as u64);
    add(u64::from(options.carry_state));
    add(options.seed);
    hash.digest()
}
