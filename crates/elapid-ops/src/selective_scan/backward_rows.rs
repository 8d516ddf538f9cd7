//! The passes of the backward scan over the rows of a chunk: before its sweeps what they start from, after them
//! the gradients that are one value a token and channel.

use pulp::Simd;

use super::backward::{BackwardUnit, Work, add_wide};
use super::field::Field;
use super::stage::stage;
use super::tile::{
    AHEAD, TOGETHER, load_step, load_vectors, steps_stride, store_step, store_vectors,
};
use crate::simd::{load, silu_with_derivative_each, store};

impl<F: Field> BackwardUnit<'_, F> {
    /// Δ, Δu, the gradient before the gate and empty sums for a chunk; returns the largest |Δ|.
    #[inline(always)]
    pub(super) fn prepare<S: Simd>(
        &self,
        simd: S,
        work: &mut Work<'_>,
        start: usize,
        steps: usize,
    ) -> f32 {
        let (x, tile) = (self.x, &self.tile);
        let stride = steps_stride::<S>(steps);
        let rows = tile.vectors::<S>() * stride;
        let width = tile.vectors::<S>() * S::F32_LANES;
        work.sums[..3 * width].fill(0.0);
        let staged = (&mut *work.delta, &mut *work.delta_u, &mut *work.slope);
        let sum = &mut work.sums[2 * width..3 * width];
        let most = stage::<S, true>(simd, x, tile, start, steps, staged, sum);
        for i in 0..steps {
            tile.prefetch(&self.target.dy, start + i);
            if let Some(z) = &x.z {
                tile.prefetch(z, start + i);
            }
            let mut v = 0;
            while v < tile.vectors::<S>() {
                let at = (v * stride + i * S::F32_LANES, stride);
                if tile.is_full::<S>(v, TOGETHER) {
                    self.prepare_vectors::<S, TOGETHER>(simd, work, start + i, v, at);
                    v += TOGETHER;
                } else {
                    self.prepare_vectors::<S, 1>(simd, work, start + i, v, at);
                    v += 1;
                }
            }
        }
        work.by_input[..rows].fill(0.0);
        work.by_decay[..rows].fill(0.0);
        work.y[..rows].fill(0.0);
        most
    }

    /// The gradient before the gate, and what dz is made of, for vectors `v..v + K` of token `t`.
    #[inline(always)]
    fn prepare_vectors<S: Simd, const K: usize>(
        &self,
        simd: S,
        work: &mut Work<'_>,
        t: usize,
        v: usize,
        (at, stride): (usize, usize),
    ) {
        let mut dy = load_vectors::<S, K>(simd, self.tile.row(&self.target.dy, t), v);
        if let Some(z) = &self.x.z {
            let z = load_vectors::<S, K>(simd, self.tile.row(z, t), v);
            let (gate, mut slope) = silu_with_derivative_each(simd, z);
            for k in 0..K {
                slope[k] = simd.mul_f32s(dy[k], slope[k]);
                dy[k] = simd.mul_f32s(dy[k], gate[k]);
            }
            store_step(simd, work.gate, at, stride, slope);
        }
        if F::PARTS == 2 {
            for dy in &mut dy {
                *dy = simd.mul_f32s(*dy, simd.splat_f32s(F::OUTPUT));
            }
        }
        store_step(simd, work.dy, at, stride, dy);
    }

    /// Gradients of u, δ and z of a chunk, and the sums for D and the bias.
    #[inline(always)]
    pub(super) fn finish<S: Simd>(&self, simd: S, work: &mut Work<'_>, start: usize, steps: usize) {
        let (stride, vectors) = (steps_stride::<S>(steps), self.tile.vectors::<S>());
        for i in 0..steps {
            self.prefetch_outputs(start + i);
            let mut v = 0;
            while v < vectors {
                let at = (v * stride + i * S::F32_LANES, stride);
                if self.tile.is_full::<S>(v, TOGETHER) {
                    self.finish_vectors::<S, TOGETHER>(simd, work, start + i, v, at);
                    v += TOGETHER;
                } else {
                    self.finish_vectors::<S, 1>(simd, work, start + i, v, at);
                    v += 1;
                }
            }
        }
        let width = vectors * S::F32_LANES;
        add_wide(work.dd, &work.sums[..width]);
        add_wide(work.dbias, &work.sums[width..2 * width]);
    }

    /// Asks for the rows that [`Self::finish`] writes [`AHEAD`] of token `t`: a write waits for its line, and a few
    /// waiting ones are all that the processor holds.
    #[inline(always)]
    fn prefetch_outputs(&self, t: usize) {
        let (x, tile, target) = (self.x, &self.tile, self.target);
        if t + AHEAD < x.u.rows {
            let row = (t + AHEAD) * x.channels + tile.first;
            target.du.prefetch(row, tile.width);
            target.ddelta.prefetch(row, tile.width);
            if x.z.is_some() {
                target.dz.prefetch(row, tile.width);
            }
        }
    }

    /// [`Self::finish`] for vectors `v..v + K` of token `t`.
    #[inline(always)]
    fn finish_vectors<S: Simd, const K: usize>(
        &self,
        simd: S,
        work: &mut Work<'_>,
        t: usize,
        v: usize,
        (at, stride): (usize, usize),
    ) {
        let (x, tile, target) = (self.x, &self.tile, self.target);
        let (sum_d, sum_bias) = work.sums.split_at_mut(tile.vectors::<S>() * S::F32_LANES);
        let (sum_d, sum_bias) = (&mut sum_d[v * S::F32_LANES..], &mut sum_bias[v * S::F32_LANES..]);
        let u = load_vectors::<S, K>(simd, tile.row(&x.u, t), v);
        let delta = load_step::<S, K>(simd, work.delta, at, stride);
        let by_input = load_step::<S, K>(simd, work.by_input, at, stride);
        let mut ddelta = load_step::<S, K>(simd, work.by_decay, at, stride);
        let mut dy = load_step::<S, K>(simd, work.dy, at, stride);
        let mut y = load_step::<S, K>(simd, work.y, at, stride);
        let mut du = delta;
        for k in 0..K {
            if F::PARTS == 2 {
                dy[k] = simd.mul_f32s(dy[k], simd.splat_f32s(1.0 / F::OUTPUT));
                y[k] = simd.mul_f32s(y[k], simd.splat_f32s(F::OUTPUT));
            }
            du[k] = simd.mul_f32s(delta[k], by_input[k]);
            ddelta[k] = simd.mul_add_e_f32s(u[k], by_input[k], ddelta[k]);
        }
        if let Some(d) = x.d {
            let skip = load_vectors::<S, K>(simd, tile.part(d), v);
            for k in 0..K {
                du[k] = simd.mul_add_e_f32s(skip[k], dy[k], du[k]);
                y[k] = simd.mul_add_e_f32s(skip[k], u[k], y[k]);
                let sum = &mut sum_d[k * S::F32_LANES..];
                let total = simd.mul_add_e_f32s(dy[k], u[k], load(simd, sum));
                store(simd, sum, total);
            }
        }
        if x.delta_softplus {
            let slope = load_step::<S, K>(simd, work.slope, at, stride);
            for (ddelta, slope) in ddelta.iter_mut().zip(slope) {
                *ddelta = simd.mul_f32s(*ddelta, slope);
            }
        }
        for (sum, &ddelta) in sum_bias.chunks_exact_mut(S::F32_LANES).zip(&ddelta) {
            let total = simd.add_f32s(load(simd, sum), ddelta);
            store(simd, sum, total);
        }

        let row = t * x.channels + tile.first;
        // SAFETY: partitions are disjoint in channels and pieces in tokens.
        let (du_row, ddelta_row) =
            unsafe { (target.du.part(row, tile.width), target.ddelta.part(row, tile.width)) };
        store_vectors(simd, du_row, v, du);
        store_vectors(simd, ddelta_row, v, ddelta);
        if x.z.is_some() {
            for (y, gate) in y.iter_mut().zip(load_step::<S, K>(simd, work.gate, at, stride)) {
                *y = simd.mul_f32s(*y, gate);
            }
            // SAFETY: as above.
            let dz_row = unsafe { target.dz.part(row, tile.width) };
            store_vectors(simd, dz_row, v, y);
        }
    }
}
