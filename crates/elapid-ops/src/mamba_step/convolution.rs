//! Depthwise causal convolution with SiLU, in place.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::threes::{apart, together};
use super::{Rows, Stretch, TILE, following, padded};
use crate::simd::{dispatch, load, prefetch_to_write, silu_each, store};

/// The taps of E channels.
#[derive(Debug, Clone)]
pub struct Convolution {
    channels: usize,
    taps: usize,
    /// [W, E padded], oldest first.
    weight: Vec<f32>,
    /// [E padded], zero where there is none.
    bias: Vec<f32>,
}

impl Convolution {
    /// From a weight [E, W] and a bias [E].
    ///
    /// # Panics
    /// If the sizes do not fit or there is no tap.
    pub fn new(channels: usize, taps: usize, weight: &[f32], bias: Option<&[f32]>) -> Self {
        assert!(taps > 0 && weight.len() == channels * taps, "weight [{channels}, {taps}]");
        let width = padded(channels);
        let mut own = vec![0.0; taps * width];
        for (channel, weight) in weight.chunks_exact(taps).enumerate() {
            for (tap, &weight) in weight.iter().enumerate() {
                own[tap * width + channel] = weight;
            }
        }
        let mut own_bias = vec![0.0; width];
        if let Some(bias) = bias {
            own_bias[..channels].copy_from_slice(bias);
        }
        Self { channels, taps, weight: own, bias: own_bias }
    }

    /// x becomes silu(conv(x)) for the channels, which start at a multiple of [`TILE`] and end at one or at E;
    /// `state` is [slots, E, W - 1], oldest first.
    ///
    /// # Safety
    /// `x` must have whole tiles of every row of `stretches`, `state` every slot of them, and no other thread may use
    /// these channels meanwhile.
    pub unsafe fn run(
        &self,
        channels: Range<usize>,
        stretches: &[Stretch],
        x: Rows,
        state: *mut f32,
    ) {
        dispatch(Op { convolution: self, channels, stretches, x, state });
    }
}

struct Op<'a> {
    convolution: &'a Convolution,
    channels: Range<usize>,
    stretches: &'a [Stretch],
    x: Rows,
    state: *mut f32,
}

impl WithSimd for Op<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { convolution, channels, stretches, x, state } = self;
        let history = convolution.taps - 1;
        let width = padded(convolution.channels);
        let mut kept = vec![0.0f32; history * TILE];
        let mut first = channels.start;
        while first < channels.end {
            let valid = TILE.min(convolution.channels - first);
            let threes = history == 3 && valid == TILE;
            for (index, stretch) in stretches.iter().enumerate() {
                if stretches.len() > 1 {
                    let (slot, first) = following(stretches, index, first);
                    let at = (slot * convolution.channels + first) * history;
                    prefetch_to_write(state.wrapping_add(at), TILE * history);
                }
                let at = (stretch.slot * convolution.channels + first) * history;
                // SAFETY: the caller's: the slot's channels are this thread's.
                let own = unsafe { std::slice::from_raw_parts_mut(state.add(at), valid * history) };
                if stretch.fresh || valid < TILE {
                    kept.fill(0.0);
                }
                if !stretch.fresh && threes {
                    // SAFETY: three numbers of each channel of a tile.
                    unsafe { apart(own.as_ptr(), kept.as_mut_ptr()) };
                } else if !stretch.fresh && history > 0 {
                    for (channel, own) in own.chunks_exact(history).enumerate() {
                        for (tap, &value) in own.iter().enumerate() {
                            kept[tap * TILE + channel] = value;
                        }
                    }
                }
                for row in stretch.start..stretch.start + stretch.len {
                    // SAFETY: the caller's.
                    let x = unsafe { x.get_mut(row, first, TILE) };
                    let mut lane = 0;
                    while lane < TILE {
                        let step = S::F32_LANES;
                        // Two vectors at a time, so that their chains overlap.
                        let mut sums = [simd.splat_f32s(0.0); 2];
                        let mut inputs = sums;
                        for v in 0..2 {
                            let at = lane + v * step;
                            inputs[v] = load(simd, &x[at..]);
                            let mut sum = load(simd, &convolution.bias[first + at..]);
                            for tap in 0..history {
                                let w = load(simd, &convolution.weight[tap * width + first + at..]);
                                sum = simd.mul_add_e_f32s(
                                    w,
                                    load(simd, &kept[tap * TILE + at..]),
                                    sum,
                                );
                            }
                            let w = load(simd, &convolution.weight[history * width + first + at..]);
                            sums[v] = simd.mul_add_e_f32s(w, inputs[v], sum);
                        }
                        let y = silu_each(simd, sums);
                        for v in 0..2 {
                            let at = lane + v * step;
                            store(simd, &mut x[at..], y[v]);
                            for tap in 1..history {
                                let next = load(simd, &kept[tap * TILE + at..]);
                                store(simd, &mut kept[(tap - 1) * TILE + at..], next);
                            }
                            if history > 0 {
                                store(simd, &mut kept[(history - 1) * TILE + at..], inputs[v]);
                            }
                        }
                        lane += 2 * step;
                    }
                }
                if threes {
                    // SAFETY: as above.
                    unsafe { together(kept.as_ptr(), own.as_mut_ptr()) };
                } else if history > 0 {
                    for (channel, own) in own.chunks_exact_mut(history).enumerate() {
                        for (tap, value) in own.iter_mut().enumerate() {
                            *value = kept[tap * TILE + channel];
                        }
                    }
                }
            }
            first += TILE;
        }
    }
}
