//! Parallel work within one sequence, for models with too few channels to occupy the machine: a long sequence is
//! cut into segments that are scanned at the same time.
//!
//! The recurrence is linear, so a segment maps the state before it to `exp(A ΣΔ) h + e`, where e is its final
//! state from zero. One pass finds every e, a short serial pass combines them, and then all segments run as
//! pieces of their own from their true states. Backward is the mirror image. It costs a second pass over the
//! recurrence; whether a sequence is cut depends only on the channels and its own length, so the bits of its
//! results do not depend on the batch or on the threads.

use std::marker::PhantomData;
use std::ops::Range;

use elapid_tensor::{RowView, Sequence};
use pulp::{Simd, WithSimd};

use super::arguments::{Arguments, Projection};
use super::field::Field;
use super::forward::scale_rates;
use super::scratch::{Scratch, Shared, padded};
use super::stage::stage;
use super::tile::{CHUNK, Coefficients, Tile, gather, load_vectors, scatter, steps_stride};
use crate::simd::{decay_constants, load, silu, store};

/// Tokens of a segment, a whole number of chunks.
const SEGMENT: usize = 16 * CHUNK;
/// Sequences of at least so many tokens are cut.
const LONG: usize = 4 * SEGMENT;
/// Up to so many channels.
const FEW_CHANNELS: usize = 64;

/// The segments of a sequence as ranges of its own tokens; one for a sequence that is not cut.
pub(super) fn segments(channels: usize, sequence: &Sequence) -> impl Iterator<Item = Range<usize>> {
    let len = sequence.len;
    let size = if channels <= FEW_CHANNELS && len >= LONG { SEGMENT } else { len.max(1) };
    (0..len).step_by(size).map(move |start| start..len.min(start + size))
}

/// Adds to each segment's own end what the segments before it leave: `ends[k] += exp(A ΣΔ_k) ends[k-1]`, with
/// `ends` `[K, E, N]` and `delta_sums` `[K, E]` in the order in which the state passes them. `conjugate` for
/// the gradient.
pub(super) fn combine(
    x: &Arguments<'_, f32>,
    ends: &mut [f32],
    delta_sums: &[f32],
    conjugate: bool,
) {
    let (len, parts) = (x.matrix_len(), x.parts());
    let segments = ends.len() / len.max(1);
    for k in 1..segments {
        let (before, own) = ends.split_at_mut(k * len);
        let before = &before[(k - 1) * len..];
        for (c, sum) in delta_sums[k * x.channels..][..x.channels].iter().enumerate() {
            for n in 0..x.states {
                let i = (c * x.states + n) * parts;
                let size = (x.a[i] * sum).exp();
                if parts == 1 {
                    own[i] += size * before[i];
                } else {
                    let (sin, cos) = (x.a[i + 1] * sum).sin_cos();
                    let sin = if conjugate { -sin } else { sin };
                    own[i] += size * (cos * before[i] - sin * before[i + 1]);
                    own[i + 1] += size * (cos * before[i + 1] + sin * before[i]);
                }
            }
        }
    }
}

/// The gradient by the state before a segment, from a gradient after it: only the recurrence of G.
pub(super) struct GradientUnit<'a, F> {
    pub x: &'a Arguments<'a, f32>,
    pub dy: RowView<'a, f32>,
    pub tokens: Range<usize>,
    /// Gradient `[E, N]` by the state after the segment; zero without one.
    pub after: Option<&'a [f32]>,
    /// `[rows, E, N]`
    pub before: &'a Shared<f32>,
    /// Sums of Δ `[rows, E]`.
    pub delta_sums: &'a Shared<f32>,
    pub row: usize,
    pub tile: Tile,
    pub field: PhantomData<F>,
}

impl<F: Field> WithSimd for GradientUnit<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (x, tile, lanes) = (self.x, &self.tile, S::F32_LANES);
        let vectors = tile.vectors::<S>();
        let numbers = x.states * F::PARTS;
        let matrix = vectors * numbers * lanes;
        let rows = vectors * steps_stride::<S>(CHUNK);
        let mut scratch = Scratch::take();
        let mut parts =
            scratch.parts(3 * padded(matrix) + 3 * padded(rows) + padded(vectors * lanes));
        let (rates, c) = (parts.take(matrix), parts.take(matrix));
        let carry = parts.take(matrix);
        let (delta, delta_u, dy) = (parts.take(rows), parts.take(rows), parts.take(rows));
        let delta_sum = parts.take(vectors * lanes);

        gather::<S, F>(simd, tile, x.states, x.a, rates);
        scale_rates::<S, F>(simd, rates);
        if let Projection::Constant(values) = x.c {
            gather::<S, F>(simd, tile, x.states, values, c);
        }
        match self.after {
            Some(after) => gather::<S, F>(simd, tile, x.states, after, carry),
            None => carry.fill(0.0),
        }
        delta_sum.fill(0.0);

        let mut end = self.tokens.end;
        while end > self.tokens.start {
            let steps = match (end - self.tokens.start) % CHUNK {
                0 => CHUNK,
                rest => rest,
            };
            end -= steps;
            let stride = steps_stride::<S>(steps);
            let staged = (&mut *delta, &mut *delta_u, &mut [][..]);
            stage::<S, false>(simd, x, tile, end, steps, staged, delta_sum);
            for i in 0..steps {
                for v in 0..vectors {
                    let [mut value] = load_vectors(simd, tile.row(&self.dy, end + i), v);
                    if let Some(z) = &x.z {
                        let [z] = load_vectors(simd, tile.row(z, end + i), v);
                        value = simd.mul_f32s(value, silu(simd, z));
                    }
                    if F::PARTS == 2 {
                        value = simd.mul_f32s(value, simd.splat_f32s(F::OUTPUT));
                    }
                    store(simd, &mut dy[v * stride + i * lanes..], value);
                }
            }
            for v in 0..vectors {
                let at = v * numbers * lanes;
                for n in 0..x.states {
                    let at = at + n * F::PARTS * lanes;
                    let c = if x.c.is_constant() { &c[v * numbers * lanes..] } else { &[] };
                    let place = (tile.group, x.states);
                    let c = Coefficients::new::<S, F>(&x.c, c, end, steps, place, (n, 1));
                    let (rates, carry) = (&rates[at..], &mut carry[at..at + F::PARTS * lanes]);
                    let rows = v * stride..v * stride + steps * lanes;
                    gradient_row::<S, F>(simd, &delta[rows.clone()], &dy[rows], rates, c, carry);
                }
            }
        }

        let begin = (self.row * x.channels + tile.first) * numbers;
        // SAFETY: tiles are disjoint in channels and segments in rows.
        let before = unsafe { self.before.part(begin, tile.width * numbers) };
        scatter::<S, F>(simd, tile, x.states, carry, before);
        // SAFETY: as above.
        let sums = unsafe { self.delta_sums.part(self.row * x.channels + tile.first, tile.width) };
        sums.copy_from_slice(&delta_sum[..tile.width]);
    }
}

/// g <- exp(Δ_t A)* (C_t* dy_t + g) from the last step to the first, for one state of one vector.
#[inline(always)]
fn gradient_row<S: Simd, F: Field>(
    simd: S,
    delta: &[f32],
    dy: &[f32],
    rates: &[f32],
    c: Coefficients,
    carry: &mut [f32],
) {
    assert!(rates.len() >= F::PARTS * S::F32_LANES && carry.len() == F::PARTS * S::F32_LANES);
    let constants = decay_constants(simd);
    // SAFETY: one number each, asserted above.
    let (rate, mut g) = unsafe { (F::load(simd, rates.as_ptr()), F::load(simd, carry.as_ptr())) };
    for (t, (delta, dy)) in
        delta.chunks_exact(S::F32_LANES).zip(dy.chunks_exact(S::F32_LANES)).enumerate().rev()
    {
        // SAFETY: t is within the steps that c was made for.
        let c = unsafe { c.get::<S, F, false>(simd, t, 0) };
        let gradient = F::scale_conj_add(simd, load(simd, dy), c, g);
        let [decay] = F::decays::<S, 1, true>(simd, &constants, load(simd, delta), [rate]);
        g = F::conj_mul(simd, decay, gradient);
    }
    // SAFETY: one number.
    unsafe { F::store(simd, carry.as_mut_ptr(), g) };
}
