//! Gradients that are sums over channels or over tokens: written as partial sums of fixed extent and added in a
//! fixed order, so that no result depends on the number of threads.

use elapid_tensor::Buffer;

use super::arguments::{Arguments, Projection};
use super::backward::ProjectionGradient;
use super::cpu::for_each;
use super::scratch::Shared;
use super::tile::Tiles;

/// Partial sums of dB or dC.
pub(super) enum Partial {
    /// `[partitions of a group, T, G, N]` and the length of one.
    Token(Buffer<f32>, usize),
    /// `[runs, E, N]` and the length of one.
    Constant(Vec<f64>, usize),
}

impl Partial {
    /// Room for every partition of a group, or for every run.
    pub(super) fn new(
        x: &Arguments<'_, f32>,
        projection: &Projection<'_, f32>,
        runs: usize,
        tiles: &Tiles,
    ) -> Self {
        match projection {
            Projection::Token { groups, .. } => {
                let len = x.sequences.tokens() * groups * x.states * x.parts();
                Self::Token(Buffer::scratch(tiles.per_group() * len), len)
            }
            Projection::Constant(_) => {
                Self::Constant(vec![0.0; runs * x.matrix_len()], x.matrix_len())
            }
        }
    }

    /// Where the units write.
    pub(super) fn share(&mut self) -> ProjectionGradient {
        match self {
            Self::Token(partial, _) => ProjectionGradient::Token(Shared::new(partial)),
            Self::Constant(partial, _) => ProjectionGradient::Constant(Shared::new(partial)),
        }
    }

    /// The sum over partitions or runs, in order.
    pub(super) fn sum(self, parallel: bool) -> Buffer<f32> {
        const BAND: usize = 4096;
        match self {
            Self::Token(partial, len) if partial.len() == len => partial,
            Self::Token(partial, len) => {
                let mut sum = Buffer::scratch(len);
                let out = Shared::new(&mut sum);
                for_each(parallel, len.div_ceil(BAND), |band| {
                    let start = band * BAND;
                    // SAFETY: bands are disjoint.
                    let out = unsafe { out.part(start, BAND.min(len - start)) };
                    out.copy_from_slice(&partial[start..start + out.len()]);
                    for partial in partial.chunks_exact(len).skip(1) {
                        for (out, term) in out.iter_mut().zip(&partial[start..]) {
                            *out += term;
                        }
                    }
                });
                sum
            }
            Self::Constant(partial, len) => sum_runs(&partial, len),
        }
    }
}

/// The sum over rows of `len` numbers, in order; nothing if `len` is 0.
pub(super) fn sum_runs(partial: &[f64], len: usize) -> Buffer<f32> {
    let mut sum = vec![0.0; len];
    for row in partial.chunks_exact(len.max(1)).filter(|_| len > 0) {
        for (sum, term) in sum.iter_mut().zip(row) {
            *sum += term;
        }
    }
    let mut out = Buffer::scratch(len);
    for (out, sum) in out.iter_mut().zip(sum) {
        *out = sum as f32;
    }
    out
}
