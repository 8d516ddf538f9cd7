//! Sequence mixers: one file a mixer.

mod mamba;

pub use mamba::Mamba;

use elapid_tensor::{DType, Sequences, Shape, Tensor};

use crate::parameter::Visitor;
use crate::{Context, LayerState, Result};

/// A layer that moves information along sequences and carries a state.
pub trait SequenceMixer: Send + Sync {
    /// x [T, D] and, for continued sequences, the state [slots, ...] to (y [T, D], the state after each
    /// sequence's last token). Splitting a sequence anywhere, passing the state on, changes nothing.
    ///
    /// # Errors
    /// If shapes do not fit, or a sequence is continued and there is no state.
    fn forward(
        &self,
        x: &Tensor,
        sequences: &Sequences,
        state: Option<LayerState>,
        context: &mut Context<'_>,
    ) -> Result<(Tensor, LayerState)>;

    /// Names and shapes of the state for a number of slots.
    fn state_shapes(&self, slots: usize) -> Vec<(&'static str, Shape)>;

    /// Derives now what `forward` would derive from parameters alone in every call, and keeps the weights of projections in
    /// the type that they are multiplied in. The mixer does not learn any more.
    ///
    /// # Errors
    /// If there is no memory for it.
    fn run_only(&mut self, compute: DType) -> Result<()>;

    /// Shows every parameter, named `{prefix}.{name}`.
    fn visit(&mut self, prefix: &str, visitor: &mut Visitor<'_>) -> Result<()>;
}
