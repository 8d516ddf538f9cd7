//! Choosing the next token from logits: temperature, top-k, top-p, min-p, repetition penalty.
//!
//! The filters apply in the order that Hugging Face's generation has: repetition penalty on the logits,
//! temperature, top-k, top-p on what top-k left, min-p. Each looks at probabilities (the original Mamba code
//! compares raw logits with min-p; this one does not). Padding rows of the vocabulary take no part. The
//! random draw is a function of (seed, sequence id, position) alone, so the same sequence gets the same
//! tokens in any batch.

use std::cmp::Ordering;

use elapid_tensor::rng::{draw, unit_f64};

use crate::{Error, Result};

/// Keeps the draws of sampling apart from those of initialisation and shuffling under the same seed.
const STREAM: u64 = u64::from_be_bytes(*b"sampling");

/// The key of the draws under a seed, for samplers elsewhere.
pub(crate) fn draw_key(seed: u64) -> u64 {
    elapid_tensor::rng::key(seed, STREAM)
}

/// How tokens are chosen. The default is the model's own distribution.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 always takes the most probable token, the lowest id among equals.
    pub temperature: f32,
    /// Keep the k most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the fewest most probable tokens whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less probable than this share of the most probable one; 0 drops none.
    pub min_p: f32,
    /// Positive logits of tokens seen lately are divided by this, negative ones multiplied (CTRL,
    /// arXiv 1909.05858); 1 changes nothing.
    pub repetition_penalty: f32,
    /// How many of the last tokens count as seen lately; 0 for all of them.
    pub repetition_window: usize,
    /// The seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            repetition_window: 64,
            seed: 0,
        }
    }
}

impl Sampling {
    /// The most probable token, always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Checks every value.
    ///
    /// # Errors
    /// [`Error::Option`] for the first that makes no sense.
    pub fn validate(&self) -> Result<()> {
        let check = |name, value: f32, fits: bool, expected| {
            if fits {
                return Ok(());
            }
            Err(Error::Option { name, expected, found: value.to_string() })
        };
        let (t, p, m, r) = (self.temperature, self.top_p, self.min_p, self.repetition_penalty);
        check("temperature", t, t >= 0.0 && t.is_finite(), "a number from 0 up")?;
        check("top_p", p, p > 0.0 && p <= 1.0, "above 0 and at most 1")?;
        check("min_p", m, (0.0..=1.0).contains(&m), "0 to 1")?;
        check("repetition_penalty", r, r > 0.0 && r.is_finite(), "a number above 0")
    }
}

/// A token that is still in the running.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: u32,
    logit: f32,
    /// exp(logit - the largest logit), not normalised.
    weight: f64,
}

/// Most probable first, lowest id first among equals.
fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// Samples tokens; keeps its working memory between calls.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    vocabulary: usize,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler over the first `vocabulary` logits of each row.
    ///
    /// # Errors
    /// If an option makes no sense.
    pub fn new(sampling: &Sampling, vocabulary: usize) -> Result<Self> {
        sampling.validate()?;
        Ok(Self { sampling: sampling.clone(), vocabulary, candidates: Vec::new() })
    }

    /// How it samples.
    pub(crate) fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Samples otherwise from now on, with options that were found valid.
    pub(crate) fn set(&mut self, sampling: &Sampling) {
        self.sampling.clone_from(sampling);
    }

    /// The token that follows `history`, from its `logits` `[V]`; `id` and `position` key the draw.
    ///
    /// # Errors
    /// [`Error::Logits`] if a logit is NaN or plus infinity, or none is above minus infinity.
    pub fn sample(
        &mut self,
        logits: &[f32],
        history: &[u32],
        id: u64,
        position: u64,
    ) -> Result<u32> {
        let logits = &logits[..self.vocabulary.min(logits.len())];
        self.candidates.clear();
        for (token, &logit) in (0u32..).zip(logits) {
            if logit.is_nan() || logit == f32::INFINITY {
                return Err(Error::Logits { token, position, value: logit });
            }
            self.candidates.push(Candidate { id: token, logit, weight: 0.0 });
        }
        self.penalise(history);
        let best = self.candidates.iter().min_by(|a, b| by_rank(a, b)).copied();
        let Some(best) = best.filter(|best| best.logit > f32::NEG_INFINITY) else {
            return Err(Error::Logits { token: 0, position, value: f32::NEG_INFINITY });
        };
        if self.sampling.temperature == 0.0 {
            return Ok(best.id);
        }
        self.filter(best.logit);

        let total: f64 = self.candidates.iter().map(|candidate| candidate.weight).sum();
        let [high, low, ..] = draw(self.sampling.seed, STREAM, id, position);
        let mut left = unit_f64(high, low) * total;
        for candidate in &self.candidates {
            left -= candidate.weight;
            if left < 0.0 {
                return Ok(candidate.id);
            }
        }
        // Rounding may leave a crumb of the sum.
        Ok(best.id)
    }

    fn penalise(&mut self, history: &[u32]) {
        let penalty = self.sampling.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let window = match self.sampling.repetition_window {
            0 => history.len(),
            window => window.min(history.len()),
        };
        let mut seen = history[history.len() - window..].to_vec();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            if let Some(candidate) = self.candidates.get_mut(token as usize) {
                let logit = candidate.logit;
                candidate.logit = if logit > 0.0 { logit / penalty } else { logit * penalty };
            }
        }
    }

    /// Weighs the candidates and leaves those that every filter keeps, in the order of their ids, so that
    /// a filter which drops nothing changes nothing.
    fn filter(&mut self, best: f32) {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        let candidates = &mut self.candidates;
        let temperature = f64::from(temperature);
        for candidate in candidates.iter_mut() {
            candidate.weight = ((f64::from(candidate.logit) - f64::from(best)) / temperature).exp();
        }
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, by_rank);
            candidates.truncate(top_k);
        }
        if top_p < 1.0 {
            candidates.sort_unstable_by(by_rank);
            let enough = f64::from(top_p) * candidates.iter().map(|c| c.weight).sum::<f64>();
            let mut sum = 0.0;
            let reaches = candidates.iter().position(|candidate| {
                sum += candidate.weight;
                sum >= enough
            });
            candidates.truncate(reaches.map_or(candidates.len(), |last| last + 1));
        }
        // The best candidate's weight is exp(0) = 1, so min_p is a bound on weights.
        candidates.retain(|candidate| candidate.weight >= f64::from(min_p));
        candidates.sort_unstable_by_key(|candidate| candidate.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// How often each of `vocabulary` tokens comes up in `draws` positions.
    fn counts(sampling: &Sampling, logits: &[f32], vocabulary: usize, draws: u64) -> Vec<u64> {
        let mut sampler = Sampler::new(sampling, vocabulary).unwrap();
        let mut counts = vec![0; logits.len()];
        for position in 0..draws {
            counts[sampler.sample(logits, &[], 0, position).unwrap() as usize] += 1;
        }
        counts
    }

    fn ln(probabilities: &[f32]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let logits = ln(&[0.5, 0.3, 0.15, 0.05]);
        let seen = counts(&Sampling::default(), &logits, 4, 20_000);
        for (count, p) in seen.iter().zip([0.5, 0.3, 0.15, 0.05]) {
            assert!((*count as f64 / 20_000.0 - p).abs() < 0.012, "{seen:?}");
        }
        // Temperature 1/2 squares the odds: 0.25 : 0.09 : 0.0225 : 0.0025.
        let cold = Sampling { temperature: 0.5, ..Sampling::default() };
        let seen = counts(&cold, &logits, 4, 20_000);
        assert!((seen[0] as f64 / 20_000.0 - 0.25 / 0.365).abs() < 0.012, "{seen:?}");
    }

    #[test]
    fn filters_keep_what_they_should() {
        let logits = ln(&[0.05, 0.5, 0.15, 0.3]);
        let kept = |sampling: Sampling| -> Vec<usize> {
            let seen = counts(&sampling, &logits, 4, 4000);
            (0..4).filter(|&token| seen[token] > 0).collect()
        };
        let base = Sampling::default();
        assert_eq!(kept(Sampling { top_k: 2, ..base.clone() }), [1, 3]);
        assert_eq!(kept(Sampling { top_k: 9, ..base.clone() }), [0, 1, 2, 3]);
        assert_eq!(kept(Sampling { top_p: 0.49, ..base.clone() }), [1]);
        assert_eq!(kept(Sampling { top_p: 0.79, ..base.clone() }), [1, 3]);
        assert_eq!(kept(Sampling { top_p: 0.81, ..base.clone() }), [1, 2, 3]);
        // Of what top-k leaves (0.5, 0.3), 0.5 is a share of 0.625.
        assert_eq!(kept(Sampling { top_k: 2, top_p: 0.6, ..base.clone() }), [1]);
        assert_eq!(kept(Sampling { min_p: 0.2, ..base.clone() }), [1, 2, 3]);
        assert_eq!(kept(Sampling { min_p: 1.0, ..base.clone() }), [1]);
        // The threshold is on probabilities after temperature: 0.6 becomes 0.36.
        assert_eq!(kept(Sampling { min_p: 0.5, temperature: 0.5, ..base }), [1]);
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals_and_no_padding() {
        let mut sampler = Sampler::new(&Sampling::greedy(), 4).unwrap();
        assert_eq!(sampler.sample(&[1.0, 3.0, 3.0, 2.0, 9.0], &[], 0, 0).unwrap(), 1);
        let hot = Sampling { temperature: 100.0, ..Sampling::default() };
        let seen = counts(&hot, &[0.0, 0.0, 0.0, 50.0, 50.0], 3, 2000);
        assert_eq!(seen[3..], [0, 0]);
        assert_eq!(counts(&Sampling { top_k: 1, ..hot }, &[2.0, 2.0], 2, 50), [50, 0]);
    }

    #[test]
    fn repetition_penalty_looks_back_as_far_as_its_window() {
        let sampling =
            Sampling { repetition_penalty: 2.0, repetition_window: 2, ..Sampling::greedy() };
        let mut sampler = Sampler::new(&sampling, 3).unwrap();
        let logits = [4.0, 3.0, -1.0];
        assert_eq!(sampler.sample(&logits, &[0, 2, 2], 0, 0).unwrap(), 0);
        assert_eq!(sampler.sample(&logits, &[2, 0], 0, 0).unwrap(), 1);
        // Counted once, however often it was seen.
        assert_eq!(sampler.sample(&[4.0, 1.5, 0.0], &[0, 0], 0, 0).unwrap(), 0);
        let negative = [-1.0, -1.5, -9.0];
        assert_eq!(sampler.sample(&negative, &[0], 0, 0).unwrap(), 1);
    }

    #[test]
    fn broken_logits_are_errors() {
        let mut sampler = Sampler::new(&Sampling::default(), 3).unwrap();
        let error = sampler.sample(&[0.0, f32::NAN, 0.0], &[], 0, 7).unwrap_err().to_string();
        assert!(error.contains("token 1") && error.contains("position 7"), "{error}");
        assert!(sampler.sample(&[f32::INFINITY, 0.0, 0.0], &[], 0, 0).is_err());
        assert!(sampler.sample(&[f32::NEG_INFINITY; 3], &[], 0, 0).is_err());
        let one = [f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY];
        assert_eq!(sampler.sample(&one, &[], 0, 0).unwrap(), 1);
        // Padding may hold anything.
        assert!(sampler.sample(&[0.0, 0.0, 0.0, f32::NAN], &[], 0, 0).is_ok());
    }

    #[test]
    fn options_out_of_range_are_named() {
        let base = Sampling::default();
        for (name, sampling) in [
            ("temperature", Sampling { temperature: -1.0, ..base.clone() }),
            ("temperature", Sampling { temperature: f32::NAN, ..base.clone() }),
            ("top_p", Sampling { top_p: 0.0, ..base.clone() }),
            ("top_p", Sampling { top_p: 1.5, ..base.clone() }),
            ("min_p", Sampling { min_p: -0.1, ..base.clone() }),
            ("repetition_penalty", Sampling { repetition_penalty: 0.0, ..base.clone() }),
        ] {
            let error = sampling.validate().unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_draw_depends_on_seed_id_and_position_alone(
            logits in prop::collection::vec(-4f32..4.0, 2..40),
            seed: u64, id: u64, position: u64,
        ) {
            let sampling = Sampling { seed, top_p: 0.9, ..Sampling::default() };
            let mut used = Sampler::new(&sampling, logits.len()).unwrap();
            for other in 0..3 {
                used.sample(&logits, &[], other, 1).unwrap();
            }
            let mut fresh = Sampler::new(&sampling, logits.len()).unwrap();
            prop_assert_eq!(
                used.sample(&logits, &[], id, position).unwrap(),
                fresh.sample(&logits, &[], id, position).unwrap()
            );
        }

        #[test]
        fn filters_that_keep_all_change_nothing(
            logits in prop::collection::vec(-4f32..4.0, 2..40),
            position: u64,
        ) {
            let plain = Sampling::default();
            let wide = Sampling { top_k: logits.len(), min_p: 1e-9, ..plain.clone() };
            let take = |sampling: &Sampling| {
                Sampler::new(sampling, logits.len()).unwrap().sample(&logits, &[], 0, position).unwrap()
            };
            prop_assert_eq!(take(&plain), take(&wide));
        }
    }
}
