//! Perplexity: how well a text is predicted, per token, byte and word.
//!
//! With ce the mean cross-entropy of the predicted tokens in nats, and a text of `tokens` tokens, `bytes` bytes and
//! `words` words: bits per byte = ce / ln 2 · tokens / bytes, word perplexity = exp(ce · tokens / words)
//! (MambaByte, arXiv 2401.13660). A document's first token, where nothing is before it, counts as a mean one.

use std::ops::ControlFlow;

use elapid_infer::Runner;
use rayon::prelude::*;

use crate::logits::Softmax;
use crate::walk::{self, Target, Walk};
use crate::{Document, Error, Options, Progress, Result};

/// How well a text was predicted.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Perplexity {
    /// Documents.
    pub documents: u64,
    /// Tokens of the text.
    pub tokens: u64,
    /// Tokens that were predicted: all that have one before them.
    pub predicted: u64,
    /// Bytes of the text.
    pub bytes: u64,
    /// Words of the text.
    pub words: u64,
    /// Mean cross-entropy of the predicted tokens, in nats.
    pub cross_entropy: f64,
    /// exp(cross-entropy).
    pub token_perplexity: f64,
    /// Bits to store a byte of the text; none if it has no bytes.
    pub bits_per_byte: Option<f64>,
    /// Perplexity per word; none if there is no word.
    pub word_perplexity: Option<f64>,
}

impl Perplexity {
    /// From the sum of the predicted tokens' cross-entropies.
    pub(crate) fn new(documents: &[Document<'_>], predicted: u64, nats: f64) -> Self {
        let sum = |f: fn(&Document<'_>) -> u64| documents.iter().map(f).sum::<u64>();
        let tokens = sum(|document| document.own() as u64);
        let (bytes, words) = (sum(|document| document.bytes), sum(|document| document.words));
        let cross_entropy = nats / predicted as f64;
        Self {
            documents: documents.len() as u64,
            tokens,
            predicted,
            bytes,
            words,
            cross_entropy,
            token_perplexity: cross_entropy.exp(),
            bits_per_byte: bits_per_byte(cross_entropy, tokens, bytes),
            word_perplexity: word_perplexity(cross_entropy, tokens, words),
        }
    }
}

/// Bits per byte of a text of `tokens` tokens and `bytes` bytes whose mean token costs `cross_entropy` nats; none if
/// it has no bytes.
pub fn bits_per_byte(cross_entropy: f64, tokens: u64, bytes: u64) -> Option<f64> {
    nats_per(cross_entropy, tokens, bytes).map(|nats| nats / std::f64::consts::LN_2)
}

/// Perplexity per word of a text of `tokens` tokens and `words` words whose mean token costs `cross_entropy` nats;
/// none if it has no word.
pub fn word_perplexity(cross_entropy: f64, tokens: u64, words: u64) -> Option<f64> {
    nats_per(cross_entropy, tokens, words).map(f64::exp)
}

fn nats_per(cross_entropy: f64, tokens: u64, count: u64) -> Option<f64> {
    (count > 0).then(|| cross_entropy * (tokens as f64 / count as f64))
}

/// Predicts every token of the documents that has one before it. `on_progress` may stop the work.
///
/// The result has the same bits on any number of threads, and those of other chunk lengths but for rounding.
///
/// # Errors
/// If an option makes no sense, a token is outside the vocabulary, nothing can be predicted, the model fails or its
/// output is not finite, or `on_progress` breaks.
pub fn perplexity(
    runner: &mut dyn Runner,
    documents: &[Document<'_>],
    options: &Options,
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Perplexity> {
    let (vocabulary, padded) = (runner.config().vocab_size, runner.config().padded_vocab_size());
    let mut walk = Walk::new(documents, options, vocabulary)?;
    let all = walk.predictions();
    let (mut nats, mut done) = (0.0, 0);
    let mut state = None;
    while let Some(call) = walk.next()? {
        state = Some(walk::run(runner, &call, state.take(), |first, logits| {
            let losses: Vec<f64> = logits
                .par_chunks_exact(padded)
                .zip(&call.targets[first..])
                .map_init(Softmax::default, |softmax, (row, target)| {
                    softmax.of(&row[..vocabulary]);
                    softmax.log_sum() - f64::from(row[target.token as usize])
                })
                .collect();
            check("cross-entropy", &losses, &call.targets[first..])?;
            nats += losses.iter().sum::<f64>();
            Ok(())
        })?);
        done += call.targets.len() as u64;
        if on_progress(Progress { done, all }).is_break() {
            return Err(Error::Interrupted);
        }
    }
    Ok(Perplexity::new(documents, done, nats))
}

/// Refuses the first value that is not finite.
pub(crate) fn check(what: &'static str, values: &[f64], targets: &[Target]) -> Result<()> {
    match values.iter().zip(targets).find(|(value, _)| !value.is_finite()) {
        None => Ok(()),
        Some((&value, &Target { document, place, .. })) => {
            Err(Error::NotFinite { what, document, place, value })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The PG19 test split, by bytes and by subwords.
    #[test]
    fn conversions_give_the_numbers_of_the_paper() {
        const WORDS: u64 = 6_965_511;
        const BYTES: u64 = 41_289_101;
        const SUBWORDS: u64 = 10_282_006;
        let by_bytes = word_perplexity(0.590_138_728_8, BYTES, WORDS).unwrap();
        assert!((by_bytes - 33.0537).abs() < 1e-4, "{by_bytes}");
        let by_subwords = word_perplexity(2.399_497_291_9, SUBWORDS, WORDS).unwrap();
        assert!((by_subwords - 34.535).abs() < 1e-3, "{by_subwords}");
        let bits = bits_per_byte(33.0f64.ln() * WORDS as f64 / BYTES as f64, BYTES, BYTES).unwrap();
        assert!((bits - 0.8510).abs() < 1e-4, "{bits}");
        assert_eq!((bits_per_byte(1.0, 3, 0), word_perplexity(1.0, 3, 0)), (None, None));
    }
}
