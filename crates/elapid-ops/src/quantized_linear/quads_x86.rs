//! Quads of `q8_0`, `q4_0` and `q4_k`: how blocks and tokens are laid out, and their products on any of [`Lanes`].

use core::arch::x86_64::*;
use std::marker::PhantomData;
use std::ops::Range;

use super::activations::Row;
use super::lanes_x86::{Avx2, Lanes, Vnni, transposed};
use super::quads::{Kernel, QUAD, ROWS, rows};
use super::{Activations, Output, Weight};
use crate::blocks::Encoding;

/// True for encodings that have kernels here.
pub(super) fn has(encoding: Encoding) -> bool {
    matches!(encoding, Encoding::Q8_0 | Encoding::Q4_0 | Encoding::Q4_K)
}

/// # Safety
/// AVX2, FMA and F16C must be available, the encoding be one that [`has`]; else as [`super::product`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn avx2(
    weight: &Weight<'_>,
    x: &Activations<'_>,
    range: Range<usize>,
    out: Output,
) {
    // SAFETY: the caller's.
    unsafe {
        match weight.encoding {
            Encoding::Q8_0 => rows::<Eight<Avx2>>(weight, x, range, out),
            Encoding::Q4_0 => rows::<Four<Avx2>>(weight, x, range, out),
            _ => rows::<FourK<Avx2>>(weight, x, range, out),
        }
    }
}

/// # Safety
/// AVX-512 with VNNI must be available; else as [`avx2`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn vnni(
    weight: &Weight<'_>,
    x: &Activations<'_>,
    range: Range<usize>,
    out: Output,
) {
    // SAFETY: the caller's.
    unsafe {
        match weight.encoding {
            Encoding::Q8_0 => rows::<Eight<Vnni>>(weight, x, range, out),
            Encoding::Q4_0 => rows::<Four<Vnni>>(weight, x, range, out),
            _ => rows::<FourK<Vnni>>(weight, x, range, out),
        }
    }
}

// SAFETY of everything below: the caller's: blocks, inputs and room are there, and the instruction set is available
// where a function is inlined.

/// The half-precision numbers at the beginning of sixteen blocks as f32.
#[inline(always)]
unsafe fn scales(rows: &[*const u8; ROWS], to: *mut u8) {
    for half in 0..2 {
        // SAFETY: as above.
        unsafe {
            let mut halves = [0i16; 8];
            for (r, own) in halves.iter_mut().enumerate() {
                *own = bits(rows[8 * half + r]);
            }
            let [a, b, c, d, e, f, g, h] = halves;
            let v = _mm_set_epi16(h, g, f, e, d, c, b, a);
            _mm256_store_ps(to.cast::<f32>().add(8 * half), _mm256_cvtph_ps(v));
        }
    }
}

/// Two bytes.
#[inline(always)]
unsafe fn bits(from: *const u8) -> i16 {
    // SAFETY: as above.
    unsafe { from.cast::<i16>().read_unaligned() }
}

/// Blocks of 32 in `BITS` bits: the quads, then a line of scales. `L::FLIP` is added to the bytes of eight bits.
#[inline(always)]
unsafe fn arrange_32<L: Lanes, const BITS: usize>(rows: &[*const u8; ROWS], to: *mut u8) {
    // SAFETY: as above.
    unsafe {
        let (flip, nibble) = (_mm256_set1_epi8(L::FLIP), _mm256_set1_epi8(15));
        let (a, b) = (transposed(rows, 0, 2), transposed(rows, 8, 2));
        for j in 0..4 {
            let at = to.add(QUAD * j);
            if BITS == 8 {
                L::put(_mm256_xor_si256(a[j], flip), _mm256_xor_si256(b[j], flip), at);
            } else {
                L::put(_mm256_and_si256(a[j], nibble), _mm256_and_si256(b[j], nibble), at);
                let (a, b) = (_mm256_srli_epi16::<4>(a[j]), _mm256_srli_epi16::<4>(b[j]));
                let at = at.add(4 * QUAD);
                L::put(_mm256_and_si256(a, nibble), _mm256_and_si256(b, nibble), at);
            }
        }
        if BITS == 8 {
            let (a, b) = (transposed(rows, 0, 18), transposed(rows, 8, 18));
            for j in 0..4 {
                let at = to.add(QUAD * (4 + j));
                L::put(_mm256_xor_si256(a[j], flip), _mm256_xor_si256(b[j], flip), at);
            }
        }
        scales(rows, to.add(8 * QUAD));
    }
}

/// Where the parts of a rearranged block of `q4_k` begin: 64 quads, eight lines of scales inside the block as pairs of
/// 16 bits, four lines of offsets as such pairs, the scales of both as f32.
const S: usize = 64 * QUAD;
const OFFSETS: usize = S + 8 * QUAD;
const D: usize = OFFSETS + 4 * QUAD;
const M: usize = D + QUAD;

/// The scale of a group stands in both halves of a lane if `PAIRS`, else in the lower one.
#[inline(always)]
unsafe fn arrange_k<const PAIRS: bool>(rows: &[*const u8; ROWS], to: *mut u8) {
    // SAFETY: as above.
    unsafe {
        let nibble = _mm256_set1_epi8(15);
        for half in 0..2 {
            let to = to.add(32 * half);
            for pair in 0..4 {
                for part in 0..2 {
                    let q = transposed(rows, 8 * half, 16 + 32 * pair + 16 * part);
                    for (j, &q) in q.iter().enumerate() {
                        let at = to.add(QUAD * (16 * pair + 4 * part + j));
                        let high = _mm256_srli_epi16::<4>(q);
                        _mm256_store_si256(at.cast(), _mm256_and_si256(q, nibble));
                        _mm256_store_si256(at.add(8 * QUAD).cast(), _mm256_and_si256(high, nibble));
                    }
                }
            }
            // d and m, then the twelve bytes of `q4_k::scales`.
            let [dm, a, b, c] = transposed(rows, 8 * half, 0);
            let six = _mm256_set1_epi8(63);
            let s =
                [_mm256_and_si256(a, six), _mm256_or_si256(_mm256_and_si256(c, nibble), upper(a))];
            let c = _mm256_srli_epi16::<4>(c);
            let t =
                [_mm256_and_si256(b, six), _mm256_or_si256(_mm256_and_si256(c, nibble), upper(b))];
            let bytes = _mm256_set1_epi32(255);
            for group in 0..8 {
                let shift = _mm_cvtsi32_si128(8 * (group as i32 % 4));
                let lane = _mm256_and_si256(_mm256_srl_epi32(s[group / 4], shift), bytes);
                let both = _mm256_or_si256(lane, _mm256_slli_epi32::<16>(lane));
                let lane = if PAIRS { both } else { lane };
                _mm256_store_si256(to.add(S + QUAD * group).cast(), lane);
            }
            for pair in 0..4 {
                let shift = _mm_cvtsi32_si128(16 * (pair as i32 % 2));
                let two = _mm256_srl_epi32(t[pair / 2], shift);
                let low = _mm256_and_si256(two, bytes);
                let high = _mm256_and_si256(_mm256_srli_epi32::<8>(two), bytes);
                let both = _mm256_or_si256(low, _mm256_slli_epi32::<16>(high));
                _mm256_store_si256(to.add(OFFSETS + QUAD * pair).cast(), both);
            }
            let words = _mm256_set1_epi32(0xFFFF);
            let d = float(_mm256_and_si256(dm, words));
            let m = float(_mm256_srli_epi32::<16>(dm));
            _mm256_store_ps(to.add(D).cast(), d);
            _mm256_store_ps(to.add(M).cast(), m);
        }
    }
}

/// The upper two bits of bytes where bits 4 and 5 belong.
#[inline(always)]
unsafe fn upper(v: __m256i) -> __m256i {
    // SAFETY: as above.
    unsafe { _mm256_and_si256(_mm256_srli_epi16::<2>(v), _mm256_set1_epi8(0x30)) }
}

/// The half-precision numbers in the lower halves of the lanes.
#[inline(always)]
unsafe fn float(v: __m256i) -> __m256 {
    // SAFETY: as above.
    unsafe {
        let low = _mm256_castsi256_si128(v);
        _mm256_cvtph_ps(_mm_packus_epi32(low, _mm256_extracti128_si256::<1>(v)))
    }
}

/// A token's quad.
#[inline(always)]
unsafe fn quad(x: &Row, at: usize) -> i32 {
    // SAFETY: as above.
    unsafe { x.bytes.add(at).cast::<i32>().read_unaligned() }
}

/// `q8_0`. A token's block: quads as the instruction set wants them, where sums begin, scale.
pub(super) struct Eight<L>(PhantomData<L>);

impl<L: Lanes> Kernel for Eight<L> {
    const LEN: usize = 32;
    const BYTES: usize = 34;
    const LINES: usize = 9;
    const TILE: usize = L::TILE;
    const WORDS: usize = 8 * L::WORDS + 2;
    #[inline(always)]
    unsafe fn arrange(rows: &[*const u8; ROWS], to: *mut u8) {
        // SAFETY: as above.
        unsafe { arrange_32::<L, 8>(rows, to) }
    }
    #[inline(always)]
    unsafe fn lay(x: &Row, block: usize, tokens: usize, t: usize, to: *mut i32) {
        // SAFETY: as above.
        unsafe {
            let quads = to.add(L::WORDS * t);
            let sum = i32::from(*x.sums.add(block));
            let begin = L::lay_eight(x.bytes.add(32 * block), sum, quads, L::WORDS * tokens);
            let end = to.add(8 * L::WORDS * tokens + t);
            *end = begin;
            *end.add(tokens) = (*x.scales.add(block)).to_bits() as i32;
        }
    }
    #[inline(always)]
    unsafe fn add<const T: usize>(
        mut arranged: *const u8,
        mut x: *const i32,
        y: *mut f32,
        four: usize,
    ) {
        // SAFETY: as above.
        unsafe {
            let mut sums = [L::every(0); T];
            let mut others = sums;
            let end = x.add(8 * L::WORDS * T);
            for (t, sums) in sums.iter_mut().enumerate() {
                *sums = L::every(*end.add(t));
            }
            for _ in 0..four {
                for turn in 0..2 {
                    let w = L::quads(arranged);
                    let sums = if in_turns::<L>(T) && turn == 1 { &mut others } else { &mut sums };
                    for (t, sums) in sums.iter_mut().enumerate() {
                        *sums = L::add_eight(*sums, w, x.add(L::WORDS * t));
                    }
                    (arranged, x) = (arranged.add(QUAD), x.add(L::WORDS * T));
                }
            }
            let sums = if in_turns::<L>(T) { both::<L, T>(sums, others) } else { sums };
            for (t, sums) in sums.into_iter().enumerate() {
                L::take(sums, arranged, end.add(T + t), y.add(ROWS * t));
            }
        }
    }
}

/// `q4_0`. A token's block: quads, where sums begin, scale.
pub(super) struct Four<L>(PhantomData<L>);

impl<L: Lanes> Kernel for Four<L> {
    const LEN: usize = 32;
    const BYTES: usize = 18;
    const LINES: usize = 9;
    const TILE: usize = L::TILE;
    const WORDS: usize = 8 + 2;
    #[inline(always)]
    unsafe fn arrange(rows: &[*const u8; ROWS], to: *mut u8) {
        // SAFETY: as above.
        unsafe { arrange_32::<L, 4>(rows, to) }
    }
    #[inline(always)]
    unsafe fn lay(x: &Row, block: usize, tokens: usize, t: usize, to: *mut i32) {
        // SAFETY: as above.
        unsafe {
            for j in 0..8 {
                *to.add(tokens * j + t) = quad(x, 32 * block + 4 * j);
            }
            let end = to.add(8 * tokens + t);
            *end = L::begin_four(x.bytes.add(32 * block), i32::from(*x.sums.add(block)));
            *end.add(tokens) = (*x.scales.add(block)).to_bits() as i32;
        }
    }
    #[inline(always)]
    unsafe fn add<const T: usize>(arranged: *const u8, x: *const i32, y: *mut f32, four: usize) {
        // SAFETY: as above.
        unsafe {
            let mut sums = [L::every(0); T];
            let end = x.add(8 * T);
            for (t, sums) in sums.iter_mut().enumerate() {
                *sums = L::every(*end.add(t));
            }
            let sums = quads_of_four::<L, T>(sums, arranged, x, four);
            for (t, sums) in sums.into_iter().enumerate() {
                let d = arranged.add(8 * QUAD);
                L::take(L::whole(sums), d, end.add(T + t), y.add(ROWS * t));
            }
        }
    }
}

/// True if the quads of a block are added to two sums of each token in turns: for few tokens the processor would wait.
const fn in_turns<L: Lanes>(tokens: usize) -> bool {
    L::CHAINS == 2 && tokens <= 8
}

/// The sums of both.
#[inline(always)]
unsafe fn both<L: Lanes, const T: usize>(
    mut sums: [L::Sums; T],
    others: [L::Sums; T],
) -> [L::Sums; T] {
    for (sum, other) in sums.iter_mut().zip(others) {
        // SAFETY: as above.
        unsafe { *sum = L::sum(*sum, other) };
    }
    sums
}

/// Adds the products of eight quads of four bits.
#[inline(always)]
unsafe fn quads_of_four<L: Lanes, const T: usize>(
    mut sums: [L::Sums; T],
    mut w: *const u8,
    mut x: *const i32,
    four: usize,
) -> [L::Sums; T] {
    // SAFETY: as above.
    let mut others = [unsafe { L::every(0) }; T];
    for _ in 0..four {
        for turn in 0..2 {
            // SAFETY: as above.
            unsafe {
                let quads = L::quads(w);
                let sums = if in_turns::<L>(T) && turn == 1 { &mut others } else { &mut sums };
                for (t, sums) in sums.iter_mut().enumerate() {
                    *sums = L::add_four(*sums, quads, x.add(t));
                }
                (w, x) = (w.add(QUAD), x.add(T));
            }
        }
    }
    // SAFETY: as above.
    if in_turns::<L>(T) { unsafe { both::<L, T>(sums, others) } } else { sums }
}

/// `q4_k`. A token's block: quads, sums of every 32 in pairs, scale.
pub(super) struct FourK<L>(PhantomData<L>);

impl<L: Lanes> Kernel for FourK<L> {
    const LEN: usize = 256;
    const BYTES: usize = 144;
    const LINES: usize = 64 + 8 + 4 + 2;
    const TILE: usize = L::TILE;
    const WORDS: usize = 64 + 4 + 1;
    #[inline(always)]
    unsafe fn arrange(rows: &[*const u8; ROWS], to: *mut u8) {
        // SAFETY: as above.
        unsafe { if L::PAIRS { arrange_k::<true>(rows, to) } else { arrange_k::<false>(rows, to) } }
    }
    #[inline(always)]
    unsafe fn lay(x: &Row, block: usize, tokens: usize, t: usize, to: *mut i32) {
        // SAFETY: as above.
        unsafe {
            let to = to.add(t);
            for j in 0..64 {
                *to.add(tokens * j) = quad(x, 256 * block + 4 * j);
            }
            for pair in 0..4 {
                let sums = x.sums.add(8 * block + 2 * pair);
                *to.add(tokens * (64 + pair)) = sums.cast::<i32>().read_unaligned();
            }
            *to.add(tokens * 68) = (*x.scales.add(block)).to_bits() as i32;
        }
    }
    #[inline(always)]
    unsafe fn add<const T: usize>(arranged: *const u8, x: *const i32, y: *mut f32, four: usize) {
        // SAFETY: as above.
        unsafe {
            // Sums of products and of offsets, as floats only at the end.
            let mut sums = [L::every(0); T];
            for group in 0..8 {
                let (w, x) = (arranged.add(8 * QUAD * group), x.add(8 * T * group));
                let parts = quads_of_four::<L, T>([L::every(0); T], w, x, four);
                for (sums, part) in sums.iter_mut().zip(parts) {
                    *sums = L::add_scaled(*sums, part, arranged.add(S + QUAD * group));
                }
            }
            let scales = x.add(68 * T);
            for (t, sums) in sums.into_iter().enumerate() {
                let mut offsets = L::every(0);
                for pair in 0..4 {
                    let x = x.add(T * (64 + pair) + t);
                    offsets = L::add_pairs(offsets, arranged.add(OFFSETS + QUAD * pair), x);
                }
                let y = y.add(ROWS * t);
                L::take(sums, arranged.add(D), scales.add(t), y);
                L::take_off(offsets, arranged.add(M), scales.add(t), y);
            }
        }
    }
}
