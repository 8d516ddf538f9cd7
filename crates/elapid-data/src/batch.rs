//! A batch: the tokens of all its sequences end to end, what each should predict, and how they divide.

use elapid_tensor::{Sequence, Sequences};

use crate::{Error, Result};

/// The target that no loss counts.
pub const IGNORE: i64 = -100;

/// One training or validation batch of `T` tokens in `S` sequences.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Input tokens `[T]`; for text, bytes.
    pub ids: Vec<u32>,
    /// The token that should follow each input `[T]`, or [`IGNORE`].
    pub targets: Vec<i64>,
    /// How the tokens divide among sequences.
    pub sequences: Sequences,
    /// Tokens that are data: `T` less the filler.
    pub real_tokens: usize,
    /// Targets that count. For bytes, the number of bytes that the batch's loss is about.
    pub predicted: usize,
}

impl Batch {
    /// Fresh sequences with their ids, tokens and targets, sequence `s` in slot `s`.
    pub(crate) fn fresh(
        sequences: impl Iterator<Item = (u64, Vec<u32>, Vec<i64>)>,
    ) -> Result<Self> {
        let mut batch = BatchBuilder::default();
        for (slot, (id, ids, targets)) in sequences.enumerate() {
            let (start, len) = (batch.ids.len(), ids.len());
            batch.sequences.push(Sequence { start, len, slot, continued: false, position: 0, id });
            batch.ids.extend(ids);
            batch.targets.extend(targets);
        }
        let slots = batch.len();
        match slots {
            0 => Err(Error::option("batch_size", "at least 1", 0)),
            _ => batch.finish(slots, None),
        }
    }

    /// Number of tokens `T`, the filler included.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }
}

/// Collects the sequences of a batch.
#[derive(Debug, Default)]
pub(crate) struct BatchBuilder {
    ids: Vec<u32>,
    targets: Vec<i64>,
    sequences: Vec<Sequence>,
}

impl BatchBuilder {
    pub(crate) fn with_capacity(tokens: usize) -> Self {
        Self {
            ids: Vec::with_capacity(tokens),
            targets: Vec::with_capacity(tokens),
            sequences: Vec::new(),
        }
    }

    pub(crate) fn tokens(&self) -> usize {
        self.ids.len()
    }

    pub(crate) fn len(&self) -> usize {
        self.sequences.len()
    }

    /// Adds one sequence of `bytes`; `next` is the byte after it, if it may be known.
    pub(crate) fn push(
        &mut self,
        bytes: &[u8],
        next: Option<u8>,
        slot: usize,
        position: u64,
        continued: bool,
        id: u64,
    ) {
        let (start, len) = (self.ids.len(), bytes.len());
        self.sequences.push(Sequence { start, len, slot, continued, position, id });
        self.ids.extend(bytes.iter().map(|&byte| u32::from(byte)));
        self.targets.extend(bytes.iter().skip(1).map(|&byte| i64::from(byte)));
        if len > 0 {
            self.targets.push(next.map_or(IGNORE, i64::from));
        }
    }

    /// Ends the batch. With `filler`, one masked sequence in slot `slots` fills it up to that many tokens.
    pub(crate) fn finish(mut self, slots: usize, filler: Option<usize>) -> Result<Batch> {
        let real_tokens = self.ids.len();
        let predicted = self.targets.iter().filter(|&&target| target != IGNORE).count();
        if let Some(capacity) = filler {
            self.sequences.push(Sequence {
                start: real_tokens,
                len: capacity.saturating_sub(real_tokens),
                slot: slots,
                continued: false,
                position: 0,
                id: u64::MAX,
            });
            self.ids.resize(capacity.max(real_tokens), 0);
            self.targets.resize(capacity.max(real_tokens), IGNORE);
        }
        let slots = slots + usize::from(filler.is_some());
        Ok(Batch {
            ids: self.ids,
            targets: self.targets,
            sequences: Sequences::new(self.sequences, slots)?,
            real_tokens,
            predicted,
        })
    }
}
