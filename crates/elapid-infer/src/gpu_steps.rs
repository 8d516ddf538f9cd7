//! Decode steps on a GPU: recorded once for a number of sequences, then one launch a token.
//!
//! A step of one token has a few hundred launches that each take the card less time than the host. The state of
//! recorded steps stays where it is and is changed there; a sequence that leaves or joins ends the recording.

use std::sync::Arc;

use elapid_models::{Context, LanguageModel, State};
use elapid_ops::embedding::Ids;
use elapid_ops::embedding::cuda::TokenIds;
use elapid_tensor::cuda::{Gpu, Graph};
use elapid_tensor::{Sequences, Tensor};

use crate::Result;

/// What decode steps keep in the memory of a GPU.
pub(crate) struct GpuSteps {
    gpu: Gpu,
    /// The number of sequences of the last step, whose kernels have run.
    warm: usize,
    recorded: Option<Recorded>,
}

struct Recorded {
    graph: Graph,
    ids: Arc<TokenIds>,
    /// Where the graph reads the state and leaves it.
    state: State,
    logits: Tensor,
    /// The launches read its tables.
    _sequences: Sequences,
}

impl GpuSteps {
    pub(crate) fn new(gpu: Gpu) -> Self {
        Self { gpu, warm: 0, recorded: None }
    }

    /// One token for each sequence: logits [S, V] and the state after it.
    pub(crate) fn step(
        &mut self,
        model: &LanguageModel,
        ids: &[u32],
        sequences: &Sequences,
        state: State,
    ) -> Result<(Tensor, State)> {
        let count = ids.len();
        if self.recorded.as_ref().is_some_and(|recorded| !recorded.continues(&state)) {
            self.recorded = None;
        }
        if self.recorded.is_none() && self.warm == count {
            self.recorded = Some(self.record(model, ids, sequences, &state)?);
        }
        self.warm = count;
        let Some(recorded) = &mut self.recorded else {
            let ids = Tensor::from_slice(ids, [count])?;
            let (hidden, state) =
                model.hidden(&ids, sequences, Some(state), &mut Context::new())?;
            return Ok((model.logits(&hidden)?, state));
        };
        drop(state);
        if let Some(place) = Arc::get_mut(&mut recorded.ids) {
            place.write(ids)?;
        }
        // SAFETY: the recording's own ids, tables, state and logits are where they were; the model is borrowed by the
        // caller for as long as steps are made.
        unsafe { recorded.graph.launch()? };
        for position in &mut recorded.state.positions {
            *position += 1;
        }
        Ok((recorded.logits.clone(), recorded.state.clone()))
    }

    /// Records a step from `state`, whose values become the recording's own.
    fn record(
        &self,
        model: &LanguageModel,
        ids: &[u32],
        sequences: &Sequences,
        state: &State,
    ) -> Result<Recorded> {
        let all: Vec<usize> = (0..state.slots()).collect();
        // A copy that nobody shares.
        let mut own = state.select(&all)?;
        let classes = model.config().padded_vocab_size();
        let ids = Arc::new(TokenIds::upload(&self.gpu, ids, classes)?);
        // What a step derives from the division is made before the recording, by a step whose results are dropped.
        let run = |state: State| -> Result<(Tensor, State)> {
            let ids = Ids::Prepared(&ids);
            let (hidden, state) = model.hidden(ids, sequences, Some(state), &mut Context::new())?;
            Ok((model.logits(&hidden)?, state))
        };
        run(own.clone())?;
        let (logits, graph) = self.gpu.record(|| -> Result<Tensor> {
            let (logits, after) = run(own.clone())?;
            own.overwrite(&after)?;
            Ok(logits)
        })?;
        // Nothing has been carried out yet.
        own.positions.clone_from(&state.positions);
        Ok(Recorded { graph, ids, state: own, logits, _sequences: sequences.clone() })
    }
}

impl Recorded {
    /// True if the state is the one that the recording left.
    fn continues(&self, state: &State) -> bool {
        let tensors = |state: &State| -> Vec<Tensor> {
            state.layers.iter().flat_map(|l| l.iter()).map(|(_, t)| t.clone()).collect()
        };
        state.positions == self.state.positions
            && tensors(state).iter().zip(tensors(&self.state)).all(|(a, b)| a.is_same(&b))
    }
}
