//! The decode engine of a GPU: a model whose decode steps run on fused kernels over weights in bf16 or int8.
//!
//! Prompts are read by the [`LanguageModel`] itself, all those of a call together: what each gets has the bits that it gets
//! alone ([`elapid_tensor::cuda::batch_invariant`]). One token of a sequence that goes on is a decode step
//! ([`elapid_ops::decode_step`]), whose order is always the same, so that sequences can be stepped together. The steps
//! of a number of sequences are recorded once and launched as one. The tokens that follow are chosen on the card, each
//! sequence's under its own options, and only they come to the host; but those of a repetition penalty for more than the
//! last 4096 tokens, and all of a vocabulary of more than 262,144, are chosen from logits there.
//!
//! The engine keeps the state of its last step where it is and changes it there. A caller who goes on from that state
//! pays nothing for it; one who kept a copy, or comes with another state, pays one copy.

mod check;
mod choosing;
mod generate;
mod in_order;
mod load;
mod sampled;
mod steps;

use std::ops::ControlFlow;

use elapid_formats::ModelSource;
use elapid_models::{LanguageModel, MambaConfig, NormKind, State};
use elapid_ops::decode_step::{Encoding, Sizes, Weights};
use elapid_tensor::cuda::Gpu;
use elapid_tensor::{DType, Sequence, Sequences};

use crate::runner::{check_call, check_steps, decode_by_logits};
use crate::{
    Error, Event, Generation, Logits, ModelRunner, NextTokens, Options, Reading, Receiver, Request,
    Result, Runner,
};

use in_order::InOrder;
pub use sampled::{SampledSteps, Start};
use steps::Steps;

/// A model on a GPU with weights for decode steps.
pub struct GpuEngine<'m> {
    model: &'m LanguageModel,
    gpu: Gpu,
    sizes: Sizes,
    weights: Weights,
    steps: Option<Steps>,
}

impl<'m> GpuEngine<'m> {
    /// An engine for a model that is on a GPU and computes in bf16 there, and from here on runs only
    /// ([`LanguageModel::run_only`]). Its embedding and projections are kept a second time, in `encoding`; Δ's projection in
    /// bf16, everything else in f32. Of a model that ran only before, projections are rounded to bf16 already.
    ///
    /// # Errors
    /// If the model is elsewhere or computes in another type, or there is no memory.
    pub fn new(model: &'m mut LanguageModel, encoding: Encoding) -> Result<Self> {
        Self::build(model, None, Some(encoding))
    }

    /// The same for a model that was loaded from `source`. Without an encoding weights are kept as they are stored: blocks
    /// of integers as int8, floats in bf16. As int8, blocks of Q8_0 and Q4_0 keep exactly their numbers and scales; those of
    /// other types are rounded anew.
    ///
    /// # Errors
    /// As [`GpuEngine::new`].
    pub fn of_source(
        model: &'m mut LanguageModel,
        source: &ModelSource,
        encoding: Option<Encoding>,
    ) -> Result<Self> {
        Self::build(model, Some(source), encoding)
    }

    /// How such an engine would keep the projections.
    pub fn encoding_of(source: &ModelSource, encoding: Option<Encoding>) -> Encoding {
        let stored = source.get("backbone.layers.0.mixer.in_proj.weight");
        load::kept(stored.map(|stored| stored.encoding), encoding)
    }

    fn build(
        model: &'m mut LanguageModel,
        source: Option<&ModelSource>,
        encoding: Option<Encoding>,
    ) -> Result<Self> {
        let gpu = match model.device().gpu()? {
            Some(gpu) if model.compute() == DType::BF16 => gpu,
            _ => {
                return Err(Error::Option {
                    name: "device",
                    expected: "a model on a GPU that computes in bf16",
                    found: format!("{} in {}", model.device(), model.compute()),
                });
            }
        };
        let sizes = sizes(model.config());
        let weights = load::weights(&gpu, model, source, encoding)?;
        weights.check(&sizes)?;
        model.run_only()?;
        Ok(Self { model, gpu, sizes, weights, steps: None })
    }

    /// The engine with the recurrent state of decode steps kept in a type, f32 (as it is made) or bf16: half the bytes, and
    /// rounded once a step. [`Runner::decode`] gives it out as it is kept, all else in f32; the convolution's part stays f32.
    /// A step rounds the state of prompts that are half read too, which [`Limits::reads_first`](crate::Limits) avoids.
    ///
    /// # Errors
    /// If the type is another.
    pub fn with_state(mut self, dtype: DType) -> Result<Self> {
        self.sizes.state = dtype;
        self.weights.check(&self.sizes)?;
        self.steps = None;
        Ok(self)
    }

    /// How decode steps keep the recurrent state.
    pub fn state_dtype(&self) -> DType {
        self.sizes.state
    }

    /// Bytes that a decode step reads of the weights.
    pub fn weight_bytes(&self) -> usize {
        self.weights.bytes_read()
    }

    /// How its embedding and projections are kept; the first layer stands for all.
    pub fn encoding(&self) -> Encoding {
        let embedding = self.weights.embedding.encoding();
        self.weights.layers.first().map_or(embedding, |layer| layer.input.encoding())
    }

    /// The model that reads prompts.
    pub fn model(&self) -> &LanguageModel {
        self.model
    }

    /// One token of each of some sequences: logits [sequences, V], and the state.
    fn logits(
        &mut self,
        ids: &[u32],
        decoding: &[Sequence],
        state: State,
    ) -> Result<(Vec<f32>, State)> {
        let ids: Vec<u32> = decoding.iter().map(|sequence| ids[sequence.start]).collect();
        let slots: Vec<usize> = decoding.iter().map(|sequence| sequence.slot).collect();
        self.steps_for(state)?;
        let Some(steps) = &mut self.steps else { return Ok((Vec::new(), State::default())) };
        steps.step(&self.weights, &ids, &slots, false)?;
        let logits = steps.logits(ids.len())?;
        Ok((logits, steps.state().cast(DType::F32)?))
    }

    /// One token of each of some sequences, and the choice of the next: on the card, and where it cannot by the logits.
    fn choose(
        &mut self,
        ids: &[u32],
        sequences: &Sequences,
        state: State,
        next: &mut dyn NextTokens,
    ) -> Result<State> {
        let (vocabulary, classes) = (self.model.config().vocab_size, self.sizes.classes);
        let state = state.to(self.model.device())?;
        self.steps_for(state)?;
        let Self { gpu, weights, steps: Some(steps), .. } = self else {
            return Ok(State::default());
        };
        // The logits that the host needs are the first.
        let (mut on_host, mut on_card) = (Vec::new(), Vec::new());
        let choosing = steps.choosing(vocabulary)?;
        for sequence in sequences {
            let Sequence { slot, id, position, .. } = *sequence;
            let (sampling, history) = next.rule(slot);
            match choosing.prepare(slot, (id, position), sampling, history)? {
                true => on_card.push(*sequence),
                false => on_host.push(*sequence),
            }
        }
        let first = on_host.len();
        let columns: Vec<Sequence> = on_host.into_iter().chain(on_card).collect();
        let slots: Vec<usize> = columns.iter().map(|sequence| sequence.slot).collect();
        let ids: Vec<u32> = columns.iter().map(|sequence| ids[sequence.start]).collect();
        steps.step(weights, &ids, &slots, first < columns.len())?;
        gpu.event()?.wait()?;
        let logits = if first > 0 { steps.logits(first)? } else { Vec::new() };
        let mut rows = logits.chunks(classes);
        let mut tokens = steps.chosen(first, &slots[first..]).into_iter();
        let state = steps.state();
        // Both are in the order of the sequences.
        let by_host = &slots[..first];
        for sequence in sequences {
            let slot = sequence.slot;
            if by_host.contains(&slot) {
                rows.next().into_iter().for_each(|row| next.choose(slot, row));
            } else {
                tokens.next().into_iter().for_each(|token| next.take(slot, token));
            }
        }
        Ok(state)
    }

    /// Steps that go on from a state.
    fn steps_for(&mut self, state: State) -> Result<&mut Steps> {
        let slots = state.slots();
        let steps = match self.steps.take() {
            Some(steps) if steps.fits(slots) => steps,
            _ => Steps::new(&self.gpu, &self.sizes, slots, self.weights.layers.len())?,
        };
        let steps = self.steps.insert(steps);
        steps.adopt(state, &self.sizes)?;
        Ok(steps)
    }

    /// Reads the tokens of some of a call's sequences, all at once; the other slots of the state stay as they are.
    fn read(
        &self,
        ids: &[u32],
        reading: &[Sequence],
        state: State,
        wanted: &[usize],
        out: &mut InOrder<'_, '_>,
    ) -> Result<State> {
        let (mut own, mut sequences) = (Vec::new(), Vec::new());
        // Tokens of these sequences, and the places of the wanted ones among all that are wanted.
        let (mut tokens, mut places) = (Vec::new(), Vec::new());
        for sequence in reading {
            let all = sequence.tokens();
            let first = wanted.partition_point(|&token| token < all.start);
            let count = wanted[first..].partition_point(|&token| token < all.end);
            tokens.extend(wanted[first..][..count].iter().map(|t| own.len() + t - all.start));
            places.extend(first..first + count);
            sequences.push(Sequence { start: own.len(), ..*sequence });
            own.extend_from_slice(&ids[all]);
        }
        let sequences = Sequences::new(sequences, state.slots())?;
        // Without a state nothing is copied.
        let all_new = sequences.len() == sequences.slots() && !sequences.any_continued();
        let state = if all_new { None } else { Some(state.cast(DType::F32)?) };
        let mut receive = |Logits { first, values }: Logits<'_>| out.pass(&places[first..], values);
        ModelRunner::new(self.model).run(&own, &sequences, state, &tokens, &mut receive)
    }
}

/// Sizes of the kernels for a model's configuration.
fn sizes(config: &MambaConfig) -> Sizes {
    Sizes {
        width: config.d_model,
        inner: config.d_inner(),
        states: config.d_state,
        rank: config.dt_rank(),
        taps: config.d_conv,
        classes: config.padded_vocab_size(),
        centred: config.norm == NormKind::Layer,
        eps: config.norm_eps as f32,
        selection_eps: config.mixer_rms_eps.map(|eps| eps as f32),
        state: DType::F32,
    }
}

impl Runner for GpuEngine<'_> {
    fn config(&self) -> &MambaConfig {
        self.model.config()
    }

    fn fresh_state(&self, slots: usize) -> Result<State> {
        Ok(self.model.fresh_state(slots)?)
    }

    fn check_state(&self, state: &State) -> Result<()> {
        Ok(self.model.check_state(state)?)
    }

    fn reading(&self) -> Reading {
        Reading::on_gpu(self.config())
    }

    fn decode(
        &mut self,
        ids: &[u32],
        sequences: &Sequences,
        state: Option<State>,
        next: &mut dyn NextTokens,
    ) -> Result<State> {
        if !choosing::takes(self.model.config().vocab_size) {
            return decode_by_logits(self, ids, sequences, state, next);
        }
        check_steps(sequences)?;
        let state = check_call(self, ids, sequences, state, &[])?;
        let outcome = self.choose(ids, sequences, state, next);
        if outcome.is_err() {
            // What the card has is not known.
            self.steps = None;
        }
        outcome
    }

    fn continue_alone(
        &mut self,
        request: &Request,
        options: &Options,
        on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Option<Result<Generation>> {
        // The first token comes out of the prompt.
        let able = options.max_tokens > 1
            && options.sampling.validate().is_ok()
            && self.can_sample(&options.sampling);
        able.then(|| self.choose_on_card(request, options, on_event))
    }

    fn run(
        &mut self,
        ids: &[u32],
        sequences: &Sequences,
        state: Option<State>,
        wanted: &[usize],
        receive: &mut Receiver<'_>,
    ) -> Result<State> {
        let state = check_call(self, ids, sequences, state, wanted)?;
        let mut state = state.to(self.model.device())?;
        let vocabulary = self.sizes.classes;
        let (decoding, reading): (Vec<Sequence>, Vec<Sequence>) =
            sequences.into_iter().filter(|s| s.len > 0).partition(|s| s.len == 1 && s.continued);
        let mut decoded = Vec::new();
        if !decoding.is_empty() {
            // Steps round what they keep in bf16, of every slot; prompts are read from what others left.
            let kept = (self.sizes.state != DType::F32)
                .then(|| state.clone().cast(DType::F32))
                .transpose()?;
            (decoded, state) = self.logits(ids, &decoding, state)?;
            if let Some(mut kept) = kept {
                for Sequence { slot, .. } in &decoding {
                    kept.set_slot(*slot, &state.select(&[*slot])?)?;
                }
                state = kept;
            }
        }
        let columns =
            decoding.iter().zip(decoded.chunks(vocabulary)).filter_map(|(own, column)| {
                wanted.binary_search(&own.start).ok().map(|place| (place, column))
            });
        let mut out = InOrder::new(vocabulary, columns.collect(), receive);
        if !reading.is_empty() {
            state = self.read(ids, &reading, state, wanted, &mut out)?;
        }
        out.finish();
        Ok(state)
    }
}
