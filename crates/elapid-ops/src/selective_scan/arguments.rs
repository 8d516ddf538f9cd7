//! What a selective scan is given, as plain slices: the form that the reference and the CPU code share.

use elapid_tensor::{RowView, Sequences};

/// An input map B or output map C.
#[derive(Debug, Clone, Copy)]
pub enum Projection<'a, T> {
    /// `[T, G, N]` (selective): one map a token and group; channel `c` of `E` uses group `c / (E / G)`.
    Token {
        /// Rows of `G * N` numbers.
        rows: RowView<'a, T>,
        /// Number of groups `G`.
        groups: usize,
    },
    /// `[E, N]`: one map a channel, the same for all tokens.
    Constant(&'a [T]),
}

/// Arguments of the scan. Where `complex`, each number of `a`, `b`, `c` and `h0` is a pair (re, im), so that
/// their last extent doubles.
#[derive(Debug, Clone, Copy)]
pub struct Arguments<'a, T> {
    /// Channels `E`.
    pub channels: usize,
    /// States per channel `N`.
    pub states: usize,
    /// Whether A, B, C and h are complex.
    pub complex: bool,
    /// Input `[T, E]`.
    pub u: RowView<'a, T>,
    /// Step δ before bias and softplus, `[T, E]`.
    pub delta: RowView<'a, T>,
    /// Decay rates `[E, N]`, with negative real part.
    pub a: &'a [T],
    /// Input map B.
    pub b: Projection<'a, T>,
    /// Output map C.
    pub c: Projection<'a, T>,
    /// Skip `[E]`.
    pub d: Option<&'a [T]>,
    /// Gate `[T, E]`.
    pub z: Option<RowView<'a, T>>,
    /// Added to δ, `[E]`.
    pub delta_bias: Option<&'a [T]>,
    /// Whether Δ is the softplus of δ + bias.
    pub delta_softplus: bool,
    /// State `[slots, E, N]` that continued sequences start from (zero without it).
    pub h0: Option<&'a [T]>,
    /// The sequences of the batch.
    pub sequences: &'a Sequences,
}

impl<T> Arguments<'_, T> {
    /// Numbers in a state element: 2 if complex, else 1.
    pub fn parts(&self) -> usize {
        if self.complex { 2 } else { 1 }
    }

    /// Groups `G` of B and C (which agree unless constant).
    pub fn groups(&self) -> usize {
        self.b.groups().max(self.c.groups())
    }

    /// Length of `[E, N]` arrays.
    pub fn matrix_len(&self) -> usize {
        self.channels * self.states * self.parts()
    }

    /// Length of the states `[slots, E, N]`.
    pub fn state_len(&self) -> usize {
        self.sequences.slots() * self.matrix_len()
    }
}

impl<T> Projection<'_, T> {
    /// Number of groups; 1 if constant.
    pub fn groups(&self) -> usize {
        match self {
            Self::Token { groups, .. } => *groups,
            Self::Constant(_) => 1,
        }
    }

    /// True if the same for all tokens.
    pub fn is_constant(&self) -> bool {
        matches!(self, Self::Constant(_))
    }
}

/// Gradients of a scan, in the shapes of [`Arguments`]; B and C `[T, G, N]` or `[E, N]`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Gradients<V> {
    /// By u.
    pub u: V,
    /// By δ.
    pub delta: V,
    /// By A.
    pub a: V,
    /// By B.
    pub b: V,
    /// By C.
    pub c: V,
    /// By D; empty without D.
    pub d: V,
    /// By z; empty without a gate.
    pub z: V,
    /// By the bias; empty without one.
    pub delta_bias: V,
    /// By the incoming state; empty without one.
    pub h0: V,
}
