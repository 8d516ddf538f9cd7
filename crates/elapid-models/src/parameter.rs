//! Parameters as the rest of the program sees them: one visit serves checkpoints, optimizer groups and
//! initialisation.

use elapid_tensor::{DType, Tensor};

use crate::Result;

/// What a parameter is to its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A token embedding [V, D].
    Embedding,
    /// A projection [out, in].
    Projection,
    /// Taps of a depthwise convolution; [E, 1, W] in checkpoints, [E, W] here.
    Convolution,
    /// A bias.
    Bias,
    /// Scale of a normalisation.
    Scale,
    /// Weight or bias of the projection to Δ, the step by which a token moves the state.
    DeltaProjection,
    /// The state's own decay (`A_log`), kept in f32.
    Recurrence,
    /// The way past the state (`D`), kept in f32.
    Skip,
}

impl Kind {
    /// True for what decides how long a state is kept: exp(Δ A) is the share of it that outlasts a token.
    pub fn sets_retention(self) -> bool {
        matches!(self, Self::DeltaProjection | Self::Recurrence)
    }
}

/// One parameter of a model.
#[derive(Debug)]
pub struct Parameter<'a> {
    /// Full name, as in the Hugging Face layout: `backbone.layers.0.mixer.in_proj.weight`.
    pub name: String,
    /// The values, a leaf that gradients are taken by.
    pub tensor: &'a mut Tensor,
    /// What it is.
    pub kind: Kind,
    /// Whether weight decay applies (Mamba: neither to biases, scales, `A_log` nor `D`).
    pub decay: bool,
}

/// A function that is shown every parameter of a model, in a fixed order.
pub type Visitor<'v> = dyn FnMut(Parameter<'_>) -> Result<()> + 'v;

/// A linear map y = x Wᵀ (+ b).
#[derive(Debug, Clone)]
pub struct Linear {
    /// [out, in].
    pub weight: Tensor,
    /// [out].
    pub bias: Option<Tensor>,
}

impl Linear {
    /// Keeps the weight in a type from here on, without gradient.
    pub(crate) fn keep_in(&mut self, dtype: DType) -> Result<()> {
        if self.weight.dtype() != dtype {
            self.weight = self.weight.detach().cast(dtype)?;
        }
        Ok(())
    }

    /// Shows weight and bias, named `{prefix}.weight` and `{prefix}.bias`.
    pub fn visit(&mut self, prefix: &str, visitor: &mut Visitor<'_>) -> Result<()> {
        visitor(Parameter {
            name: format!("{prefix}.weight"),
            tensor: &mut self.weight,
            kind: Kind::Projection,
            decay: true,
        })?;
        if let Some(bias) = &mut self.bias {
            visitor(Parameter {
                name: format!("{prefix}.bias"),
                tensor: bias,
                kind: Kind::Bias,
                decay: false,
            })?;
        }
        Ok(())
    }
}
