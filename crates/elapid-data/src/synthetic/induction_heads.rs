//! Induction heads: recall what followed a token the one time it was seen.
//!
//! A sample of `length` tokens is `length - 1` ordinary tokens and a final prefix token. One earlier
//! place holds the prefix too; the answer is the token after it, and only the last position is scored.
//! Of a vocabulary of `V` tokens, `V - 2` are ordinary, `V - 2` is the prefix and `V - 1` is unused.
//! Chance is `1 / (V - 2)`: 7.1 % for the paper's 16.

use super::{Draws, sample_id};
use crate::batch::IGNORE;
use crate::{Batch, Error, Result};

/// Random draws of this task.
const STREAM: u64 = 0x696e_6475;
/// The draw that places the prefix; the tokens use those from 0.
const PLACE: u64 = u64::MAX;

/// The task, at one length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InductionHeads {
    vocabulary: usize,
    length: usize,
    seed: u64,
}

impl InductionHeads {
    /// Samples of `length` tokens (the paper trains at 256) over `vocabulary` tokens (the paper's is 16).
    /// Another seed gives another set of samples, as validation needs.
    ///
    /// # Errors
    /// A length below 4 or a vocabulary below 4 or above 2^32.
    pub fn new(vocabulary: usize, length: usize, seed: u64) -> Result<Self> {
        if length < 4 {
            return Err(Error::option("induction heads length", "at least 4", length));
        }
        if vocabulary < 4 || u32::try_from(vocabulary).is_err() {
            return Err(Error::option("induction heads vocabulary", "4 to 2^32", vocabulary));
        }
        Ok(Self { vocabulary, length, seed })
    }

    /// The prefix token.
    pub fn prefix(&self) -> u32 {
        (self.vocabulary - 2) as u32
    }

    /// Tokens `[length]` and answer of one sample.
    pub fn sample(&self, step: u64, index: usize) -> (Vec<u32>, u32) {
        let draws = Draws::new(self.seed, STREAM, self.length, sample_id(step, index));
        let ordinary = self.length - 1;
        let mut ids: Vec<u32> = (0..ordinary as u64)
            .map(|t| draws.below(t, self.vocabulary as u64 - 2) as u32)
            .collect();
        let place = draws.below(PLACE, ordinary as u64 - 2) as usize;
        ids[place] = self.prefix();
        ids.push(self.prefix());
        let answer = ids[place + 1];
        (ids, answer)
    }

    /// `batch_size` fresh samples.
    ///
    /// # Errors
    /// An empty batch.
    pub fn batch(&self, step: u64, batch_size: usize) -> Result<Batch> {
        let samples = (0..batch_size).map(|index| {
            let (ids, answer) = self.sample(step, index);
            let mut targets = vec![IGNORE; ids.len()];
            targets[ids.len() - 1] = i64::from(answer);
            (sample_id(step, index), ids, targets)
        });
        Batch::fresh(samples)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_follows_the_only_earlier_prefix() {
        for length in [4, 5, 6, 64, 256, 4096] {
            let task = InductionHeads::new(16, length, 3).unwrap();
            for index in 0..50 {
                let (ids, answer) = task.sample(9, index);
                assert_eq!(ids.len(), length);
                let places: Vec<usize> = (0..length).filter(|&t| ids[t] == task.prefix()).collect();
                assert_eq!(places.len(), 2);
                assert_eq!(places[1], length - 1);
                assert_eq!(ids[places[0] + 1], answer);
                assert!(answer < 14);
                assert!(ids.iter().all(|&id| id < 15));
            }
        }
    }

    #[test]
    fn batches_score_the_last_position_of_each_sample() {
        let task = InductionHeads::new(16, 32, 0).unwrap();
        let batch = task.batch(2, 8).unwrap();
        assert_eq!((batch.tokens(), batch.real_tokens, batch.predicted), (256, 256, 8));
        assert_eq!(batch.sequences.len(), 8);
        for (s, sequence) in batch.sequences.iter().enumerate() {
            let (ids, answer) = task.sample(2, s);
            assert_eq!(batch.ids[sequence.tokens()], ids);
            let targets = &batch.targets[sequence.tokens()];
            assert_eq!(targets[31], i64::from(answer));
            assert!(targets[..31].iter().all(|&target| target == IGNORE));
            assert!(!sequence.continued);
        }
        assert_eq!(batch, task.batch(2, 8).unwrap());
        assert_ne!(batch, task.batch(3, 8).unwrap());
        assert_ne!(batch, InductionHeads::new(16, 32, 1).unwrap().batch(2, 8).unwrap());
    }

    #[test]
    fn places_and_answers_are_spread() {
        let task = InductionHeads::new(16, 16, 0).unwrap();
        let (mut places, mut answers) = ([0u32; 16], [0u32; 14]);
        for index in 0..13_000 {
            let (ids, answer) = task.sample(0, index);
            places[ids.iter().position(|&id| id == task.prefix()).unwrap()] += 1;
            answers[answer as usize] += 1;
        }
        assert!(places[..13].iter().all(|&c| (850..1150).contains(&c)), "{places:?}");
        assert_eq!(places[13..], [0; 3]);
        assert!(answers.iter().all(|&c| (800..1060).contains(&c)), "{answers:?}");
    }

    #[test]
    fn what_is_too_small_is_refused() {
        assert!(InductionHeads::new(16, 3, 0).is_err());
        assert!(InductionHeads::new(3, 16, 0).is_err());
        assert!(InductionHeads::new(16, 16, 0).unwrap().batch(0, 0).is_err());
    }
}
