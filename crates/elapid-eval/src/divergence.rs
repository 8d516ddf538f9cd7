//! How far a model's predictions are from another's over the same text: what quantisation costs.
//!
//! The Kullback-Leibler divergence KL(p ‖ q) = Σ p ln(p / q) of each token's distribution, p the original's.

use std::ops::ControlFlow;

use elapid_infer::Runner;
use rayon::prelude::*;

use crate::logits::{Softmax, best};
use crate::perplexity::check;
use crate::walk::{self, Walk};
use crate::{Document, Error, Options, Perplexity, Progress, Result};

/// The original's logits are held for so many values (64 MB).
const LOGITS_AT_ONCE: usize = 1 << 24;

/// How far a model is from the original.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Divergence {
    /// How well the original predicts the text.
    pub original: Perplexity,
    /// How well the other model does.
    pub other: Perplexity,
    /// Mean divergence in nats.
    pub mean: f64,
    /// Half of the predictions diverge less.
    pub median: f64,
    /// 90 % of the predictions diverge less.
    pub p90: f64,
    /// 99 % of the predictions diverge less.
    pub p99: f64,
    /// The largest divergence.
    pub max: f64,
    /// Share of the predictions whose most probable token is the same.
    pub top1_agreement: f64,
    /// Root of the mean square of the change of the probability of the token that came.
    pub rms_probability_change: f64,
}

/// What one prediction gives.
#[derive(Clone, Copy)]
struct Prediction {
    original: f64,
    other: f64,
    divergence: f64,
    agrees: bool,
}

/// Runs both models over the same text. `on_progress` may stop the work.
///
/// # Errors
/// As [`crate::perplexity`] for either; also if they have different vocabularies.
pub fn kl_divergence(
    original: &mut dyn Runner,
    other: &mut dyn Runner,
    documents: &[Document<'_>],
    options: &Options,
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Divergence> {
    let vocabulary = original.config().vocab_size;
    if vocabulary != other.config().vocab_size {
        let other = other.config().vocab_size;
        return Err(Error::Vocabularies { original: vocabulary, other });
    }
    let padded = original.config().padded_vocab_size();
    let other_padded = other.config().padded_vocab_size();
    let options =
        Options { chunk: options.chunk.min((LOGITS_AT_ONCE / padded).max(1)), ..*options };
    let mut walk = Walk::new(documents, &options, vocabulary)?;
    let all = walk.predictions();
    let mut sums = Sums::default();
    let mut logits = Vec::new();
    let (mut state, mut other_state) = (None, None);
    while let Some(call) = walk.next()? {
        logits.clear();
        state = Some(walk::run(original, &call, state.take(), |_, values| {
            logits.extend_from_slice(values);
            Ok(())
        })?);
        other_state = Some(walk::run(other, &call, other_state.take(), |first, values| {
            let targets = &call.targets[first..];
            let predictions: Vec<Prediction> = logits[first * padded..]
                .par_chunks_exact(padded)
                .zip(values.par_chunks_exact(other_padded))
                .zip(targets)
                .map_init(<(Softmax, Softmax)>::default, |(p, q), ((row, other), target)| {
                    let (row, other) = (&row[..vocabulary], &other[..vocabulary]);
                    p.of(row);
                    q.of(other);
                    let token = target.token as usize;
                    Prediction {
                        original: p.log_sum() - f64::from(row[token]),
                        other: q.log_sum() - f64::from(other[token]),
                        divergence: p.divergence(row, other, q.log_sum()),
                        agrees: best(row) == best(other),
                    }
                })
                .collect();
            let each = |f: fn(&Prediction) -> f64| predictions.iter().map(f).collect::<Vec<_>>();
            check("original's cross-entropy", &each(|p| p.original), targets)?;
            check("cross-entropy", &each(|p| p.other), targets)?;
            check("divergence", &each(|p| p.divergence), targets)?;
            sums.add(&predictions);
            Ok(())
        })?);
        let done = sums.divergences.len() as u64;
        if on_progress(Progress { done, all }).is_break() {
            return Err(Error::Interrupted);
        }
    }
    Ok(sums.finish(documents))
}

#[derive(Default)]
struct Sums {
    original: f64,
    other: f64,
    agree: u64,
    squares: f64,
    /// All of them, since percentiles are wanted: 4 bytes a token.
    divergences: Vec<f32>,
    divergence: f64,
}

impl Sums {
    fn add(&mut self, predictions: &[Prediction]) {
        for prediction in predictions {
            self.original += prediction.original;
            self.other += prediction.other;
            self.agree += u64::from(prediction.agrees);
            self.squares += ((-prediction.other).exp() - (-prediction.original).exp()).powi(2);
            self.divergences.push(prediction.divergence as f32);
            self.divergence += prediction.divergence;
        }
    }

    fn finish(mut self, documents: &[Document<'_>]) -> Divergence {
        let predicted = self.divergences.len();
        let count = predicted as f64;
        self.divergences.sort_unstable_by(f32::total_cmp);
        // The smallest value that at least that share is not above.
        let percentile = |share: f64| {
            let rank = ((share * count).ceil() as usize).clamp(1, predicted.max(1));
            self.divergences.get(rank - 1).map_or(0.0, |&value| f64::from(value))
        };
        Divergence {
            original: Perplexity::new(documents, predicted as u64, self.original),
            other: Perplexity::new(documents, predicted as u64, self.other),
            mean: self.divergence / count,
            median: percentile(0.5),
            p90: percentile(0.9),
            p99: percentile(0.99),
            max: percentile(1.0),
            top1_agreement: self.agree as f64 / count,
            rms_probability_change: (self.squares / count).sqrt(),
        }
    }
}
