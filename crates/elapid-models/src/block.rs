//! A pre-norm residual block, ordered so that addition and normalisation fuse
//! (Mamba, figure 3; `res ← hidden + res; hidden ← mixer(norm(res))`).

use elapid_ops::norm::{layer_norm, norm_again, rms_norm};
use elapid_tensor::autograd::with_recipe;
use elapid_tensor::{DType, Sequences, Tensor};

use crate::initialize::Initializer;
use crate::mixers::SequenceMixer;
use crate::parameter::Visitor;
use crate::{Context, Kind, LayerState, MambaConfig, NormKind, Parameter, Result};

/// RMSNorm, or LayerNorm with bias, over the width D.
#[derive(Debug, Clone)]
pub struct Norm {
    weight: Tensor,
    bias: Option<Tensor>,
    eps: f32,
}

impl Norm {
    /// Scale 1 and, for LayerNorm, bias 0.
    pub fn new(config: &MambaConfig, init: &Initializer) -> Result<Self> {
        let bias = match config.norm {
            NormKind::Rms => None,
            NormKind::Layer => Some(init.constant(0.0, &[config.d_model])?),
        };
        Ok(Self {
            weight: init.constant(1.0, &[config.d_model])?,
            bias,
            eps: config.norm_eps as f32,
        })
    }

    /// (norm(x + residual), x + residual), both [T, D].
    pub fn forward(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        Ok(match &self.bias {
            None => rms_norm(x, Some(&self.weight), residual, self.eps)?,
            Some(bias) => layer_norm(x, Some(&self.weight), Some(bias), residual, self.eps)?,
        })
    }

    /// `normed`, which came of `residual`, kept for backward as the recipe to make it of that once more.
    fn remade(&self, normed: Tensor, residual: &Tensor) -> Tensor {
        let mut inputs = vec![residual, &self.weight];
        inputs.extend(&self.bias);
        let (kind, dtype) = ((self.bias.is_some(), self.eps), normed.dtype());
        with_recipe(vec![normed], &inputs, move |inputs| {
            Ok(vec![norm_again(&inputs[0], Some(&inputs[1]), inputs.get(2), kind, dtype)?])
        })
        .swap_remove(0)
    }

    /// Shows `{prefix}.weight` and `{prefix}.bias`.
    pub fn visit(&mut self, prefix: &str, visitor: &mut Visitor<'_>) -> Result<()> {
        visitor(Parameter {
            name: format!("{prefix}.weight"),
            tensor: &mut self.weight,
            kind: Kind::Scale,
            decay: false,
        })?;
        match &mut self.bias {
            None => Ok(()),
            Some(bias) => visitor(Parameter {
                name: format!("{prefix}.bias"),
                tensor: bias,
                kind: Kind::Bias,
                decay: false,
            }),
        }
    }
}

/// Norm and mixer.
pub struct Block {
    norm: Norm,
    mixer: Box<dyn SequenceMixer>,
}

impl Block {
    /// A block around a mixer.
    pub fn new(norm: Norm, mixer: Box<dyn SequenceMixer>) -> Self {
        Self { norm, mixer }
    }

    /// The mixer.
    pub fn mixer(&self) -> &dyn SequenceMixer {
        &*self.mixer
    }

    /// (hidden, residual) [T, D] to the next (hidden, residual) and the mixer's state.
    ///
    /// # Errors
    /// Those of the norm and the mixer.
    pub fn forward(
        &self,
        hidden: &Tensor,
        residual: Option<&Tensor>,
        sequences: &Sequences,
        state: Option<LayerState>,
        context: &mut Context<'_>,
    ) -> Result<(Tensor, Tensor, LayerState)> {
        let (normed, residual) = self.norm.forward(hidden, residual)?;
        context.tap("residual", &residual);
        context.tap("norm", &normed);
        // The first block's norm has the type of the embedding, f32.
        let mut normed = normed.cast(context.compute())?;
        // The residual stream is kept for the norm itself. On a card making it again takes less than a hundredth of a
        // step; the host has the memory.
        if context.recompute() && normed.gpu().is_some() {
            normed = self.norm.remade(normed, &residual);
        }
        let (hidden, state) = context
            .within("mixer", |context| self.mixer.forward(&normed, sequences, state, context))?;
        Ok((hidden, residual, state))
    }

    /// [`SequenceMixer::run_only`] of the mixer.
    pub fn run_only(&mut self, compute: DType) -> Result<()> {
        self.mixer.run_only(compute)
    }

    /// Shows the parameters of norm and mixer.
    pub fn visit(&mut self, prefix: &str, visitor: &mut Visitor<'_>) -> Result<()> {
        self.norm.visit(&format!("{prefix}.norm"), visitor)?;
        self.mixer.visit(&format!("{prefix}.mixer"), visitor)
    }
}
