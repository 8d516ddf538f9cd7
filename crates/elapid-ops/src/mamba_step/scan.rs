//! Δ projection, softplus, recurrence, skip and gate of a stretch of channels.
//!
//! A vector holds one state of neighbouring channels. In memory the states of a channel stand side by side, so they are
//! turned around before the first token of a stretch and after the last.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::{Rows, Stretch, TILE, following, padded};
use crate::matmul::transpose_block;
use crate::simd::{
    DECAY_RANGE, DecayConstants, clamp_below, decay_constants, decay_exp2_in_range, dispatch, load,
    prefetch_to_write, silu_each, softplus_each, store,
};

/// Vectors whose chains of some forty cycles overlap: as many as registers hold beside their sums.
const TOGETHER: usize = 2;

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
    /// A log2(e), [E / tile, N, tile].
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
        let mut rates = vec![0.0; a_log.len()];
        crate::simd::exp_slice(a_log, &mut rates);
        let mut a = vec![0.0; width * states];
        for (channel, row) in rates.chunks_exact(states.max(1)).enumerate() {
            let tile = &mut a[channel / TILE * TILE * states..];
            for (i, &rate) in row.iter().enumerate() {
                tile[i * TILE + channel % TILE] = -rate * std::f32::consts::LOG2_E;
            }
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
        let mut h = vec![0.0f32; n * TILE];
        let mut first = channels.start;
        while first < channels.end {
            let valid = TILE.min(scan.channels - first);
            let weight = &scan.dt_weight[first * rank..][..TILE * rank];
            let a = &scan.a[first * n..][..TILE * n];
            for (index, stretch) in stretches.iter().enumerate() {
                if stretches.len() > 1 {
                    // Slots lie far apart, so no processor foresees the next one's states.
                    let (slot, first) = following(stretches, index, first);
                    let at = (slot * scan.channels + first) * n;
                    prefetch_to_write(state.wrapping_add(at), TILE * n);
                }
                let at = (stretch.slot * scan.channels + first) * n;
                // SAFETY: the caller's: the slot's channels are this thread's.
                let own = unsafe { std::slice::from_raw_parts_mut(state.add(at), valid * n) };
                if stretch.fresh || valid < TILE {
                    h.fill(0.0);
                }
                if !stretch.fresh {
                    // SAFETY: `valid` rows of N states, and as many columns of at most a tile.
                    unsafe { transpose_block(own.as_ptr(), n, valid, n, h.as_mut_ptr(), TILE) };
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
                    recurrence(simd, constants, &mut token, a, &mut h);
                    gate(simd, &token.y, &scan.d[first..], u, z);
                }
                // SAFETY: as above.
                unsafe { transpose_block(h.as_ptr(), TILE, n, valid, own.as_mut_ptr(), n) };
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
        // Sums of even and of odd terms, so that two vectors are four chains.
        let mut sums = [[simd.splat_f32s(0.0); 2]; 2];
        let (pairs, rest) = dt.as_chunks::<2>();
        let mut w = weight;
        for pair in pairs {
            for (part, &dt) in sums.iter_mut().zip(pair) {
                *part = add_term(simd, *part, dt, &w[lane..]);
                w = &w[TILE..];
            }
        }
        for &dt in rest {
            sums[0] = add_term(simd, sums[0], dt, &w[lane..]);
        }
        let [mut sums, odd] = sums;
        for (v, sum) in sums.iter_mut().enumerate() {
            *sum = simd.add_f32s(*sum, odd[v]);
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

/// Two vectors' terms of one input of Δ.
#[inline(always)]
fn add_term<S: Simd>(simd: S, mut sums: [S::f32s; 2], dt: f32, w: &[f32]) -> [S::f32s; 2] {
    let dt = simd.splat_f32s(dt);
    for (v, sum) in sums.iter_mut().enumerate() {
        *sum = simd.mul_add_e_f32s(dt, load(simd, &w[v * S::F32_LANES..]), *sum);
    }
    sums
}

/// h ← 2^(Δ A) h + Δ u B and y = C h, summed over states in ascending order; `a` and `h` are [N, tile].
#[inline(always)]
fn recurrence<S: Simd>(
    simd: S,
    constants: &DecayConstants<S>,
    token: &mut Token<'_>,
    a: &[f32],
    h: &mut [f32],
) {
    let step = S::F32_LANES;
    let zero = simd.splat_f32s(0.0);
    let mut lane = 0;
    while lane < TILE {
        let (mut delta, mut delta_u) = ([zero; TOGETHER], [zero; TOGETHER]);
        for v in 0..TOGETHER {
            delta[v] = load(simd, &token.delta[lane + v * step..]);
            delta_u[v] = load(simd, &token.delta_u[lane + v * step..]);
        }
        let mut y = [zero; TOGETHER];
        let rows = a.chunks_exact(TILE).zip(h.chunks_exact_mut(TILE));
        for ((a, h), (&b, &c)) in rows.zip(token.b.iter().zip(token.c)) {
            let (b, c) = (simd.splat_f32s(b), simd.splat_f32s(c));
            let mut x = [zero; TOGETHER];
            for (v, x) in x.iter_mut().enumerate() {
                let exponent = simd.mul_f32s(delta[v], load(simd, &a[lane + v * step..]));
                *x = clamp_below(simd, exponent, -DECAY_RANGE);
            }
            let decay = decay_exp2_in_range(simd, constants, x);
            for v in 0..TOGETHER {
                let at = lane + v * step;
                let input = simd.mul_f32s(delta_u[v], b);
                let next = simd.mul_add_e_f32s(decay[v], load(simd, &h[at..]), input);
                store(simd, &mut h[at..], next);
                y[v] = simd.mul_add_e_f32s(next, c, y[v]);
            }
        }
        for (v, &y) in y.iter().enumerate() {
            store(simd, &mut token.y[lane + v * step..], y);
        }
        lane += TOGETHER * step;
    }
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
