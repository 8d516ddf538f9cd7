//! Δ projection, softplus, recurrence, skip and gate of a stretch of channels.
//!
//! The states of a channel stand side by side in memory, so a vector holds states of one channel; four channels go
//! together, since one alone is a chain of some forty cycles.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::{Rows, Stretch, TILE, padded};
use crate::simd::{
    DECAY_RANGE, DecayConstants, clamp_below, decay_constants, decay_exp2_in_range, dispatch, load,
    silu_each, softplus_each, store,
};

/// Channels whose recurrences overlap.
const TOGETHER: usize = 4;

/// The recurrence of E channels with N states and a Δ of rank R.
#[derive(Debug, Clone)]
pub struct Scan {
    channels: usize,
    states: usize,
    rank: usize,
    /// [E / tile, R, tile]
    dt_weight: Vec<f32>,
    /// [E padded]
    dt_bias: Vec<f32>,
    /// A log2(e), [E padded, N].
    a: Vec<f32>,
    /// [E padded]
    d: Vec<f32>,
}

/// The parameters of a [`Scan`] as models hold them.
#[derive(Debug, Clone, Copy)]
pub struct Parameters<'a> {
    /// [E, R]
    pub dt_weight: &'a [f32],
    /// [E]
    pub dt_bias: &'a [f32],
    /// log(-A), [E, N].
    pub a_log: &'a [f32],
    /// [E]
    pub d: &'a [f32],
}

impl Scan {
    /// From the parameters of E channels, N states and rank R.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn new(channels: usize, states: usize, rank: usize, parameters: Parameters<'_>) -> Self {
        let Parameters { dt_weight, dt_bias, a_log, d } = parameters;
        assert_eq!(dt_weight.len(), channels * rank, "dt_weight");
        assert_eq!(a_log.len(), channels * states, "A_log");
        assert_eq!((dt_bias.len(), d.len()), (channels, channels), "dt_bias and D");
        let width = padded(channels);
        let mut weight = vec![0.0; width * rank];
        for (channel, row) in dt_weight.chunks_exact(rank.max(1)).enumerate() {
            let tile = &mut weight[channel / TILE * TILE * rank..];
            for (r, &value) in row.iter().enumerate() {
                tile[r * TILE + channel % TILE] = value;
            }
        }
        let mut a = vec![0.0; width * states];
        crate::simd::exp_slice(a_log, &mut a[..a_log.len()]);
        for a in &mut a {
            *a *= -std::f32::consts::LOG2_E;
        }
        let wide = |values: &[f32]| {
            let mut wide = vec![0.0; width];
            wide[..channels].copy_from_slice(values);
            wide
        };
        let (dt_bias, d) = (wide(dt_bias), wide(d));
        Self { channels, states, rank, dt_weight: weight, dt_bias, a, d }
    }

    /// Bytes of its parameters.
    pub fn bytes(&self) -> usize {
        let vectors = [&self.dt_weight, &self.dt_bias, &self.a, &self.d];
        vectors.iter().map(|v| size_of_val(v.as_slice())).sum()
    }

    /// u becomes y = (scan(u) + D u) silu(z) for the channels, which start at a multiple of [`TILE`] and end at
    /// one or at E. A row of `projected` has the inputs of Δ [R], B [N] and C [N]; `state` is [slots, E, N].
    ///
    /// # Safety
    /// `u` and `z` must have whole tiles of every row of `stretches`, `projected` these rows, `state` every slot; no
    /// other thread may use these channels of `u` and `state` meanwhile, nor write the others.
    pub unsafe fn run(
        &self,
        channels: Range<usize>,
        stretches: &[Stretch],
        u: Rows,
        z: Rows,
        projected: Rows,
        state: *mut f32,
    ) {
        dispatch(Op { scan: self, channels, stretches, u, z, projected, state });
    }
}

struct Op<'a> {
    scan: &'a Scan,
    channels: Range<usize>,
    stretches: &'a [Stretch],
    u: Rows,
    z: Rows,
    projected: Rows,
    state: *mut f32,
}

/// One token of one tile.
struct Token<'a> {
    delta: [f32; TILE],
    delta_u: [f32; TILE],
    y: [f32; TILE],
    b: &'a [f32],
    c: &'a [f32],
}

impl WithSimd for Op<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { scan, channels, stretches, u, z, projected, state } = self;
        let (n, rank) = (scan.states, scan.rank);
        let constants = decay_constants(simd);
        let constants = std::hint::black_box(&constants);
        let mut first = channels.start;
        while first < channels.end {
            let valid = TILE.min(scan.channels - first);
            let weight = &scan.dt_weight[first * rank..][..TILE * rank];
            let a = &scan.a[first * n..][..TILE * n];
            for stretch in stretches {
                let at = (stretch.slot * scan.channels + first) * n;
                // SAFETY: the caller's: the slot's channels are this thread's.
                let h = unsafe { std::slice::from_raw_parts_mut(state.add(at), valid * n) };
                if stretch.fresh {
                    h.fill(0.0);
                }
                for row in stretch.start..stretch.start + stretch.len {
                    // SAFETY: the caller's.
                    let (u, z, projected) = unsafe {
                        let inputs = projected.get(row, 0, rank + 2 * n);
                        (u.get_mut(row, first, TILE), z.get(row, first, TILE), inputs)
                    };
                    let (dt, bc) = projected.split_at(rank);
                    let (b, c) = bc.split_at(n);
                    let zero = [0.0; TILE];
                    let mut token = Token { delta: zero, delta_u: zero, y: zero, b, c };
                    delta(simd, &mut token, dt, weight, &scan.dt_bias[first..], u);
                    let mut channel = 0;
                    while channel + TOGETHER <= valid {
                        step::<S, TOGETHER>(simd, constants, &mut token, channel, n, a, h);
                        channel += TOGETHER;
                    }
                    while channel < valid {
                        step::<S, 1>(simd, constants, &mut token, channel, n, a, h);
                        channel += 1;
                    }
                    gate(simd, &token.y, &scan.d[first..], u, z);
                }
            }
            first += TILE;
        }
    }
}

/// Δ = softplus(W dt + bias) and Δ u.
#[inline(always)]
fn delta<S: Simd>(
    simd: S,
    token: &mut Token<'_>,
    dt: &[f32],
    weight: &[f32],
    bias: &[f32],
    u: &[f32],
) {
    let step = S::F32_LANES;
    let mut lane = 0;
    while lane < TILE {
        let mut sums = [simd.splat_f32s(0.0); 2];
        for (r, &dt) in dt.iter().enumerate() {
            let dt = simd.splat_f32s(dt);
            for (v, sum) in sums.iter_mut().enumerate() {
                let w = load(simd, &weight[r * TILE + lane + v * step..]);
                *sum = simd.mul_add_e_f32s(dt, w, *sum);
            }
        }
        for (v, sum) in sums.iter_mut().enumerate() {
            *sum = simd.add_f32s(*sum, load(simd, &bias[lane + v * step..]));
        }
        let delta = softplus_each(simd, sums);
        for (v, &delta) in delta.iter().enumerate() {
            let at = lane + v * step;
            store(simd, &mut token.delta[at..], delta);
            let u = load(simd, &u[at..]);
            store(simd, &mut token.delta_u[at..], simd.mul_f32s(delta, u));
        }
        lane += 2 * step;
    }
}

/// h ← 2^(Δ A) h + Δ u B and y = C h of `K` channels.
#[inline(always)]
fn step<S: Simd, const K: usize>(
    simd: S,
    constants: &DecayConstants<S>,
    token: &mut Token<'_>,
    channel: usize,
    n: usize,
    a: &[f32],
    h: &mut [f32],
) {
    let zero = simd.splat_f32s(0.0);
    let (mut delta, mut delta_u) = ([zero; K], [zero; K]);
    for k in 0..K {
        delta[k] = simd.splat_f32s(token.delta[channel + k]);
        delta_u[k] = simd.splat_f32s(token.delta_u[channel + k]);
    }
    let mut y = [zero; K];
    let mut i = 0;
    while i < n {
        let whole = i + S::F32_LANES <= n;
        let end = n.min(i + S::F32_LANES);
        let (b, c) = (part(simd, &token.b[i..end], whole), part(simd, &token.c[i..end], whole));
        let mut x = [zero; K];
        for (k, x) in x.iter_mut().enumerate() {
            let exponent =
                simd.mul_f32s(delta[k], part(simd, &a[(channel + k) * n..][i..end], whole));
            *x = clamp_below(simd, exponent, -DECAY_RANGE);
        }
        let decay = decay_exp2_in_range(simd, constants, x);
        for k in 0..K {
            let at = (channel + k) * n;
            let input = simd.mul_f32s(delta_u[k], b);
            let next =
                simd.mul_add_e_f32s(decay[k], part(simd, &h[at + i..at + end], whole), input);
            if whole {
                store(simd, &mut h[at + i..], next);
            } else {
                simd.partial_store_f32s(&mut h[at + i..at + end], next);
            }
            y[k] = simd.mul_add_e_f32s(next, c, y[k]);
        }
        i += S::F32_LANES;
    }
    for (k, &y) in y.iter().enumerate() {
        token.y[channel + k] = simd.reduce_sum_f32s(y);
    }
}

/// A whole vector, or the lanes that there are and zeros.
#[inline(always)]
fn part<S: Simd>(simd: S, from: &[f32], whole: bool) -> S::f32s {
    if whole { load(simd, from) } else { simd.partial_load_f32s(from) }
}

/// u ← (y + D u) silu(z)
#[inline(always)]
fn gate<S: Simd>(simd: S, y: &[f32; TILE], d: &[f32], u: &mut [f32], z: &[f32]) {
    let step = S::F32_LANES;
    let mut lane = 0;
    while lane < TILE {
        let gates = silu_each(simd, [load(simd, &z[lane..]), load(simd, &z[lane + step..])]);
        for (v, &gate) in gates.iter().enumerate() {
            let at = lane + v * step;
            let skip = load(simd, &u[at..]);
            let sum = simd.mul_add_e_f32s(load(simd, &d[at..]), skip, load(simd, &y[at..]));
            store(simd, &mut u[at..], simd.mul_f32s(sum, gate));
        }
        lane += 2 * step;
    }
}
