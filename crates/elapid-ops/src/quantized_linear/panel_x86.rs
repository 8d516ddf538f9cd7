//! Panels on AVX2 (eight rows, six tokens at a time) and on AVX-512 with VNNI (sixteen rows, twelve tokens).

use core::arch::x86_64::*;
use std::ops::Range;

use super::panel::Panel;
use super::unpack::Blocks;
use super::{Activations, Output, Weight};

/// # Safety
/// AVX2, FMA and F16C must be available; else as [`super::panel::rows`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn avx2<B: Blocks>(
    panel: &mut Panel,
    weight: &Weight<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    tokens: Range<usize>,
    out: Output,
) {
    const P: usize = 8;
    for first in rows.clone().step_by(P) {
        let count = P.min(rows.end - first);
        // SAFETY: rows and tokens of the arguments.
        unsafe {
            panel.fill::<B, P>(weight, first..first + count);
            let mut token = tokens.start;
            while token < tokens.end {
                let to = Target { out, first: first - rows.start, count, token };
                match tokens.end - token {
                    1 => eight_rows::<B, 1>(panel, x, to),
                    2 => eight_rows::<B, 2>(panel, x, to),
                    3 => eight_rows::<B, 3>(panel, x, to),
                    4 => eight_rows::<B, 4>(panel, x, to),
                    5 => eight_rows::<B, 5>(panel, x, to),
                    _ => eight_rows::<B, 6>(panel, x, to),
                }
                token += 6;
            }
        }
    }
}

/// Where a tile goes.
#[derive(Clone, Copy)]
struct Target {
    out: Output,
    first: usize,
    count: usize,
    token: usize,
}

impl Target {
    /// Writes the sums of a token's rows.
    ///
    /// # Safety
    /// The output must hold them.
    #[inline(always)]
    unsafe fn write(&self, t: usize, y: &[f32]) {
        // SAFETY: the caller's.
        unsafe {
            let to = self.out.pointer.add((self.token + t) * self.out.stride + self.first);
            std::slice::from_raw_parts_mut(to, self.count).copy_from_slice(&y[..self.count]);
        }
    }
}

/// # Safety
/// As [`avx2`], the panel filled.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn eight_rows<B: Blocks, const T: usize>(panel: &Panel, x: &Activations<'_>, to: Target) {
    let rows: [_; T] = std::array::from_fn(|t| x.integers(to.token + t));
    let mut y = [_mm256_setzero_ps(); T];
    for block in 0..x.columns() / B::LEN {
        // SAFETY: a block of the panel and of each token.
        unsafe {
            let weights = panel.integers.as_ptr().add(block * B::LEN * 8).cast::<__m256i>();
            let mut sums = [_mm256_setzero_si256(); T];
            let words = rows.map(|row| row.words.add(block * B::LEN).cast::<i32>());
            for pair in 0..B::LEN / 2 {
                let w = _mm256_loadu_si256(weights.add(pair));
                for t in 0..T {
                    let x = _mm256_set1_epi32(words[t].add(pair).read_unaligned());
                    sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(w, x));
                }
            }
            let d = _mm256_loadu_ps(panel.scales.as_ptr().add(block * 8));
            for t in 0..T {
                let d = _mm256_mul_ps(d, _mm256_set1_ps(*rows[t].scales.add(block)));
                y[t] = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(sums[t]), y[t]);
            }
            if B::OFFSETS {
                let offsets = panel.offsets.as_ptr().add(block * 64).cast::<__m256i>();
                let m = _mm256_loadu_ps(panel.offset_scales.as_ptr().add(block * 8));
                for t in 0..T {
                    let words = rows[t].sums.add(block * 8).cast::<i32>();
                    let mut sum = _mm256_setzero_si256();
                    for pair in 0..4 {
                        let w = _mm256_loadu_si256(offsets.add(pair));
                        let x = _mm256_set1_epi32(words.add(pair).read_unaligned());
                        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w, x));
                    }
                    let m = _mm256_mul_ps(m, _mm256_set1_ps(*rows[t].scales.add(block)));
                    y[t] = _mm256_fnmadd_ps(m, _mm256_cvtepi32_ps(sum), y[t]);
                }
            }
        }
    }
    for (t, &y) in y.iter().enumerate() {
        let mut room = [0.0f32; 8];
        // SAFETY: eight numbers; the caller's output.
        unsafe {
            _mm256_storeu_ps(room.as_mut_ptr(), y);
            to.write(t, &room);
        }
    }
}

/// # Safety
/// AVX-512 with VNNI must be available; else as [`super::panel::rows`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn avx512<B: Blocks>(
    panel: &mut Panel,
    weight: &Weight<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    tokens: Range<usize>,
    out: Output,
) {
    const P: usize = 16;
    for first in rows.clone().step_by(P) {
        let count = P.min(rows.end - first);
        // SAFETY: rows and tokens of the arguments.
        unsafe {
            panel.fill::<B, P>(weight, first..first + count);
            let mut token = tokens.start;
            while token < tokens.end {
                let to = Target { out, first: first - rows.start, count, token };
                match tokens.end - token {
                    1 => sixteen_rows::<B, 1>(panel, x, to),
                    2..4 => sixteen_rows::<B, 2>(panel, x, to),
                    4..8 => sixteen_rows::<B, 4>(panel, x, to),
                    8..12 => sixteen_rows::<B, 8>(panel, x, to),
                    _ => sixteen_rows::<B, 12>(panel, x, to),
                }
                token += match tokens.end - token {
                    1 => 1,
                    2..4 => 2,
                    4..8 => 4,
                    8..12 => 8,
                    _ => 12,
                };
            }
        }
    }
}

/// # Safety
/// As [`avx512`], the panel filled.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn sixteen_rows<B: Blocks, const T: usize>(panel: &Panel, x: &Activations<'_>, to: Target) {
    let rows: [_; T] = std::array::from_fn(|t| x.integers(to.token + t));
    let mut y = [_mm512_setzero_ps(); T];
    for block in 0..x.columns() / B::LEN {
        // SAFETY: a block of the panel and of each token.
        unsafe {
            let weights = panel.integers.as_ptr().add(block * B::LEN * 16).cast::<__m512i>();
            let mut sums = [_mm512_setzero_si512(); T];
            let words = rows.map(|row| row.words.add(block * B::LEN).cast::<i32>());
            for pair in 0..B::LEN / 2 {
                let w = _mm512_loadu_si512(weights.add(pair));
                for t in 0..T {
                    let x = _mm512_set1_epi32(words[t].add(pair).read_unaligned());
                    sums[t] = _mm512_dpwssd_epi32(sums[t], w, x);
                }
            }
            let d = _mm512_loadu_ps(panel.scales.as_ptr().add(block * 16));
            for t in 0..T {
                let d = _mm512_mul_ps(d, _mm512_set1_ps(*rows[t].scales.add(block)));
                y[t] = _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(sums[t]), y[t]);
            }
            if B::OFFSETS {
                let offsets = panel.offsets.as_ptr().add(block * 128).cast::<__m512i>();
                let m = _mm512_loadu_ps(panel.offset_scales.as_ptr().add(block * 16));
                for t in 0..T {
                    let words = rows[t].sums.add(block * 8).cast::<i32>();
                    let mut sum = _mm512_setzero_si512();
                    for pair in 0..4 {
                        let w = _mm512_loadu_si512(offsets.add(pair));
                        let x = _mm512_set1_epi32(words.add(pair).read_unaligned());
                        sum = _mm512_dpwssd_epi32(sum, w, x);
                    }
                    let m = _mm512_mul_ps(m, _mm512_set1_ps(*rows[t].scales.add(block)));
                    y[t] = _mm512_fnmadd_ps(m, _mm512_cvtepi32_ps(sum), y[t]);
                }
            }
        }
    }
    for (t, &y) in y.iter().enumerate() {
        let mut room = [0.0f32; 16];
        // SAFETY: sixteen numbers; the caller's output.
        unsafe {
            _mm512_storeu_ps(room.as_mut_ptr(), y);
            to.write(t, &room);
        }
    }
}
