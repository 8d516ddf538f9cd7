//! The parts of a Mamba block between its projections, token after token, for a stretch of channels on one
//! thread: what decoding and prompts run on when no gradient is wanted.
//!
//! [`Convolution`] is the causal convolution with SiLU, [`Scan`] the Δ projection, softplus, recurrence, skip and gate,
//! [`Normalization`] the addition to the residual stream and the norm. Each works in place on rows that lie a stride
//! apart and on the state as a model's `State` holds it, so a batch of one-token
//! sequences, a prompt or any mixture is the same call; every token's arithmetic is the same in all of them, bit
//! for bit. Definitions are those of [`causal_conv1d`](crate::causal_conv1d) and
//! [`selective_scan`](crate::selective_scan), whose references test these.

mod convolution;
mod normalization;
mod scan;
#[cfg(test)]
mod tests;
mod threes;

pub use convolution::Convolution;
pub use normalization::{Normalization, rms};
pub use scan::{Parameters, Scan};

/// Channels that are worked off together; stretches start at multiples of it.
pub const TILE: usize = 32;

/// Tokens of one sequence in a batch of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// First row.
    pub start: usize,
    /// Number of rows, 0 allowed.
    pub len: usize,
    /// Row of the state [slots, ...] that is read and written.
    pub slot: usize,
    /// True if the sequence starts from nothing here: what the slot holds is not looked at.
    pub fresh: bool,
}

/// Rows of f32 that lie `stride` apart.
#[derive(Debug, Clone, Copy)]
pub struct Rows {
    /// Channel 0 of row 0.
    pub pointer: *mut f32,
    /// From row to row.
    pub stride: usize,
}

/// Which slot's part of the state is worked on after that of the `index`-th stretch in the tile of channels from `first`
/// on, and its first channel.
#[inline(always)]
fn following(stretches: &[Stretch], index: usize, first: usize) -> (usize, usize) {
    match stretches.get(index + 1) {
        Some(next) => (next.slot, first),
        None => (stretches[0].slot, first + TILE),
    }
}

impl Rows {
    /// `len` channels of a row from `channel` on.
    ///
    /// # Safety
    /// They must lie in memory that lives as long as 'a, which nobody else writes meanwhile.
    #[inline(always)]
    unsafe fn get<'a>(self, row: usize, channel: usize, len: usize) -> &'a [f32] {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts(self.pointer.add(row * self.stride + channel), len) }
    }

    /// The same, to be written.
    ///
    /// # Safety
    /// As [`Rows::get`], and nobody else may read them either.
    #[inline(always)]
    unsafe fn get_mut<'a>(self, row: usize, channel: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: the caller's.
        unsafe {
            std::slice::from_raw_parts_mut(self.pointer.add(row * self.stride + channel), len)
        }
    }
}

/// Channels rounded up to whole tiles: how wide rows and parameters are.
pub const fn padded(channels: usize) -> usize {
    channels.next_multiple_of(TILE)
}
