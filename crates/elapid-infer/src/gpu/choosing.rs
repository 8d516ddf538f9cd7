//! How the card chooses tokens: options as it takes them, and, for batches whose sequences come and go between steps, what
//! it has of each slot's sequence. A sequence that goes on is known there; one that is new, or differs in anything that
//! its choice depends on, is written before the step.

use elapid_ops::decode_step::{Choice, MOST_CLASSES, Room, Sampling as OnCard, Slot};
use elapid_tensor::cuda::Gpu;

use crate::sampler::draw_key;
use crate::{Error, Result, Sampling};

/// The longest window of a repetition penalty that is kept on the card.
pub(super) const WINDOW: usize = 4096;
/// What a sequence wants of the card that the host may end at any token.
const ENDLESS: u64 = u64::MAX;

/// True if the card can choose among so many tokens.
pub(super) fn takes(classes: usize) -> bool {
    classes <= MOST_CLASSES
}

/// Options as the card takes them, with a penalty for the last `window` tokens.
pub(super) fn choice(sampling: &Sampling, window: usize) -> Choice {
    Choice {
        key: draw_key(sampling.seed),
        temperature: f64::from(sampling.temperature),
        top_p: f64::from(sampling.top_p),
        min_p: f64::from(sampling.min_p),
        top_k: sampling.top_k as u64,
        penalty: sampling.repetition_penalty,
        window: if sampling.repetition_penalty == 1.0 { 0 } else { window as u32 },
    }
}

/// The options after so many tokens; none where the penalty is for more tokens than are kept on the card.
fn choice_after(sampling: &Sampling, tokens: usize) -> Option<Choice> {
    let window = match sampling.repetition_window {
        0 => usize::MAX,
        window => window,
    };
    let kept = sampling.repetition_penalty == 1.0 || window.min(tokens) <= WINDOW;
    kept.then(|| choice(sampling, window.min(WINDOW)))
}

/// The sampler of a batch's slots.
pub(super) struct Choosing {
    pub(super) sampler: OnCard,
    known: Vec<Known>,
}

/// What the card has of a slot.
#[derive(Clone, Default)]
struct Known {
    sequence: Slot,
    /// The last tokens of its history, as many as its penalty is for.
    last: Vec<u32>,
}

impl Choosing {
    /// Of slots without sequences.
    pub(super) fn new(gpu: &Gpu, classes: usize, slots: usize) -> Result<Self> {
        let room = Room { classes, slots, window: WINDOW, ring: 1 };
        let sampler = OnCard::new(gpu, room, &[])?;
        Ok(Self { sampler, known: vec![Known::default(); slots] })
    }

    /// Sees to it that the next step chooses the token that follows `history` for the slot's sequence, whose state has read
    /// `position` tokens before that step; or, if it returns false, that it leaves the choice to the host.
    pub(super) fn prepare(
        &mut self,
        slot: usize,
        (id, position): (u64, u64),
        sampling: &Sampling,
        history: &[u32],
    ) -> Result<bool> {
        let Self { sampler, known } = self;
        let Known { sequence, last } = &mut known[slot];
        let Some(choice) = choice_after(sampling, history.len()) else {
            if sequence.left > 0 {
                sequence.left = 0;
                sampler.set(slot, sequence, &[])?;
            }
            return Ok(false);
        };
        let window = history.len().min(choice.window as usize);
        let tokens = &history[history.len() - window..];
        let seen = history.len() as u64;
        let wanted = Slot { id, position, seen, choice, ..*sequence };
        if sequence.left == 0 || *sequence != wanted || last != tokens {
            *sequence = Slot { produced: 0, left: ENDLESS, ..wanted };
            tokens.clone_into(last);
            sampler.set(slot, sequence, last)?;
        }
        Ok(true)
    }

    /// The token that the step before, which has ended, has chosen for a slot.
    ///
    /// # Errors
    /// [`Error::Logits`] if it could not.
    pub(super) fn take(&mut self, slot: usize) -> Result<u32> {
        let Known { sequence, last } = &mut self.known[slot];
        let sampled = self.sampler.token(slot, sequence.produced);
        sequence.position += 1;
        sequence.produced += 1;
        sequence.left -= 1;
        sequence.seen += 1;
        if sampled.broken == 1 {
            let (token, value) = (sampled.token, sampled.value);
            return Err(Error::Logits { token, position: sequence.position, value });
        }
        let window = sequence.choice.window as usize;
        if window > 0 {
            if last.len() == window {
                last.remove(0);
            }
            last.push(sampled.token);
        }
        Ok(sampled.token)
    }
}
