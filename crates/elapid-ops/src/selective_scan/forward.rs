//! The forward scan of one piece of a sequence over one channel tile.
//!
//! Channels are lanes. A chunk of time is worked off in three passes: Δ and Δu of the whole tile into scratch
//! that stays in the first-level cache (softplus is paid once a step and channel); then per vector and block of
//! states the recurrence, with the block's states in registers and y summed in scratch; then skip, gate and
//! store. The order of additions depends on nothing but N.

use std::marker::PhantomData;

use pulp::{Simd, WithSimd};

use super::arguments::{Arguments, Projection};
use super::field::Field;
use super::scratch::{Parts, Scratch, Shared, padded};
use super::stage::stage;
use super::tile::{
    AHEAD, CHUNK, Coefficients, Spot, TOGETHER, Tile, gather, largest, load_step, load_vectors,
    raise, scatter, steps_stride, store_vectors,
};
use crate::simd::{DECAY_RANGE, decay_constants, silu_each};

/// A stretch of a sequence that is scanned in one go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece<'a> {
    /// First token.
    pub start: usize,
    /// Number of tokens.
    pub len: usize,
    /// Number of the first chunk among those of all sequences.
    pub first_chunk: usize,
    /// State before the first token, `[E, N]`; zero without one.
    pub begin: Option<&'a [f32]>,
    /// Row of the state after the last token, if it is wanted.
    pub end: Option<usize>,
}

/// What all units of a forward share.
pub(super) struct Output {
    /// `[T, E]`; without it only states are computed.
    pub y: Option<Shared<f32>>,
    /// `[rows, E, N]`, written where a piece has an end.
    pub last: Shared<f32>,
    /// States at chunk starts `[chunks, N, parts, E]`.
    pub chunk_states: Option<Shared<f32>>,
    /// Sums of Δ over pieces `[rows, E]`, written where a piece has an end.
    pub delta_sums: Option<Shared<f32>>,
}

/// One piece over one tile.
pub(super) struct ForwardUnit<'a, F> {
    pub x: &'a Arguments<'a, f32>,
    pub output: &'a Output,
    pub piece: Piece<'a>,
    pub tile: Tile,
    pub field: PhantomData<F>,
}

/// States kept in registers by a block: what sixteen registers hold beside the temporaries.
const BLOCK: usize = 4;
/// The same where there are thirty-two registers (AVX-512).
const WIDE_BLOCK: usize = 8;
/// States of a block whose decays are computed together.
const GROUP: usize = 4;

impl<F: Field> WithSimd for ForwardUnit<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let lanes = S::F32_LANES;
        let numbers = self.x.states * F::PARTS;
        let matrix = padded(self.tile.vectors::<S>() * numbers * lanes);
        let steps = CHUNK.min(self.piece.len);
        let rows = padded(self.tile.vectors::<S>() * steps_stride::<S>(steps));
        let width = padded(self.tile.vectors::<S>() * lanes);
        let mut scratch = Scratch::take();
        self.run(simd, &mut scratch.parts(4 * matrix + 3 * rows + width));
    }
}

impl<F: Field> ForwardUnit<'_, F> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S, scratch: &mut Parts<'_>) {
        let Self { x, output, piece, tile, .. } = self;
        let (lanes, vectors) = (S::F32_LANES, tile.vectors::<S>());
        let numbers = x.states * F::PARTS;
        let matrix = vectors * numbers * lanes;
        let capacity = vectors * steps_stride::<S>(CHUNK.min(piece.len));

        let a = scratch.take(matrix);
        let h = scratch.take(matrix);
        let b = scratch.take(if x.b.is_constant() { matrix } else { 0 });
        let c = scratch.take(if x.c.is_constant() { matrix } else { 0 });
        let delta = scratch.take(capacity);
        let delta_u = scratch.take(capacity);
        let y = scratch.take(capacity);
        let delta_sum = scratch.take(vectors * lanes);

        gather::<S, F>(simd, &tile, x.states, x.a, a);
        let largest_rate = scale_rates::<S, F>(simd, a);
        if let Projection::Constant(values) = x.b {
            gather::<S, F>(simd, &tile, x.states, values, b);
        }
        if let Projection::Constant(values) = x.c {
            gather::<S, F>(simd, &tile, x.states, values, c);
        }
        match piece.begin {
            Some(state) => gather::<S, F>(simd, &tile, x.states, state, h),
            None => h.fill(0.0),
        }
        delta_sum.fill(0.0);

        let mut done = 0;
        while done < piece.len {
            let steps = CHUNK.min(piece.len - done);
            let start = piece.start + done;
            if let Some(saved) = output.chunk_states {
                let chunk = piece.first_chunk + done / CHUNK;
                save_chunk::<S, F>(simd, &saved, chunk, x, &tile, h);
            }
            let stride = steps_stride::<S>(steps);
            let y = &mut y[..vectors * stride];
            let staged = (&mut *delta, &mut *delta_u, &mut [][..]);
            let most = stage::<S, false>(simd, x, &tile, start, steps, staged, delta_sum);
            y.fill(0.0);
            let in_range = most * largest_rate < DECAY_RANGE;
            for v in 0..vectors {
                let rows = v * stride..v * stride + steps * lanes;
                let part = v * numbers * lanes..(v + 1) * numbers * lanes;
                let vector = Vector {
                    delta: &delta[rows.clone()],
                    delta_u: &delta_u[rows.clone()],
                    y: &mut y[rows],
                    a: &a[part.clone()],
                    h: &mut h[part.clone()],
                };
                let b = if x.b.is_constant() { &b[part.clone()] } else { &[] };
                let c = if x.c.is_constant() { &c[part] } else { &[] };
                if x.b.is_constant() || x.c.is_constant() {
                    blocks::<S, F, true, false>(simd, x, (tile.group, start), vector, b, c);
                } else if in_range {
                    blocks::<S, F, false, true>(simd, x, (tile.group, start), vector, b, c);
                } else {
                    blocks::<S, F, true, true>(simd, x, (tile.group, start), vector, b, c);
                }
            }
            if let Some(out) = output.y {
                finish::<S, F>(simd, x, &tile, start, steps, y, &out);
            }
            done += steps;
        }

        if let Some(row) = piece.end {
            let begin = (row * x.channels + tile.first) * numbers;
            // SAFETY: tiles are disjoint in channels and pieces in rows.
            let last = unsafe { output.last.part(begin, tile.width * numbers) };
            scatter::<S, F>(simd, &tile, x.states, h, last);
            if let Some(sums) = output.delta_sums {
                // SAFETY: as above.
                let sums = unsafe { sums.part(row * x.channels + tile.first, tile.width) };
                sums.copy_from_slice(&delta_sum[..tile.width]);
            }
        }
    }
}

/// Multiplies the real part of the gathered A by log2 e, for exp2; returns its largest magnitude.
#[inline(always)]
pub(super) fn scale_rates<S: Simd, F: Field>(simd: S, a: &mut [f32]) -> f32 {
    let mut most = simd.splat_u32s(0);
    for a in a.chunks_exact_mut(F::PARTS * S::F32_LANES) {
        let (head, _) = S::as_mut_simd_f32s(&mut a[..S::F32_LANES]);
        for rate in head {
            *rate = simd.mul_f32s(*rate, simd.splat_f32s(std::f32::consts::LOG2_E));
            most = raise(simd, most, *rate);
        }
    }
    largest(simd, most)
}

/// Saves the states of a tile as `[N, parts, E]`, which backward reads a vector at a time.
#[inline(always)]
fn save_chunk<S: Simd, F: Field>(
    _simd: S,
    saved: &Shared<f32>,
    chunk: usize,
    x: &Arguments<'_, f32>,
    tile: &Tile,
    h: &[f32],
) {
    let (lanes, numbers) = (S::F32_LANES, x.states * F::PARTS);
    for v in 0..tile.vectors::<S>() {
        let (first, count) = tile.span::<S>(v);
        for i in 0..numbers {
            let at = (chunk * numbers + i) * x.channels + first;
            // SAFETY: tiles are disjoint in channels and pieces in chunks.
            let row = unsafe { saved.part(at, count) };
            row.copy_from_slice(&h[(v * numbers + i) * lanes..][..count]);
        }
    }
}

/// One vector of channels over a chunk: its rows, and rates and states, of all numbers or of a block of them.
struct Vector<'a> {
    delta: &'a [f32],
    delta_u: &'a [f32],
    y: &'a mut [f32],
    a: &'a [f32],
    h: &'a mut [f32],
}

/// All blocks of states of one vector over a chunk; B and C where they are constant.
#[inline(always)]
fn blocks<S: Simd, F: Field, const CLAMP: bool, const TOKEN: bool>(
    simd: S,
    x: &Arguments<'_, f32>,
    (group, start): (usize, usize),
    vector: Vector<'_>,
    b: &[f32],
    c: &[f32],
) {
    let Vector { delta, delta_u, y, a, h } = vector;
    let size = F::PARTS * S::F32_LANES;
    let steps = delta.len() / S::F32_LANES;
    let mut n = 0;
    while n < x.states {
        let block = match x.states - n {
            WIDE_BLOCK.. if S::F32_LANES == 16 => WIDE_BLOCK,
            BLOCK.. => BLOCK,
            _ => 1,
        };
        let place = (group, x.states);
        let b = Coefficients::new::<S, F>(&x.b, b, start, steps, place, (n, block));
        let c = Coefficients::new::<S, F>(&x.c, c, start, steps, place, (n, block));
        let a = &a[n * size..(n + block) * size];
        let h = &mut h[n * size..(n + block) * size];
        let own = Vector { delta, delta_u, y: &mut *y, a, h };
        match block {
            WIDE_BLOCK => scan_block::<S, F, WIDE_BLOCK, GROUP, CLAMP, TOKEN>(simd, own, b, c),
            BLOCK => scan_block::<S, F, BLOCK, GROUP, CLAMP, TOKEN>(simd, own, b, c),
            _ => scan_block::<S, F, 1, 1, CLAMP, TOKEN>(simd, own, b, c),
        }
        n += block;
    }
}

/// h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t and y_t += Re(C_t h_t) for `NB` states of one vector of channels,
/// decays in groups of `G`.
#[inline(always)]
fn scan_block<
    S: Simd,
    F: Field,
    const NB: usize,
    const G: usize,
    const CLAMP: bool,
    const TOKEN: bool,
>(
    simd: S,
    vector: Vector<'_>,
    b: Coefficients,
    c: Coefficients,
) {
    let Vector { delta, delta_u, y, a, h } = vector;
    let size = F::PARTS * S::F32_LANES;
    const { assert!(NB.is_multiple_of(G)) };
    assert!(a.len() == NB * size && h.len() == NB * size);
    let (delta, _) = S::as_simd_f32s(delta);
    let (delta_u, _) = S::as_simd_f32s(delta_u);
    let (y, _) = S::as_mut_simd_f32s(y);
    let constants = decay_constants(simd);
    let constants = std::hint::black_box(&constants);
    let mut state = [F::zero(simd); NB];
    for (i, state) in state.iter_mut().enumerate() {
        // SAFETY: h holds NB numbers.
        *state = unsafe { F::load(simd, h.as_ptr().add(i * size)) };
    }
    for (t, ((&delta, &delta_u), y)) in delta.iter().zip(delta_u).zip(y).enumerate() {
        let mut sum = *y;
        for group in (0..NB).step_by(G) {
            let mut rates = [F::zero(simd); G];
            for (i, rate) in rates.iter_mut().enumerate() {
                // SAFETY: a holds NB numbers, a whole number of groups.
                *rate = unsafe { F::load(simd, a.as_ptr().add((group + i) * size)) };
            }
            let decays = F::decays::<S, G, CLAMP>(simd, constants, delta, rates);
            for (i, &decay) in decays.iter().enumerate() {
                let i = group + i;
                // SAFETY: t and i are within the steps and block of b and c.
                let (b, c) =
                    unsafe { (b.get::<S, F, TOKEN>(simd, t, i), c.get::<S, F, TOKEN>(simd, t, i)) };
                state[i] = F::mul_add(simd, decay, state[i], F::scale(simd, delta_u, b));
                sum = F::dot(simd, c, state[i], sum);
            }
        }
        *y = sum;
    }
    for (i, &state) in state.iter().enumerate() {
        // SAFETY: h holds NB numbers.
        unsafe { F::store(simd, h.as_mut_ptr().add(i * size), state) };
    }
}

/// y from its sum over states: factor, skip, gate; to the output.
#[inline(always)]
fn finish<S: Simd, F: Field>(
    simd: S,
    x: &Arguments<'_, f32>,
    tile: &Tile,
    start: usize,
    steps: usize,
    sums: &[f32],
    out: &Shared<f32>,
) {
    let stride = steps_stride::<S>(steps);
    for i in 0..steps {
        let t = start + i;
        if let Some(z) = &x.z {
            tile.prefetch(z, t);
        }
        if t + AHEAD < x.u.rows {
            out.prefetch((t + AHEAD) * x.channels + tile.first, tile.width);
        }
        // SAFETY: tiles are disjoint in channels and pieces in tokens.
        let row = unsafe { out.part(t * x.channels + tile.first, tile.width) };
        let mut v = 0;
        while v < tile.vectors::<S>() {
            let at = Spot { token: t, vector: v, start: v * stride + i * S::F32_LANES, stride };
            if tile.is_full::<S>(v, TOGETHER) {
                finish_vectors::<S, F, TOGETHER>(simd, x, tile, at, sums, row);
                v += TOGETHER;
            } else {
                finish_vectors::<S, F, 1>(simd, x, tile, at, sums, row);
                v += 1;
            }
        }
    }
}

/// [`finish`] for K vectors of a token.
#[inline(always)]
fn finish_vectors<S: Simd, F: Field, const K: usize>(
    simd: S,
    x: &Arguments<'_, f32>,
    tile: &Tile,
    at: Spot,
    sums: &[f32],
    out: &mut [f32],
) {
    let Spot { token: t, vector: v, start, stride } = at;
    let mut y = load_step::<S, K>(simd, sums, start, stride);
    if F::PARTS == 2 {
        for y in &mut y {
            *y = simd.mul_f32s(*y, simd.splat_f32s(F::OUTPUT));
        }
    }
    if let Some(d) = x.d {
        let d = load_vectors::<S, K>(simd, tile.part(d), v);
        let u = load_vectors::<S, K>(simd, tile.row(&x.u, t), v);
        for ((y, d), u) in y.iter_mut().zip(d).zip(u) {
            *y = simd.mul_add_e_f32s(d, u, *y);
        }
    }
    if let Some(z) = &x.z {
        let gate = silu_each(simd, load_vectors::<S, K>(simd, tile.row(z, t), v));
        for (y, gate) in y.iter_mut().zip(gate) {
            *y = simd.mul_f32s(*y, gate);
        }
    }
    store_vectors(simd, out, v, y);
}
