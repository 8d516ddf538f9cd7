//! `Sequences`: how the tokens of a ragged batch are divided among sequences.
//!
//! A batch is `[T, channels]`: the tokens of all sequences end to end, without padding. `Sequences` says
//! where each sequence starts, which slot of the recurrent state `[slots, ...]` is its own, whether it
//! starts fresh (its slot is ignored: a select, not a multiply) or continues from the state in that slot,
//! at which position of its document it starts, and which id keys its random draws. Packed training
//! (PackMamba, arXiv 2408.03865), unequal prompts, chunked prefill and one-token decode are all this one type.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::{Device, Error, Result};

/// One sequence of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sequence {
    /// First token of the sequence in the batch, `0..=T`.
    pub start: usize,
    /// Number of tokens; 0 is allowed and leaves the state as it is.
    pub len: usize,
    /// Row of the state `[slots, ...]` that this sequence reads (if continued) and writes.
    pub slot: usize,
    /// True if the sequence goes on from the state in `slot`; false if it starts from nothing.
    pub continued: bool,
    /// Position of the first token in its document.
    pub position: u64,
    /// Key of the sequence's random draws, independent of its place in the batch.
    pub id: u64,
}

impl Sequence {
    /// The tokens of the sequence, as a range over `0..T`.
    pub fn tokens(&self) -> Range<usize> {
        self.start..self.start + self.len
    }
}

/// The division of `T` tokens into sequences, cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequences {
    inner: Arc<Inner>,
}

struct Inner {
    sequences: Vec<Sequence>,
    tokens: usize,
    slots: usize,
    kept: Mutex<HashMap<(TypeId, KeptKey), Arc<dyn Any + Send + Sync>>>,
}

/// Tells apart what is kept of one type with a division: a device, and up to four sizes.
pub type KeptKey = (Device, [usize; 4]);

impl PartialEq for Inner {
    fn eq(&self, other: &Self) -> bool {
        (&self.sequences, self.tokens, self.slots) == (&other.sequences, other.tokens, other.slots)
    }
}
impl Eq for Inner {}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tokens, {} slots: {:?}", self.tokens, self.slots, self.sequences)
    }
}

impl Sequences {
    /// Fresh sequences of the given lengths, sequence `s` in slot `s` with id `s`.
    pub fn fresh(lengths: &[usize]) -> Self {
        let mut start = 0;
        let sequences = lengths
            .iter()
            .enumerate()
            .map(|(s, &len)| {
                let sequence =
                    Sequence { start, len, slot: s, continued: false, position: 0, id: s as u64 };
                start += len;
                sequence
            })
            .collect();
        Self::made(sequences, start, lengths.len())
    }

    fn made(sequences: Vec<Sequence>, tokens: usize, slots: usize) -> Self {
        Self { inner: Arc::new(Inner { sequences, tokens, slots, kept: Mutex::default() }) }
    }

    /// `count` fresh sequences of `len` tokens each.
    pub fn uniform(count: usize, len: usize) -> Self {
        Self::fresh(&vec![len; count])
    }

    /// Sequences that all continue from their state: sequence `s` in slot `s` at position `positions[s]`.
    pub fn continued(lengths: &[usize], positions: &[u64]) -> Result<Self> {
        if lengths.len() != positions.len() {
            return Err(Error::Sequences(format!(
                "{} lengths but {} positions",
                lengths.len(),
                positions.len()
            )));
        }
        let mut start = 0;
        let sequences = lengths
            .iter()
            .zip(positions)
            .enumerate()
            .map(|(s, (&len, &position))| {
                let sequence =
                    Sequence { start, len, slot: s, continued: true, position, id: s as u64 };
                start += len;
                sequence
            })
            .collect();
        Ok(Self::made(sequences, start, lengths.len()))
    }

    /// Arbitrary sequences over a state of `slots` rows.
    ///
    /// # Errors
    /// If they do not lie end to end from token 0, a slot is out of range, or two sequences share a slot.
    pub fn new(sequences: Vec<Sequence>, slots: usize) -> Result<Self> {
        let mut end = 0;
        let mut used = vec![false; slots];
        for (s, sequence) in sequences.iter().enumerate() {
            if sequence.start != end {
                return Err(Error::Sequences(format!(
                    "sequence {s} starts at token {}, expected {end}",
                    sequence.start
                )));
            }
            match used.get_mut(sequence.slot) {
                None => {
                    return Err(Error::Sequences(format!(
                        "sequence {s} uses slot {} of {slots}",
                        sequence.slot
                    )));
                }
                Some(taken) if *taken => {
                    return Err(Error::Sequences(format!(
                        "sequence {s} uses slot {} which another sequence has",
                        sequence.slot
                    )));
                }
                Some(taken) => *taken = true,
            }
            end += sequence.len;
        }
        Ok(Self::made(sequences, end, slots))
    }

    /// Fresh sequences from cumulative lengths `[0, l_1, l_1 + l_2, .., T]`.
    pub fn from_cu_seqlens(cu_seqlens: &[usize]) -> Result<Self> {
        match cu_seqlens.first() {
            Some(0) => {}
            first => {
                return Err(Error::Sequences(format!(
                    "cu_seqlens starts with {first:?}, expected 0"
                )));
            }
        }
        let mut lengths = Vec::with_capacity(cu_seqlens.len() - 1);
        for pair in cu_seqlens.windows(2) {
            lengths.push(pair[1].checked_sub(pair[0]).ok_or_else(|| {
                Error::Sequences(format!("cu_seqlens falls from {} to {}", pair[0], pair[1]))
            })?);
        }
        Ok(Self::fresh(&lengths))
    }

    /// Fresh sequences from one position per token, which restarts at 0 with every sequence (PackMamba).
    pub fn from_positions(positions: &[u32]) -> Result<Self> {
        let mut lengths = Vec::new();
        for (t, &position) in positions.iter().enumerate() {
            if position == 0 {
                lengths.push(1usize);
                continue;
            }
            match lengths.last_mut() {
                Some(len) if *len == position as usize => *len += 1,
                _ => {
                    return Err(Error::Sequences(format!(
                        "position {position} at token {t} neither restarts at 0 nor follows the one before it"
                    )));
                }
            }
        }
        Ok(Self::fresh(&lengths))
    }

    /// Fresh sequences from one sequence index per token: a new sequence begins where the index changes.
    pub fn from_seq_idx(seq_idx: &[u32]) -> Self {
        let lengths: Vec<usize> = seq_idx.chunk_by(|a, b| a == b).map(<[u32]>::len).collect();
        Self::fresh(&lengths)
    }

    /// Cumulative lengths, `S + 1` values.
    pub fn cu_seqlens(&self) -> Vec<usize> {
        std::iter::once(0).chain(self.iter().map(|s| s.start + s.len)).collect()
    }

    /// Position of every token in its sequence, counted from 0, `T` values.
    pub fn positions(&self) -> Vec<u32> {
        self.iter().flat_map(|s| 0..s.len as u32).collect()
    }

    /// Index of every token's sequence, `T` values.
    pub fn seq_idx(&self) -> Vec<u32> {
        self.iter().enumerate().flat_map(|(i, s)| std::iter::repeat_n(i as u32, s.len)).collect()
    }

    /// Number of sequences `S`.
    pub fn len(&self) -> usize {
        self.inner.sequences.len()
    }

    /// True if there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.inner.sequences.is_empty()
    }

    /// Number of tokens `T`.
    pub fn tokens(&self) -> usize {
        self.inner.tokens
    }

    /// Number of rows of the recurrent state.
    pub fn slots(&self) -> usize {
        self.inner.slots
    }

    /// The sequences in batch order.
    pub fn as_slice(&self) -> &[Sequence] {
        &self.inner.sequences
    }

    /// The sequences in batch order.
    pub fn iter(&self) -> std::slice::Iter<'_, Sequence> {
        self.inner.sequences.iter()
    }

    /// What an operation derives from a division and every layer wants again, such as tables in the memory of a GPU:
    /// made on the first call, kept as long as the division.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn kept<T: Any + Send + Sync>(
        &self,
        key: KeptKey,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<Arc<T>> {
        let mut kept = self.inner.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (TypeId::of::<T>(), key);
        if let Some(found) = kept.get(&key)
            && let Ok(found) = found.clone().downcast::<T>()
        {
            return Ok(found);
        }
        let made = Arc::new(make()?);
        kept.insert(key, made.clone());
        Ok(made)
    }

    /// True if the other division has the same starts, lengths and slots, and continues the same sequences: then
    /// launches for the one are right for the other.
    pub fn same_layout(&self, other: &Self) -> bool {
        let layout = |s: &Sequence| (s.start, s.len, s.slot, s.continued);
        self.slots() == other.slots() && self.iter().map(layout).eq(other.iter().map(layout))
    }

    /// True if any sequence reads its slot of the incoming state.
    pub fn any_continued(&self) -> bool {
        self.iter().any(|s| s.continued)
    }
}

impl<'a> IntoIterator for &'a Sequences {
    type Item = &'a Sequence;
    type IntoIter = std::slice::Iter<'a, Sequence>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn descriptions_round_trip(lengths in prop::collection::vec(1usize..9, 0..12)) {
            let sequences = Sequences::fresh(&lengths);
            prop_assert_eq!(&Sequences::from_cu_seqlens(&sequences.cu_seqlens()).unwrap(), &sequences);
            prop_assert_eq!(&Sequences::from_positions(&sequences.positions()).unwrap(), &sequences);
            prop_assert_eq!(&Sequences::from_seq_idx(&sequences.seq_idx()), &sequences);
        }
    }

    #[test]
    fn packmamba_b1_example() {
        let sequences = Sequences::fresh(&[3, 5, 6, 2]);
        assert_eq!(sequences.cu_seqlens(), [0, 3, 8, 14, 16]);
        assert_eq!(sequences.positions(), [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 1]);
        assert_eq!(sequences.seq_idx(), [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3]);
    }

    #[test]
    fn invalid_descriptions_are_refused() {
        assert!(Sequences::from_positions(&[0, 1, 3]).is_err());
        assert!(Sequences::from_positions(&[1]).is_err());
        assert!(Sequences::from_cu_seqlens(&[0, 4, 3]).is_err());
        assert!(Sequences::from_cu_seqlens(&[1, 4]).is_err());
        assert!(Sequences::from_cu_seqlens(&[]).is_err());
        let one = Sequence { start: 0, len: 2, slot: 0, continued: false, position: 0, id: 0 };
        assert!(Sequences::new(vec![one, Sequence { start: 2, ..one }], 2).is_err(), "shared slot");
        assert!(Sequences::new(vec![Sequence { slot: 3, ..one }], 2).is_err(), "slot out of range");
        assert!(
            Sequences::new(vec![Sequence { start: 1, ..one }], 1).is_err(),
            "gap before the first"
        );
    }
}
