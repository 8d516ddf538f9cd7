//! The Mamba language model: embedding, blocks, final norm, head (tied to the embedding or not).

use std::sync::Arc;

use elapid_ops::embedding::cuda::TokenIds;
use elapid_ops::embedding::{Ids, embedding};
use elapid_ops::linear_cross_entropy::{
    Reduction, Targets, linear_cross_entropy, linear_cross_entropy_per_token,
    linear_cross_entropy_prepared,
};
use elapid_ops::matmul::linear;
use elapid_tensor::cuda::few_rows;
use elapid_tensor::{DType, Device, Sequences, Shape, Tensor};

use crate::initialize::Initializer;
use crate::mixers::Mamba;
use crate::parameter::Visitor;
use crate::{Block, Context, Error, Kind, LayerState, MambaConfig, Norm, Parameter, Result, State};

/// A Mamba language model.
pub struct LanguageModel {
    config: MambaConfig,
    embedding: Tensor,
    layers: Vec<Block>,
    norm_f: Norm,
    lm_head: Option<Tensor>,
    compute: DType,
    recompute: bool,
}

impl LanguageModel {
    /// A model with initial values drawn under `seed`.
    ///
    /// # Errors
    /// If the configuration makes no sense.
    pub fn new(config: &MambaConfig, seed: u64) -> Result<Self> {
        Self::build(config, &Initializer::new(seed))
    }

    /// A model of zeros, to be loaded.
    ///
    /// # Errors
    /// If the configuration makes no sense.
    pub fn empty(config: &MambaConfig) -> Result<Self> {
        Self::build(config, &Initializer::zeros())
    }

    fn build(config: &MambaConfig, init: &Initializer) -> Result<Self> {
        config.validate()?;
        let (d, v) = (config.d_model, config.padded_vocab_size());
        let layers = (0..config.n_layer)
            .map(|i| {
                let prefix = format!("backbone.layers.{i}.mixer");
                let mixer = Mamba::new(config, &prefix, init)?;
                Ok(Block::new(Norm::new(config, init)?, Box::new(mixer)))
            })
            .collect::<Result<_>>()?;
        let lm_head = (!config.tie_embeddings)
            .then(|| init.uniform("lm_head.weight", 1.0 / (d as f64).sqrt(), &[v, d]))
            .transpose()?;
        Ok(Self {
            config: config.clone(),
            embedding: init.normal("backbone.embeddings.weight", config.embedding_std, &[v, d])?,
            layers,
            norm_f: Norm::new(config, init)?,
            lm_head,
            compute: DType::F32,
            recompute: true,
        })
    }

    /// Where the parameters are, and where the model runs.
    pub fn device(&self) -> Device {
        self.embedding.device()
    }

    /// Whether backward makes cheap activations again (the default) or keeps them: the results are the same, the
    /// memory of a layer is about two fifths more.
    pub fn set_recompute(&mut self, recompute: bool) {
        self.recompute = recompute;
    }

    /// The type that mixers compute in.
    pub fn compute(&self) -> DType {
        self.compute
    }

    /// Moves the parameters to a device, and computes there in f32 or, on a GPU, bf16. Parameters stay f32.
    ///
    /// # Errors
    /// If the device cannot be used or is full, or does not compute in that type.
    pub fn place(&mut self, device: Device, compute: DType) -> Result<()> {
        if !matches!((device, compute), (_, DType::F32) | (Device::Cuda(_), DType::BF16)) {
            return Err(elapid_tensor::Error::Unsupported {
                op: "language_model",
                device,
                dtype: compute,
            }
            .into());
        }
        if compute == DType::BF16
            && let Some(gpu) = device.gpu()?
        {
            gpu.check_bf16().map_err(elapid_tensor::Error::from)?;
        }
        self.compute = compute;
        self.visit(&mut |parameter| {
            let moved = parameter.tensor.detach().to(device)?;
            let tracked = parameter.tensor.tracks_grad();
            *parameter.tensor = if tracked { moved.requires_grad() } else { moved };
            Ok(())
        })
    }

    /// Makes the model one that runs and does not learn: what every call would derive from parameters alone is derived now, and
    /// the weights of the mixers' projections are kept in the type that they are multiplied in, so that calls cast nothing
    /// and, where that type is bf16, these weights take half the memory. What the model computes stays the same, bit for
    /// bit. The embedding and the head stay f32. Once is enough; where parameters were changed afterwards, again.
    ///
    /// # Errors
    /// If there is no memory for one more weight.
    pub fn run_only(&mut self) -> Result<()> {
        let compute = self.compute;
        self.layers.iter_mut().try_for_each(|layer| layer.run_only(compute))
    }

    /// The model's shape.
    pub fn config(&self) -> &MambaConfig {
        &self.config
    }

    /// The blocks, first to last.
    pub fn layers(&self) -> &[Block] {
        &self.layers
    }

    /// Shows every parameter once, under its name in the Hugging Face layout.
    ///
    /// # Errors
    /// Those of the visitor.
    pub fn visit(&mut self, visitor: &mut Visitor<'_>) -> Result<()> {
        visitor(Parameter {
            name: "backbone.embeddings.weight".into(),
            tensor: &mut self.embedding,
            kind: Kind::Embedding,
            decay: true,
        })?;
        for (i, layer) in self.layers.iter_mut().enumerate() {
            layer.visit(&format!("backbone.layers.{i}"), visitor)?;
        }
        self.norm_f.visit("backbone.norm_f", visitor)?;
        match &mut self.lm_head {
            None => Ok(()),
            Some(weight) => visitor(Parameter {
                name: "lm_head.weight".into(),
                tensor: weight,
                kind: Kind::Projection,
                decay: true,
            }),
        }
    }

    /// Names and shapes of every layer's state for a number of slots.
    pub fn state_shapes(&self, slots: usize) -> Vec<Vec<(&'static str, Shape)>> {
        self.layers.iter().map(|layer| layer.mixer().state_shapes(slots)).collect()
    }

    /// The state of `slots` sequences that have seen nothing, where the model is.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn fresh_state(&self, slots: usize) -> Result<State> {
        let layers = self
            .state_shapes(slots)
            .into_iter()
            .map(|shapes| {
                let tensors = shapes.into_iter().map(|(name, shape)| {
                    Ok((name.into(), Tensor::zeros_on(self.device(), DType::F32, shape)?))
                });
                Ok(LayerState::new(tensors.collect::<Result<Vec<_>>>()?))
            })
            .collect::<Result<_>>()?;
        Ok(State { layers, positions: vec![0; slots] })
    }

    /// Checks that a state has this model's layers, names and shapes.
    ///
    /// # Errors
    /// [`Error::State`] with the first difference.
    pub fn check_state(&self, state: &State) -> Result<()> {
        let expected = self.state_shapes(state.slots());
        if expected.len() != state.layers.len() {
            return Err(Error::State(format!(
                "{} layers, expected {}",
                state.layers.len(),
                expected.len()
            )));
        }
        for (i, (shapes, layer)) in expected.iter().zip(&state.layers).enumerate() {
            for (name, shape) in shapes {
                match layer.get(name) {
                    Some(tensor) if tensor.shape() == *shape => {}
                    found => {
                        let found = found.map_or("nothing".into(), |t| t.shape().to_string());
                        return Err(Error::State(format!(
                            "layer {i}, {name}: expected shape {shape}, found {found}"
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    /// Token ids [T] (u32) to normalised hidden states [T, D] and the state after each sequence. Ids are on the host
    /// or prepared; a state is moved to where the model is.
    ///
    /// # Errors
    /// If an id is outside the vocabulary, the number of ids is not that of the sequences, or the state is
    /// missing or of another model.
    pub fn hidden<'a>(
        &self,
        ids: impl Into<Ids<'a>>,
        sequences: &Sequences,
        state: Option<State>,
        context: &mut Context<'_>,
    ) -> Result<(Tensor, State)> {
        let ids = ids.into();
        if ids.tokens() != sequences.tokens() {
            let message = format!(
                "{} token ids, but the sequences have {} tokens",
                ids.tokens(),
                sequences.tokens()
            );
            return Err(elapid_tensor::Error::argument("language_model", message).into());
        }
        context.set_compute(self.compute, self.recompute);
        let mut positions = vec![0; sequences.slots()];
        let mut states: Vec<Option<LayerState>> = match state {
            Some(state) => {
                if state.slots() != sequences.slots() {
                    return Err(Error::State(format!(
                        "{} slots, expected {}",
                        state.slots(),
                        sequences.slots()
                    )));
                }
                self.check_state(&state)?;
                let state = state.to(self.device())?;
                positions = state.positions;
                state.layers.into_iter().map(Some).collect()
            }
            None if sequences.any_continued() => {
                return Err(Error::State("a sequence is continued, but there is no state".into()));
            }
            None => vec![None; self.layers.len()],
        };

        let mut hidden = embedding(ids, &self.embedding)?;
        context.tap("backbone.embeddings", &hidden);
        let mut residual: Option<Tensor> = None;
        let mut layers = Vec::with_capacity(self.layers.len());
        for (i, (layer, state)) in self.layers.iter().zip(&mut states).enumerate() {
            let (next, stream, state) =
                context.within(&format!("backbone.layers.{i}"), |context| {
                    layer.forward(&hidden, residual.as_ref(), sequences, state.take(), context)
                })?;
            hidden = next;
            residual = Some(stream);
            layers.push(state);
        }
        let (hidden, _) = self.norm_f.forward(&hidden, residual.as_ref())?;
        context.tap("backbone.norm_f", &hidden);
        for sequence in sequences {
            let seen = &mut positions[sequence.slot];
            *seen =
                if sequence.continued { *seen } else { sequence.position } + sequence.len as u64;
        }
        Ok((hidden, State { layers, positions }))
    }

    /// Hidden states [K, D] to logits [K, V] in f32, padded rows included. On a GPU it is fastest for up to some dozens of
    /// rows at a time.
    ///
    /// # Errors
    /// If the width is another.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(few_rows(|| linear(&hidden.cast(DType::F32)?, self.head(), None))?)
    }

    /// Mean cross-entropy in nats over the tokens whose target is not -100, and the state after each
    /// sequence. `targets[t]` is the token that follows `ids[t]`.
    ///
    /// # Errors
    /// As [`LanguageModel::hidden`]; also if a target is outside the vocabulary.
    pub fn loss(
        &self,
        ids: &Tensor,
        targets: &[i64],
        sequences: &Sequences,
        state: Option<State>,
        context: &mut Context<'_>,
    ) -> Result<(Tensor, State)> {
        let (hidden, state) = self.hidden(ids, sequences, state, context)?;
        let targets = Tensor::from_slice(targets, [targets.len()])?;
        let loss = linear_cross_entropy(
            &hidden,
            self.head(),
            &targets,
            self.config.vocab_size,
            Reduction::Mean,
        )?;
        context.tap("loss", &loss);
        Ok((loss, state))
    }

    /// [`LanguageModel::loss`] on a GPU, of ids and targets that were prepared there.
    ///
    /// # Errors
    /// As [`LanguageModel::loss`].
    pub fn loss_prepared(
        &self,
        ids: &Arc<TokenIds>,
        targets: &Arc<Targets>,
        sequences: &Sequences,
        state: Option<State>,
        context: &mut Context<'_>,
    ) -> Result<(Tensor, State)> {
        let (hidden, state) = self.hidden(Ids::Prepared(ids), sequences, state, context)?;
        let loss = linear_cross_entropy_prepared(&hidden, self.head(), targets)?;
        context.tap("loss", &loss);
        Ok((loss, state))
    }

    /// Cross-entropy of every token in nats (0 where the target is -100), and the state. Records nothing.
    ///
    /// # Errors
    /// As [`LanguageModel::loss`].
    pub fn losses(
        &self,
        ids: &Tensor,
        targets: &[i64],
        sequences: &Sequences,
        state: Option<State>,
    ) -> Result<(Vec<f32>, State)> {
        elapid_tensor::autograd::no_grad(|| {
            let (hidden, state) = self.hidden(ids, sequences, state, &mut Context::new())?;
            let targets = Tensor::from_slice(targets, [targets.len()])?;
            let losses = linear_cross_entropy_per_token(
                &hidden,
                self.head(),
                &targets,
                self.config.vocab_size,
            )?;
            Ok((losses.to_vec()?, state))
        })
    }

    fn head(&self) -> &Tensor {
        self.lm_head.as_ref().unwrap_or(&self.embedding)
    }
}
