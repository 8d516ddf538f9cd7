//! The decode engine of the CPU: one-token steps at the speed of memory, prompts and batches on the same weights.
//!
//! Projections and embedding stay as they are stored (a mapped file is never copied) or are converted once; products
//! read them in place ([`elapid_ops::quantized_linear`]). Convolution, Δ, A, D, norms and state are f32
//! ([`elapid_ops::mamba_step`]). Threads share out channels and rows and meet at barriers (`pool.rs`, `step.rs`).
//! Memory beside weights and states does not grow with the prompt: calls are cut into chunks.

mod check;
mod pool;
mod step;
mod weights;

use std::ops::ControlFlow;

use elapid_formats::{ModelSource, StoredTensor};
use elapid_models::{LanguageModel, LayerState, MambaConfig, State};
use elapid_ops::blocks::Encoding;
use elapid_ops::mamba_step::Stretch;
use elapid_tensor::{Device, Sequences, Tensor};

use crate::runner::{LOGITS_AT_ONCE, check_call};
use crate::{Checked, Error, Logits, Receiver, Result, Rows, Runner};
use pool::Pool;
use step::{LayerPlace, Scratch, Sizes};
use weights::Weights;

/// Tokens that go through the layers together. Their activations stay in the caches, and weights are read once for
/// all of them.
const CHUNK: usize = 256;
const CONV_STATE: &str = "conv_state";
const SSM_STATE: &str = "ssm_state";

/// A Mamba language model that runs on the CPU without gradients.
pub struct CpuEngine {
    config: MambaConfig,
    weights: Weights,
    pool: Pool,
    scratch: Option<Scratch>,
}

/// How an engine is made of a model on disk.
pub struct Loading<'a> {
    /// What projections and embedding are converted to; none to use them as they are stored. A matrix whose rows are
    /// no whole blocks of it gets `q8_0`, or f32.
    pub encoding: Option<Encoding>,
    /// Threads, this one among them.
    pub threads: usize,
    /// Output rows of each weight to compare with the f64 reference; none to compare nothing. That all weights are
    /// finite is looked at in any case.
    pub check: Option<Rows>,
    /// Is told how many bytes of how many have been read. It may begin anew once all are converted.
    pub progress: &'a mut dyn FnMut(u64, u64),
}

impl CpuEngine {
    /// An engine for a model on disk, unchecked but for finite weights; see [`CpuEngine::load`].
    ///
    /// # Errors
    /// As [`CpuEngine::load`].
    pub fn from_source(
        source: &ModelSource,
        encoding: Option<Encoding>,
        threads: usize,
    ) -> Result<Self> {
        let loading = Loading { encoding, threads, check: None, progress: &mut |_, _| {} };
        Ok(Self::load(source, loading)?.0)
    }

    /// An engine for a model on disk, and what was compared. Weights that stay as they are stored are read once and
    /// used where the file is mapped.
    ///
    /// # Errors
    /// [`Error::Weight`] if a weight is not finite, [`Error::SelfCheck`] if one, or a kernel, is wrong; if there is no
    /// memory, or the system gives no threads.
    pub fn load(source: &ModelSource, loading: Loading<'_>) -> Result<(Self, Checked)> {
        let Loading { encoding, threads, check, progress } = loading;
        let mut pool = pool(threads)?;
        let weights = Weights::from_source(source, encoding, &mut pool, progress)?;
        let mut engine = Self::new(source.config(), weights, pool);
        let checked = match check {
            Some(rows) => engine.check(source, rows, progress)?,
            None => {
                engine.check_finite(progress)?;
                Checked::default()
            }
        };
        Ok((engine, checked))
    }

    /// An engine for a model in memory, whose parameters are copied.
    ///
    /// # Errors
    /// If a parameter is not finite where it is read, there is no memory, or the system gives no threads.
    pub fn from_model(
        model: &mut LanguageModel,
        encoding: Option<Encoding>,
        threads: usize,
    ) -> Result<Self> {
        let mut pool = pool(threads)?;
        let weights = Weights::from_model(model, encoding, &mut pool)?;
        Ok(Self::new(model.config(), weights, pool))
    }

    /// An engine for tensors that `get` makes, each asked for once by its name in the Hugging Face layout, so that no
    /// more than one need be held in another encoding than the engine's.
    ///
    /// # Errors
    /// As [`CpuEngine::from_model`]; also if a tensor is missing or of another size than the configuration says.
    pub fn from_tensors(
        config: &MambaConfig,
        get: &dyn Fn(&str) -> Option<StoredTensor>,
        encoding: Option<Encoding>,
        threads: usize,
    ) -> Result<Self> {
        let mut pool = pool(threads)?;
        let weights = Weights::from_tensors(config, get, encoding, &mut pool)?;
        Ok(Self::new(config, weights, pool))
    }

    fn new(config: &MambaConfig, weights: Weights, pool: Pool) -> Self {
        Self { config: config.clone(), weights, pool, scratch: None }
    }

    /// How many threads take part.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Bytes of weights that a token reads.
    pub fn weight_bytes(&self) -> usize {
        self.weights.size()
    }

    /// How the embedding and the projections are held; the first layer stands for all.
    pub fn encoding(&self) -> Encoding {
        self.weights.layers.first().map_or(self.weights.embedding.encoding, |l| l.in_proj.encoding)
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            d: self.config.d_model,
            e: self.config.d_inner(),
            projected: self.config.dt_rank() + 2 * self.config.d_state,
            rank: self.config.dt_rank(),
            states: self.config.d_state,
            vocabulary: self.config.padded_vocab_size(),
        }
    }

    /// Tokens whose logits are made at a time.
    fn piece(&self) -> usize {
        (LOGITS_AT_ONCE / self.config.padded_vocab_size().max(1)).clamp(1, CHUNK)
    }

    /// Names and shapes of a layer's state.
    fn state_shapes(&self, slots: usize) -> [(&'static str, [usize; 3]); 2] {
        let e = self.config.d_inner();
        [
            (CONV_STATE, [slots, e, self.config.d_conv - 1]),
            (SSM_STATE, [slots, e, self.config.d_state]),
        ]
    }
}

fn pool(threads: usize) -> Result<Pool> {
    Pool::new(threads).map_err(|error| Error::Option {
        name: "threads",
        expected: "as many as the system gives",
        found: format!("{threads} ({error})"),
    })
}

/// Part of a call that goes through the layers at once.
struct Chunk {
    /// Its tokens in the call.
    start: usize,
    len: usize,
    stretches: Vec<Stretch>,
}

/// Cuts a call into chunks; sequences without tokens are part of the first.
fn chunks(sequences: &Sequences) -> Vec<Chunk> {
    let mut chunks: Vec<Chunk> = Vec::new();
    for sequence in sequences {
        let mut done = 0;
        loop {
            if chunks.last().is_none_or(|last| last.len == CHUNK && done < sequence.len) {
                let start = chunks.last().map_or(0, |last| last.start + last.len);
                chunks.push(Chunk { start, len: 0, stretches: Vec::new() });
            }
            let Some(chunk) = chunks.last_mut() else { break };
            let len = (sequence.len - done).min(CHUNK - chunk.len);
            chunk.stretches.push(Stretch {
                start: chunk.len,
                len,
                slot: sequence.slot,
                fresh: !sequence.continued && done == 0,
            });
            chunk.len += len;
            done += len;
            if done == sequence.len {
                break;
            }
        }
    }
    chunks
}

impl Runner for CpuEngine {
    fn config(&self) -> &MambaConfig {
        &self.config
    }

    fn fresh_state(&self, slots: usize) -> Result<State> {
        let layer = || {
            let tensors = self.state_shapes(slots);
            LayerState::new(tensors.map(|(name, shape)| (name.into(), Tensor::zeros::<f32>(shape))))
        };
        let layers = (0..self.config.n_layer).map(|_| layer()).collect();
        Ok(State { layers, positions: vec![0; slots] })
    }

    fn check_state(&self, state: &State) -> Result<()> {
        let refuse = |message| Err(elapid_models::Error::State(message).into());
        if state.layers.len() != self.config.n_layer {
            let (found, expected) = (state.layers.len(), self.config.n_layer);
            return refuse(format!("{found} layers, expected {expected}"));
        }
        for (i, layer) in state.layers.iter().enumerate() {
            for (name, shape) in self.state_shapes(state.slots()) {
                match layer.get(name) {
                    Some(tensor) if tensor.shape() == shape.into() => {}
                    found => {
                        let found = found.map_or("nothing".into(), |t| t.shape().to_string());
                        return refuse(format!(
                            "layer {i}, {name}: expected shape {shape:?}, found {found}"
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    fn run(
        &mut self,
        ids: &[u32],
        sequences: &Sequences,
        state: Option<State>,
        wanted: &[usize],
        receive: &mut Receiver<'_>,
    ) -> Result<State> {
        let state = check_call(self, ids, sequences, state, wanted)?.to(Device::Cpu)?;
        let State { layers, mut positions } = state;
        let mut tensors = Vec::with_capacity(layers.len());
        for mut layer in layers {
            tensors.push((layer.take(CONV_STATE)?, layer.take(SSM_STATE)?));
        }
        let mut places = Vec::with_capacity(tensors.len());
        for (conv, ssm) in &mut tensors {
            places.push(LayerPlace {
                conv: conv.data_mut::<f32>()?.as_mut_ptr(),
                ssm: ssm.data_mut::<f32>()?.as_mut_ptr(),
            });
        }
        self.advance(ids, sequences, &places, wanted, receive);
        for sequence in sequences {
            let seen = &mut positions[sequence.slot];
            *seen =
                if sequence.continued { *seen } else { sequence.position } + sequence.len as u64;
        }
        let layers = tensors
            .into_iter()
            .map(|(conv, ssm)| {
                LayerState::new([(CONV_STATE.into(), conv), (SSM_STATE.into(), ssm)])
            })
            .collect();
        Ok(State { layers, positions })
    }
}

impl CpuEngine {
    /// Runs checked tokens; the states lie at `places`.
    fn advance(
        &mut self,
        ids: &[u32],
        sequences: &Sequences,
        places: &[LayerPlace],
        wanted: &[usize],
        receive: &mut Receiver<'_>,
    ) {
        let (sizes, piece) = (self.sizes(), self.piece());
        let chunks = chunks(sequences);
        let room = chunks.iter().map(|chunk| chunk.len).max().unwrap_or(0);
        let scratch = match self.scratch.take() {
            Some(scratch) if scratch.tokens() >= room => scratch,
            _ => {
                // Steps of a few more sequences shall not need new memory.
                let room = room.next_power_of_two().clamp(4, CHUNK);
                Scratch::new(room, piece.min(room), sizes, &self.weights)
            }
        };
        let scratch = self.scratch.insert(scratch);
        let piece = piece.min(scratch.tokens());
        let mut received = 0;
        let mut listening = true;
        for chunk in &chunks {
            let ids = &ids[chunk.start..][..chunk.len];
            let count = wanted[received..].partition_point(|&w| w < chunk.start + chunk.len);
            let wanted: Vec<usize> =
                wanted[received..][..count].iter().map(|w| w - chunk.start).collect();
            let mut pieces = wanted.chunks(piece);
            let first = if listening { pieces.next().unwrap_or_default() } else { &[] };
            let frame = scratch.frame(&self.weights, sizes);
            self.pool.run(&|member| {
                // SAFETY: every thread of the pool runs this with the same arguments; the scratch has room for a
                // chunk and a piece; ids and states were checked, and both are borrowed here alone.
                unsafe {
                    frame.layers(member, ids, &chunk.stretches, places);
                    if !first.is_empty() {
                        frame.logits(member, first);
                    }
                }
            });
            let mut part = first;
            while listening && !part.is_empty() {
                let values = &scratch.logits[..part.len() * sizes.vocabulary];
                listening =
                    receive(Logits { first: received, values }) == ControlFlow::Continue(());
                received += part.len();
                part = pieces.next().unwrap_or_default();
                if listening && !part.is_empty() {
                    let frame = scratch.frame(&self.weights, sizes);
                    self.pool.run(&|member| {
                        // SAFETY: as above.
                        unsafe { frame.logits(member, part) }
                    });
                }
            }
        }
    }
}
