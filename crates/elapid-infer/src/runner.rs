//! What generation, evaluation and the commands run a model by: token ids in, logits of the wanted tokens and the
//! state out, whatever computes them.

use std::ops::ControlFlow;

use elapid_models::{Context, LanguageModel, MambaConfig, State};
use elapid_tensor::autograd::no_grad;
use elapid_tensor::cuda::batch_invariant;
use elapid_tensor::{Device, Sequence, Sequences, Tensor};

use crate::generate::{Event, Generation, Options, Request};
use crate::gpu_steps::GpuSteps;
use crate::{Error, Result, Sampling};

/// Logits are made for so many values at a time (16 MB).
pub(crate) const LOGITS_AT_ONCE: usize = 1 << 22;

/// Tokens times channels of a call that reads prompts on a GPU.
const READ_AT_ONCE: usize = 16_384 * 5120;

/// Logits of some of the wanted tokens, which come in order.
#[derive(Debug, Clone, Copy)]
pub struct Logits<'a> {
    /// Index of the first of them among the wanted tokens.
    pub first: usize,
    /// [tokens, V] in f32 on the host, padded rows of the vocabulary included.
    pub values: &'a [f32],
}

/// What takes logits; a break says that no more are needed.
pub type Receiver<'a> = dyn FnMut(Logits<'_>) -> ControlFlow<()> + 'a;

/// Who chooses the tokens that follow a decode step: each sequence's is chosen here, from its logits, or by the runner,
/// under the same options and with the same outcome. A sequence is named by its slot.
pub trait NextTokens {
    /// How a sequence's next token is chosen, and all its tokens so far, the last of which the step reads.
    fn rule(&self, slot: usize) -> (&Sampling, &[u32]);

    /// Chooses from a sequence's logits [V].
    fn choose(&mut self, slot: usize, logits: &[f32]);

    /// Takes the token that the runner has chosen, or the reason why none can be.
    fn take(&mut self, slot: usize, token: Result<u32>);
}

/// How a runner reads prompts best.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Tokens that fill the machine: what a call should have, of one prompt or of many, and a piece of a long prompt.
    /// The memory of a call grows with them.
    pub tokens: usize,
    /// Where a call costs much whatever is in it, it pays to let prompts wait until one in so many slots is free.
    pub wait_for_slots_in: usize,
}

impl Default for Reading {
    fn default() -> Self {
        Self { tokens: 2048, wait_for_slots_in: usize::MAX }
    }
}

impl Reading {
    /// Of a GPU: products of 2,048 rows leave a part of a large one idle, its scan wants a dozen prompts of narrow models at
    /// once, and a call for one short prompt takes the host as long to launch as several decode steps do. Activations of a
    /// call take some 17 bytes for each token and channel of the mixer, so up to 1.4 GB (reckoned).
    pub(crate) fn on_gpu(config: &MambaConfig) -> Self {
        let tokens = (READ_AT_ONCE / config.d_inner().max(1)).max(1);
        let tokens = 1 << tokens.ilog2().clamp(11, 15);
        Self { tokens, wait_for_slots_in: 16 }
    }
}

/// A model that is ready to run.
///
/// The logits and the state of a sequence have the same bits alone and in any batch, and wherever it is divided
/// among calls.
pub trait Runner {
    /// The model's shape.
    fn config(&self) -> &MambaConfig;

    /// The state of `slots` sequences that have seen nothing.
    ///
    /// # Errors
    /// If there is no memory for it.
    fn fresh_state(&self, slots: usize) -> Result<State>;

    /// Checks that a state is one of this model.
    ///
    /// # Errors
    /// With the first difference.
    fn check_state(&self, state: &State) -> Result<()>;

    /// How prompts are read best.
    fn reading(&self) -> Reading {
        Reading::default()
    }

    /// Runs the tokens `ids` [T] of `sequences` from `state` (none: every sequence starts from nothing) and returns
    /// the state after each sequence. `wanted` are the tokens whose logits `receive` gets, ascending, in 0..T.
    ///
    /// A state that nobody else holds is updated in place.
    ///
    /// # Errors
    /// If an id is outside the vocabulary, the number of ids is not that of the sequences, the state is missing or of
    /// another model, or a wanted token is not there.
    fn run(
        &mut self,
        ids: &[u32],
        sequences: &Sequences,
        state: Option<State>,
        wanted: &[usize],
        receive: &mut Receiver<'_>,
    ) -> Result<State>;

    /// Runs one token of each of `sequences`, which all are continued, from `state`, has the next token of each chosen,
    /// in their order, and returns the state after it. Unless a runner chooses itself, `next` gets the logits. The state
    /// is as the runner keeps it, which need not be f32; every call takes it so.
    ///
    /// # Errors
    /// As [`Runner::run`], and if a sequence has another number of tokens or does not go on.
    fn decode(
        &mut self,
        ids: &[u32],
        sequences: &Sequences,
        state: Option<State>,
        next: &mut dyn NextTokens,
    ) -> Result<State> {
        decode_by_logits(self, ids, sequences, state, next)
    }

    /// Continues one request, as [`generate`](crate::generate) does, by a way of the runner's own that gives the same
    /// tokens; none if it has no such way for this request.
    fn continue_alone(
        &mut self,
        _request: &Request,
        _options: &Options,
        _on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Option<Result<Generation>> {
        None
    }
}

impl<R: Runner + ?Sized> Runner for &mut R {
    fn config(&self) -> &MambaConfig {
        (**self).config()
    }

    fn fresh_state(&self, slots: usize) -> Result<State> {
        (**self).fresh_state(slots)
    }

    fn check_state(&self, state: &State) -> Result<()> {
        (**self).check_state(state)
    }

    fn reading(&self) -> Reading {
        (**self).reading()
    }

    fn decode(
        &mut self,
        ids: &[u32],
        sequences: &Sequences,
        state: Option<State>,
        next: &mut dyn NextTokens,
    ) -> Result<State> {
        (**self).decode(ids, sequences, state, next)
    }

    fn continue_alone(
        &mut self,
        request: &Request,
        options: &Options,
        on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Option<Result<Generation>> {
        (**self).continue_alone(request, options, on_event)
    }

    fn run(
        &mut self,
        ids: &[u32],
        sequences: &Sequences,
        state: Option<State>,
        wanted: &[usize],
        receive: &mut Receiver<'_>,
    ) -> Result<State> {
        (**self).run(ids, sequences, state, wanted, receive)
    }
}

/// [`Runner::decode`] with all logits given to `next`.
pub(crate) fn decode_by_logits<R: Runner + ?Sized>(
    runner: &mut R,
    ids: &[u32],
    sequences: &Sequences,
    state: Option<State>,
    next: &mut dyn NextTokens,
) -> Result<State> {
    check_steps(sequences)?;
    let slots: Vec<usize> = sequences.into_iter().map(|sequence| sequence.slot).collect();
    let wanted: Vec<usize> = (0..ids.len()).collect();
    let padded = runner.config().padded_vocab_size();
    runner.run(ids, sequences, state, &wanted, &mut |Logits { first, values }| {
        for (&slot, row) in slots[first..].iter().zip(values.chunks_exact(padded)) {
            next.choose(slot, row);
        }
        ControlFlow::Continue(())
    })
}

/// Checks that sequences are those of [`Runner::decode`].
pub(crate) fn check_steps(sequences: &Sequences) -> Result<()> {
    match sequences.into_iter().find(|sequence| sequence.len != 1 || !sequence.continued) {
        None => Ok(()),
        Some(Sequence { len, continued, slot, .. }) => Err(Error::Option {
            name: "sequences",
            expected: "one token each, of sequences that go on",
            found: format!("{len} tokens of slot {slot}, continued: {continued}"),
        }),
    }
}

/// Checks the arguments of [`Runner::run`] that do not depend on the model.
pub(crate) fn check_wanted(ids: &[u32], sequences: &Sequences, wanted: &[usize]) -> Result<()> {
    let refuse = |name, expected, found| Err(Error::Option { name, expected, found });
    if ids.len() != sequences.tokens() {
        let found = format!("{} ids for {} tokens", ids.len(), sequences.tokens());
        return refuse("ids", "one for each token of the sequences", found);
    }
    if wanted.windows(2).any(|pair| pair[0] >= pair[1]) {
        return refuse("wanted", "ascending tokens", format!("{wanted:?}"));
    }
    match wanted.last() {
        Some(&last) if last >= ids.len() => {
            refuse("wanted", "tokens of the batch", format!("token {last} of {}", ids.len()))
        }
        _ => Ok(()),
    }
}

/// Checks all arguments of [`Runner::run`]; gives the state to go on from, that of fresh sequences if there is none.
pub(crate) fn check_call(
    runner: &dyn Runner,
    ids: &[u32],
    sequences: &Sequences,
    state: Option<State>,
    wanted: &[usize],
) -> Result<State> {
    check_wanted(ids, sequences, wanted)?;
    let vocabulary = runner.config().padded_vocab_size();
    for (sequence, own) in sequences.into_iter().enumerate() {
        let tokens = &ids[own.tokens()];
        if let Some(place) = tokens.iter().position(|&id| id as usize >= vocabulary) {
            return Err(Error::Token { sequence, place, token: tokens[place], vocabulary });
        }
    }
    let refuse = |expected, found| Err(Error::Option { name: "state", expected, found });
    match state {
        Some(state) if state.slots() != sequences.slots() => {
            let found = format!("{} slots for {}", state.slots(), sequences.slots());
            refuse("one slot for each of the sequences'", found)
        }
        Some(state) => {
            runner.check_state(&state)?;
            Ok(state)
        }
        None if sequences.any_continued() => {
            refuse("one, as a sequence is continued", "none".into())
        }
        None => runner.fresh_state(sequences.slots()),
    }
}

/// Runs a [`LanguageModel`] where it is; decode steps on a GPU are recorded once and launched as one.
pub struct ModelRunner<'a> {
    model: &'a LanguageModel,
    steps: Option<GpuSteps>,
}

impl<'a> ModelRunner<'a> {
    /// A runner of `model`.
    pub fn new(model: &'a LanguageModel) -> Self {
        Self { model, steps: None }
    }
}

impl Runner for ModelRunner<'_> {
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
        match self.model.device() {
            Device::Cpu => Reading::default(),
            _ => Reading::on_gpu(self.config()),
        }
    }

    fn run(
        &mut self,
        ids: &[u32],
        sequences: &Sequences,
        state: Option<State>,
        wanted: &[usize],
        receive: &mut Receiver<'_>,
    ) -> Result<State> {
        check_wanted(ids, sequences, wanted)?;
        let decoding = wanted.len() == ids.len()
            && sequences.len() == sequences.slots()
            && (sequences.into_iter().enumerate())
                .all(|(slot, s)| s.slot == slot && s.len == 1 && s.continued);
        // Steps too: the last token of a prompt may be read alone, or with others of which more is read.
        let run = || {
            if self.steps.is_none() {
                self.steps = self.model.device().gpu()?.map(GpuSteps::new);
            }
            let state = match (state, &mut self.steps) {
                (Some(state), Some(steps)) if decoding => {
                    let (logits, state) = steps.step(self.model, ids, sequences, state)?;
                    let logits = logits.to(Device::Cpu)?;
                    let _ = receive(Logits { first: 0, values: logits.data::<f32>()? });
                    return Ok(state);
                }
                (state, _) => state,
            };
            self.read(ids, sequences, state, wanted, receive)
        };
        no_grad(|| batch_invariant(run))
    }
}

impl ModelRunner<'_> {
    fn read(
        &self,
        ids: &[u32],
        sequences: &Sequences,
        state: Option<State>,
        wanted: &[usize],
        receive: &mut Receiver<'_>,
    ) -> Result<State> {
        let ids = Tensor::from_slice(ids, [ids.len()])?;
        let (hidden, state) = self.model.hidden(&ids, sequences, state, &mut Context::new())?;
        let step = (LOGITS_AT_ONCE / self.config().padded_vocab_size()).max(1);
        let mut first = 0;
        for part in wanted.chunks(step) {
            let logits = self.model.logits(&rows(&hidden, part)?)?.to(Device::Cpu)?;
            if receive(Logits { first, values: logits.data::<f32>()? }).is_break() {
                break;
            }
            first += part.len();
        }
        Ok(state)
    }
}

/// The given rows of [T, D], ascending.
fn rows(hidden: &Tensor, wanted: &[usize]) -> Result<Tensor> {
    let stretches: Vec<Tensor> = wanted
        .chunk_by(|a, b| a + 1 == *b)
        .map(|stretch| hidden.narrow(0, stretch[0], stretch.len()))
        .collect::<Result<_, _>>()?;
    Ok(match stretches.as_slice() {
        [stretch] => stretch.clone(),
        _ => Tensor::concat(&stretches.iter().collect::<Vec<_>>(), 0)?,
    })
}
