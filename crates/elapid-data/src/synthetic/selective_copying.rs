//! Selective copying: pick the data tokens out of noise and write them down in order.
//!
//! `noise` places of token 0 and `copied` data tokens in random places, then `copied` markers: in all
//! `noise + 2 · copied` tokens. At marker `j` the answer is data token `j`, and only the markers are
//! scored. Of a vocabulary of `V` tokens, 0 is noise, `V - 1` the marker and `1..=V - 2` are data.

use std::collections::BTreeSet;

use super::{Draws, sample_id};
use crate::batch::IGNORE;
use crate::{Batch, Error, Result};

/// Random draws of this task.
const STREAM: u64 = 0x7365_6c63;

/// The task, at one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SelectiveCopying {
    vocabulary: usize,
    noise: usize,
    copied: usize,
    seed: u64,
}

impl SelectiveCopying {
    /// Samples with `noise` noise tokens (the paper's 4096) and `copied` data tokens (16) over
    /// `vocabulary` tokens (16).
    ///
    /// # Errors
    /// A vocabulary below 3 or above 2^32, or nothing to copy.
    pub fn new(vocabulary: usize, noise: usize, copied: usize, seed: u64) -> Result<Self> {
        if vocabulary < 3 || u32::try_from(vocabulary).is_err() {
            return Err(Error::option("selective copying vocabulary", "3 to 2^32", vocabulary));
        }
        if copied == 0 {
            return Err(Error::option("selective copying data tokens", "at least 1", copied));
        }
        Ok(Self { vocabulary, noise, copied, seed })
    }

    /// Tokens of a sample: `noise + 2 · copied`.
    pub fn length(&self) -> usize {
        self.noise + 2 * self.copied
    }

    /// The marker token.
    pub fn marker(&self) -> u32 {
        (self.vocabulary - 1) as u32
    }

    /// Tokens `[length]` and answers `[copied]` of one sample.
    pub fn sample(&self, step: u64, index: usize) -> (Vec<u32>, Vec<u32>) {
        let draws = Draws::new(self.seed, STREAM, self.length(), sample_id(step, index));
        let copied = self.copied as u64;
        let data: Vec<u32> =
            (0..copied).map(|j| 1 + draws.below(j, self.vocabulary as u64 - 2) as u32).collect();
        // Floyd's sample without replacement: each of the first `noise + copied` places is as likely.
        let mut places = BTreeSet::new();
        for j in 0..copied {
            let last = self.noise as u64 + j;
            let place = draws.below(copied + j, last + 1);
            if !places.insert(place) {
                places.insert(last);
            }
        }
        let mut ids = vec![0; self.noise + self.copied];
        for (&place, &token) in places.iter().zip(&data) {
            ids[place as usize] = token;
        }
        ids.extend(std::iter::repeat_n(self.marker(), self.copied));
        (ids, data)
    }

    /// `batch_size` fresh samples.
    ///
    /// # Errors
    /// An empty batch.
    pub fn batch(&self, step: u64, batch_size: usize) -> Result<Batch> {
        let samples = (0..batch_size).map(|index| {
            let (ids, answers) = self.sample(step, index);
            let mut targets = vec![IGNORE; ids.len() - answers.len()];
            targets.extend(answers.into_iter().map(i64::from));
            (sample_id(step, index), ids, targets)
        });
        Batch::fresh(samples)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_the_data_in_order() {
        for (noise, copied) in [(0, 1), (1, 3), (40, 16), (4096, 16)] {
            let task = SelectiveCopying::new(16, noise, copied, 1).unwrap();
            for index in 0..20 {
                let (ids, answers) = task.sample(5, index);
                assert_eq!(ids.len(), task.length());
                let (body, markers) = ids.split_at(noise + copied);
                let data: Vec<u32> = body.iter().copied().filter(|&id| id != 0).collect();
                assert_eq!(data, answers);
                assert!(data.iter().all(|id| (1..15).contains(id)));
                assert!(markers.iter().all(|&id| id == 15) && markers.len() == copied);
            }
        }
    }

    #[test]
    fn batches_score_the_markers() {
        let task = SelectiveCopying::new(16, 20, 4, 0).unwrap();
        let batch = task.batch(0, 3).unwrap();
        assert_eq!((batch.tokens(), batch.predicted), (3 * 28, 12));
        for (s, sequence) in batch.sequences.iter().enumerate() {
            let targets = &batch.targets[sequence.tokens()];
            let answers: Vec<i64> = task.sample(0, s).1.into_iter().map(i64::from).collect();
            assert_eq!(targets[24..], answers);
            assert!(targets[..24].iter().all(|&target| target == IGNORE));
        }
        assert_ne!(batch, task.batch(1, 3).unwrap());
    }

    #[test]
    fn places_are_spread() {
        let task = SelectiveCopying::new(4, 6, 2, 0).unwrap();
        let mut counts = [0u32; 8];
        for index in 0..8000 {
            for (t, &id) in task.sample(0, index).0[..8].iter().enumerate() {
                counts[t] += u32::from(id != 0);
            }
        }
        assert!(counts.iter().all(|&c| (1850..2150).contains(&c)), "{counts:?}");
    }

    #[test]
    fn what_is_too_small_is_refused() {
        assert!(SelectiveCopying::new(2, 8, 2, 0).is_err());
        assert!(SelectiveCopying::new(16, 8, 0, 0).is_err());
    }
}
