//! The backward scan of a run of sequences over one partition of channels.
//!
//! Chunks are worked off from the last to the first. Within a chunk, per block of states and vector of channels,
//! the states and decays are computed again from the state that the forward saved at the chunk's start and kept
//! in first-level scratch, then walked in reverse with the gradient of the state in registers (`reference.rs` has
//! the formulas). dB and dC are summed lane by lane over the vectors of the partition and across lanes once a
//! chunk. Gradients of parameters are summed in f64. The partitions are fixed, so no sum depends on the threads.

use std::marker::PhantomData;

use elapid_tensor::RowView;
use pulp::{Simd, WithSimd};

use super::arguments::{Arguments, Projection};
use super::field::Field;
use super::forward::scale_rates;
use super::scratch::{Scratch, Shared, padded};
use super::sweep::{Forward, Sums, recompute, reverse};
use super::tile::{
    CHUNK, Coefficients, Tile, gather, load_channels, scatter, scatter_wide, steps_stride,
};
use crate::simd::{DECAY_RANGE, load, store};

/// A stretch of a sequence that is swept in one go.
#[derive(Debug, Clone, Copy)]
pub(super) struct BackwardPiece<'a> {
    /// First token.
    pub start: usize,
    /// Number of tokens.
    pub len: usize,
    /// Number of the first chunk among those of all sequences.
    pub first_chunk: usize,
    /// Gradient `[E, N]` by the state after the last token; zero without one.
    pub after: Option<&'a [f32]>,
    /// Row where the gradient by the state before the first token goes, if it is wanted.
    pub before: Option<usize>,
}

/// Where the gradient of B or C goes.
pub(super) enum ProjectionGradient {
    /// Partial sums `[partitions of a group, T, G, N]`.
    Token(Shared<f32>),
    /// Partial sums `[runs, E, N]`.
    Constant(Shared<f64>),
}

/// What all units of a backward share.
pub(super) struct Target<'a> {
    pub dy: RowView<'a, f32>,
    /// States at chunk starts `[chunks, N, parts, E]`.
    pub chunk_states: &'a [f32],
    /// `[T, E]`
    pub du: Shared<f32>,
    /// `[T, E]`
    pub ddelta: Shared<f32>,
    /// `[T, E]`; empty without a gate.
    pub dz: Shared<f32>,
    /// Partial sums `[runs, E, N]`.
    pub da: Shared<f64>,
    /// Partial sums `[runs, E]`.
    pub dd: Shared<f64>,
    /// Partial sums `[runs, E]`.
    pub dbias: Shared<f64>,
    pub db: ProjectionGradient,
    pub dc: ProjectionGradient,
    /// Gradients by states before pieces, `[rows, E, N]`.
    pub before: Shared<f32>,
}

/// A run of pieces over one partition.
pub(super) struct BackwardUnit<'a, F> {
    pub x: &'a Arguments<'a, f32>,
    pub target: &'a Target<'a>,
    pub pieces: &'a [BackwardPiece<'a>],
    pub run: usize,
    pub tile: Tile,
    pub field: PhantomData<F>,
}

/// States whose gradients a block keeps in registers, beside as many sums for dA.
const BLOCK: usize = 4;

/// Scratch of one partition; rows are `[vector][step][lane]`, matrices `[vector][n][part][lane]`.
pub(super) struct Work<'a> {
    pub rates: &'a mut [f32],
    pub scaled_rates: &'a mut [f32],
    pub b: &'a mut [f32],
    pub c: &'a mut [f32],
    pub carry: &'a mut [f32],
    pub da: &'a mut [f64],
    pub db: &'a mut [f64],
    pub dc: &'a mut [f64],
    pub dd: &'a mut [f64],
    pub dbias: &'a mut [f64],
    pub delta: &'a mut [f32],
    pub delta_u: &'a mut [f32],
    pub dy: &'a mut [f32],
    /// Σ_n Re(B* G)
    pub by_input: &'a mut [f32],
    /// Σ_n Re((A w)* G)
    pub by_decay: &'a mut [f32],
    pub y: &'a mut [f32],
    /// dout silu'(z)
    pub gate: &'a mut [f32],
    /// softplus'(δ + bias)
    pub slope: &'a mut [f32],
    pub states: &'a mut [f32],
    pub decays: &'a mut [f32],
    pub sum_b: &'a mut [f32],
    pub sum_c: &'a mut [f32],
    pub sums: &'a mut [f32],
}

impl<F: Field> WithSimd for BackwardUnit<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let lanes = S::F32_LANES;
        let vectors = self.tile.vectors::<S>();
        let matrix = vectors * self.x.states * F::PARTS * lanes;
        let steps = self.pieces.iter().map(|piece| piece.len).max().unwrap_or(0).min(CHUNK);
        let rows = vectors * steps_stride::<S>(steps);
        let block = steps * BLOCK * F::PARTS * lanes;
        let width = vectors * lanes;
        let b = if self.x.b.is_constant() { matrix } else { 0 };
        let c = if self.x.c.is_constant() { matrix } else { 0 };
        let total = 3 * padded(matrix)
            + 2 * padded(matrix)
            + padded(b)
            + padded(c)
            + padded(2 * b)
            + padded(2 * c)
            + 2 * padded(2 * width)
            + 8 * padded(rows)
            + 4 * padded(block + BLOCK * F::PARTS * lanes)
            + 3 * padded(width);
        let mut scratch = Scratch::take();
        let mut parts = scratch.parts(total);
        let mut work = Work {
            rates: parts.take(matrix),
            scaled_rates: parts.take(matrix),
            b: parts.take(b),
            c: parts.take(c),
            carry: parts.take(matrix),
            da: bytemuck::cast_slice_mut(parts.take(2 * matrix)),
            db: bytemuck::cast_slice_mut(parts.take(2 * b)),
            dc: bytemuck::cast_slice_mut(parts.take(2 * c)),
            dd: bytemuck::cast_slice_mut(parts.take(2 * width)),
            dbias: bytemuck::cast_slice_mut(parts.take(2 * width)),
            delta: parts.take(rows),
            delta_u: parts.take(rows),
            dy: parts.take(rows),
            by_input: parts.take(rows),
            by_decay: parts.take(rows),
            y: parts.take(rows),
            gate: parts.take(rows),
            slope: parts.take(rows),
            states: parts.take(block + BLOCK * F::PARTS * lanes),
            decays: parts.take(block),
            sum_b: parts.take(block),
            sum_c: parts.take(block),
            sums: parts.take(3 * width),
        };
        self.run(simd, &mut work);
    }
}

impl<F: Field> BackwardUnit<'_, F> {
    #[inline(always)]
    fn run<S: Simd>(&self, simd: S, work: &mut Work<'_>) {
        let (x, tile, target) = (self.x, &self.tile, self.target);
        gather::<S, F>(simd, tile, x.states, x.a, work.rates);
        work.scaled_rates.copy_from_slice(work.rates);
        let largest_rate = scale_rates::<S, F>(simd, work.scaled_rates);
        if let Projection::Constant(values) = x.b {
            gather::<S, F>(simd, tile, x.states, values, work.b);
        }
        if let Projection::Constant(values) = x.c {
            gather::<S, F>(simd, tile, x.states, values, work.c);
        }
        for sum in [&mut *work.da, work.db, work.dc, work.dd, work.dbias] {
            sum.fill(0.0);
        }

        for piece in self.pieces {
            match piece.after {
                Some(gradient) => gather::<S, F>(simd, tile, x.states, gradient, work.carry),
                None => work.carry.fill(0.0),
            }
            for chunk in (0..piece.len.div_ceil(CHUNK)).rev() {
                let steps = CHUNK.min(piece.len - chunk * CHUNK);
                let start = piece.start + chunk * CHUNK;
                let in_range = self.prepare(simd, work, start, steps) * largest_rate < DECAY_RANGE;
                let chunk = piece.first_chunk + chunk;
                if x.b.is_constant() || x.c.is_constant() {
                    self.sweep::<S, true, false>(simd, work, chunk, start, steps);
                } else if in_range {
                    self.sweep::<S, false, true>(simd, work, chunk, start, steps);
                } else {
                    self.sweep::<S, true, true>(simd, work, chunk, start, steps);
                }
                self.finish(simd, work, start, steps);
            }
            if let Some(row) = piece.before {
                let begin = (row * x.channels + tile.first) * x.states * F::PARTS;
                // SAFETY: partitions are disjoint in channels, pieces have rows of their own.
                let before = unsafe { target.before.part(begin, tile.width * x.states * F::PARTS) };
                scatter::<S, F>(simd, tile, x.states, work.carry, before);
            }
        }

        self.put::<S>(simd, work.da, &target.da, self.run);
        if let ProjectionGradient::Constant(db) = &target.db {
            self.put::<S>(simd, work.db, db, self.run);
        }
        if let ProjectionGradient::Constant(dc) = &target.dc {
            self.put::<S>(simd, work.dc, dc, self.run);
        }
        let row = self.run * x.channels + tile.first;
        // SAFETY: partitions are disjoint in channels and runs in rows.
        let (dd, dbias) =
            unsafe { (target.dd.part(row, tile.width), target.dbias.part(row, tile.width)) };
        dd.copy_from_slice(&work.dd[..tile.width]);
        dbias.copy_from_slice(&work.dbias[..tile.width]);
    }

    /// Writes sums of the partition to row `row` of `[rows, E, N]`.
    #[inline(always)]
    fn put<S: Simd>(&self, simd: S, from: &[f64], to: &Shared<f64>, row: usize) {
        let numbers = self.x.states * F::PARTS;
        let begin = (row * self.x.channels + self.tile.first) * numbers;
        // SAFETY: partitions are disjoint in channels, runs have rows of their own.
        let to = unsafe { to.part(begin, self.tile.width * numbers) };
        scatter_wide::<S, F>(simd, &self.tile, self.x.states, from, to);
    }

    /// All blocks of states over a chunk.
    #[inline(always)]
    fn sweep<S: Simd, const CLAMP: bool, const TOKEN: bool>(
        &self,
        simd: S,
        work: &mut Work<'_>,
        chunk: usize,
        start: usize,
        steps: usize,
    ) {
        let mut n = 0;
        while n + BLOCK <= self.x.states {
            self.block::<S, BLOCK, CLAMP, TOKEN>(simd, work, chunk, start, steps, n);
            n += BLOCK;
        }
        while n < self.x.states {
            self.block::<S, 1, CLAMP, TOKEN>(simd, work, chunk, start, steps, n);
            n += 1;
        }
    }

    /// One block of states over a chunk, for all vectors of the partition.
    #[inline(always)]
    fn block<S: Simd, const NB: usize, const CLAMP: bool, const TOKEN: bool>(
        &self,
        simd: S,
        work: &mut Work<'_>,
        chunk: usize,
        start: usize,
        steps: usize,
        n: usize,
    ) {
        let (x, tile, lanes) = (self.x, &self.tile, S::F32_LANES);
        let size = F::PARTS * lanes;
        let numbers = x.states * F::PARTS;
        // Sums over channels: a row a step, or one row in all for a constant projection.
        let step_b = if x.b.is_constant() { 0 } else { NB * size };
        let step_c = if x.c.is_constant() { 0 } else { NB * size };
        work.sum_b[..steps * NB * size].fill(0.0);
        work.sum_c[..steps * NB * size].fill(0.0);
        for v in 0..tile.vectors::<S>() {
            let (first, count) = tile.span::<S>(v);
            let at = v * numbers * lanes;
            let part = at + n * size..at + (n + NB) * size;
            let first_step = v * steps_stride::<S>(steps);
            let rows = first_step..first_step + steps * lanes;
            let place = (tile.group, x.states);
            let b = if x.b.is_constant() { &work.b[at..at + numbers * lanes] } else { &[] };
            let c = if x.c.is_constant() { &work.c[at..at + numbers * lanes] } else { &[] };
            let b = Coefficients::new::<S, F>(&x.b, b, start, steps, place, (n, NB));
            let c = Coefficients::new::<S, F>(&x.c, c, start, steps, place, (n, NB));

            for i in 0..NB * F::PARTS {
                let row = (chunk * numbers + n * F::PARTS + i) * x.channels;
                let h = load_channels(simd, &self.target.chunk_states[row..], first, count);
                store(simd, &mut work.states[i * lanes..], h);
            }
            recompute::<S, F, NB, CLAMP, TOKEN>(
                simd,
                (&work.delta[rows.clone()], &work.delta_u[rows.clone()]),
                x.z.is_some().then_some(&mut work.y[rows.clone()]),
                &work.scaled_rates[part.clone()],
                (&mut *work.states, &mut *work.decays),
                (b, c),
            );
            let forward = Forward {
                rates: &work.rates[part.clone()],
                states: work.states,
                decays: work.decays,
                b,
                c,
            };
            let sums = Sums { b: (&mut *work.sum_b, step_b), c: (&mut *work.sum_c, step_c) };
            let mut da = [F::zero(simd); NB];
            reverse::<S, F, NB, TOKEN>(
                simd,
                (&work.delta[rows.clone()], &work.delta_u[rows.clone()], &work.dy[rows.clone()]),
                (&mut work.by_input[rows.clone()], &mut work.by_decay[rows]),
                forward,
                sums,
                &mut work.carry[part.clone()],
                &mut da,
            );
            let mut row = [0.0f32; 16 * 2];
            for (i, &da) in da.iter().enumerate() {
                // SAFETY: at most 16 lanes of two parts.
                unsafe { F::store(simd, row.as_mut_ptr(), da) };
                add_wide(&mut work.da[part.start + i * size..][..size], &row[..size]);
            }
            for (constant, sums, wide) in [
                (x.b.is_constant(), &mut *work.sum_b, &mut *work.db),
                (x.c.is_constant(), &mut *work.sum_c, &mut *work.dc),
            ] {
                if constant {
                    add_wide(&mut wide[part.clone()], &sums[..NB * size]);
                    sums[..NB * size].fill(0.0);
                }
            }
        }
        for (gradient, sums) in [(&self.target.db, &*work.sum_b), (&self.target.dc, &*work.sum_c)] {
            if let ProjectionGradient::Token(out) = gradient {
                self.put_sums::<S, NB>(simd, out, sums, start, steps, n);
            }
        }
    }

    /// Sums lanes and writes them to the partition's partial dB or dC.
    #[inline(always)]
    fn put_sums<S: Simd, const NB: usize>(
        &self,
        simd: S,
        out: &Shared<f32>,
        sums: &[f32],
        start: usize,
        steps: usize,
        n: usize,
    ) {
        let x = self.x;
        let groups = x.groups();
        let numbers = x.states * F::PARTS;
        let tokens = x.sequences.tokens();
        for i in 0..steps {
            let row = (self.tile.place * tokens + start + i) * groups + self.tile.group;
            // SAFETY: partitions differ in place or group, pieces in tokens, blocks in states.
            let out = unsafe { out.part(row * numbers + n * F::PARTS, NB * F::PARTS) };
            let sums = &sums[i * NB * F::PARTS * S::F32_LANES..];
            for (j, out) in out.iter_mut().enumerate() {
                *out = simd.reduce_sum_f32s(load(simd, &sums[j * S::F32_LANES..]));
            }
        }
    }
}

/// `sum += term` in f64.
#[inline(always)]
pub(super) fn add_wide(sum: &mut [f64], term: &[f32]) {
    for (sum, &term) in sum.iter_mut().zip(term) {
        *sum += f64::from(term);
    }
}
