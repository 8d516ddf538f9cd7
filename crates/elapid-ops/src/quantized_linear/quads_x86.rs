//! Quads on AVX2, where bytes are multiplied in pairs, and on AVX-512 with VNNI, where they are added up in fours.

use core::arch::x86_64::*;
use std::ops::Range;

use super::activations::Row;
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
            Encoding::Q8_0 => rows::<Avx2<8>>(weight, x, range, out),
            Encoding::Q4_0 => rows::<Avx2<4>>(weight, x, range, out),
            _ => rows::<Avx2K>(weight, x, range, out),
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
            Encoding::Q8_0 => rows::<Vnni<8>>(weight, x, range, out),
            Encoding::Q4_0 => rows::<Vnni<4>>(weight, x, range, out),
            _ => rows::<VnniK>(weight, x, range, out),
        }
    }
}

// SAFETY of everything below: the caller's: blocks, inputs and room are there, and the instruction set is available
// where a function is inlined.

/// Sixteen bytes of eight rows, `at` bytes from where they begin: vector j has each row's j-th quad, a lane a row.
#[inline(always)]
unsafe fn transposed(rows: &[*const u8; ROWS], first: usize, at: usize) -> [__m256i; 4] {
    // SAFETY: as above.
    unsafe {
        let mut v = [_mm256_setzero_si256(); 4];
        for (r, v) in v.iter_mut().enumerate() {
            let (low, high) = (rows[first + r].add(at), rows[first + r + 4].add(at));
            *v = _mm256_loadu2_m128i(high.cast(), low.cast());
        }
        let (a, b) = (_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));
        let (c, d) = (_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
        [
            _mm256_unpacklo_epi64(a, c),
            _mm256_unpackhi_epi64(a, c),
            _mm256_unpacklo_epi64(b, d),
            _mm256_unpackhi_epi64(b, d),
        ]
    }
}

/// The half-precision numbers at the beginning of sixteen blocks as f32.
#[inline(always)]
unsafe fn scales(rows: &[*const u8; ROWS], to: *mut u8) {
    for first in [0, 8] {
        // SAFETY: as above.
        unsafe {
            let mut halves = [0u16; 8];
            for (half, row) in halves.iter_mut().zip(&rows[first..]) {
                *half = row.cast::<u16>().read_unaligned();
            }
            let v = _mm256_cvtph_ps(_mm_loadu_si128(halves.as_ptr().cast()));
            _mm256_storeu_ps(to.cast::<f32>().add(first), v);
        }
    }
}

/// Blocks of 32 in `BITS` bits: the quads, then a line of scales. `flip` is added to the bytes of eight bits.
#[inline(always)]
unsafe fn arrange_32<const BITS: usize>(rows: &[*const u8; ROWS], to: *mut u8, flip: i8) {
    // SAFETY: as above.
    unsafe {
        let (flip, nibble) = (_mm256_set1_epi8(flip), _mm256_set1_epi8(15));
        for half in 0..2 {
            let first = transposed(rows, 8 * half, 2);
            let second = if BITS == 8 { transposed(rows, 8 * half, 18) } else { first };
            for j in 0..4 {
                let (low, high) = if BITS == 8 {
                    (_mm256_xor_si256(first[j], flip), _mm256_xor_si256(second[j], flip))
                } else {
                    let high = _mm256_srli_epi16::<4>(second[j]);
                    (_mm256_and_si256(first[j], nibble), _mm256_and_si256(high, nibble))
                };
                let at = to.add(QUAD * j + 32 * half);
                _mm256_store_si256(at.cast(), low);
                _mm256_store_si256(at.add(4 * QUAD).cast(), high);
            }
        }
        scales(rows, to.add(8 * QUAD));
    }
}

/// Where the parts of a rearranged block of `q4_k` begin: 64 quads, eight lines of scales inside the block as pairs of
/// 16 bits, four lines of offsets as such pairs, the scales of both as f32.
const S: usize = 64 * QUAD;
const T: usize = S + 8 * QUAD;
const D: usize = T + 4 * QUAD;
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
                _mm256_store_si256(to.add(T + QUAD * pair).cast(), both);
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

/// A token's quad in every lane.
#[inline(always)]
unsafe fn quad(x: &Row, at: usize) -> i32 {
    // SAFETY: as above.
    unsafe { x.bytes.add(at).cast::<i32>().read_unaligned() }
}

/// Two neighbouring sums of 32 inputs.
#[inline(always)]
unsafe fn two_sums(x: &Row, at: usize) -> i32 {
    // SAFETY: as above.
    unsafe { x.sums.add(at).cast::<i32>().read_unaligned() }
}

/// `q8_0` and `q4_0`.
#[derive(Clone, Copy)]
struct Avx2<const BITS: usize>;

impl<const BITS: usize> Kernel for Avx2<BITS> {
    type Sums = [__m256; 2];
    const LEN: usize = 32;
    const BYTES: usize = 2 + 4 * BITS;
    const LINES: usize = 9;
    const TILE: usize = 4;
    #[inline(always)]
    unsafe fn zero() -> Self::Sums {
        // SAFETY: as above.
        unsafe { [_mm256_setzero_ps(); 2] }
    }
    #[inline(always)]
    unsafe fn arrange(rows: &[*const u8; ROWS], to: *mut u8) {
        // SAFETY: as above.
        unsafe { arrange_32::<BITS>(rows, to, 0) }
    }
    #[inline(always)]
    unsafe fn add<const T: usize>(
        arranged: *const u8,
        x: &[Row; T],
        block: usize,
        y: &mut [Self::Sums; T],
    ) {
        // SAFETY: as above.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let mut sums = [[_mm256_setzero_si256(); 2]; T];
            for j in 0..8 {
                let at = arranged.add(QUAD * j);
                let w = [_mm256_load_si256(at.cast()), _mm256_load_si256(at.add(32).cast())];
                let size = [_mm256_abs_epi8(w[0]), _mm256_abs_epi8(w[1])];
                for t in 0..T {
                    let x = _mm256_set1_epi32(quad(&x[t], block * 32 + 4 * j));
                    for h in 0..2 {
                        sums[t][h] = if BITS == 8 {
                            // Bytes without sign times bytes with: at most 2 * 128 * 127.
                            let pairs = _mm256_maddubs_epi16(size[h], _mm256_sign_epi8(x, w[h]));
                            _mm256_add_epi32(sums[t][h], _mm256_madd_epi16(pairs, ones))
                        } else {
                            // At most 8 * 2 * 15 * 127.
                            _mm256_add_epi16(sums[t][h], _mm256_maddubs_epi16(w[h], x))
                        };
                    }
                }
            }
            let d = arranged.add(8 * QUAD).cast::<f32>();
            let d = [_mm256_load_ps(d), _mm256_load_ps(d.add(8))];
            for t in 0..T {
                let scale = _mm256_set1_ps(*x[t].scales.add(block));
                let offset = _mm256_set1_epi32(8 * i32::from(*x[t].sums.add(block)));
                for h in 0..2 {
                    let sum = if BITS == 8 {
                        sums[t][h]
                    } else {
                        _mm256_sub_epi32(_mm256_madd_epi16(sums[t][h], ones), offset)
                    };
                    let d = _mm256_mul_ps(d[h], scale);
                    y[t][h] = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(sum), y[t][h]);
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn store(sums: Self::Sums, to: *mut f32) {
        // SAFETY: as above.
        unsafe {
            _mm256_storeu_ps(to, sums[0]);
            _mm256_storeu_ps(to.add(8), sums[1]);
        }
    }
    #[inline(always)]
    fn ask(at: *const u8) {
        // SAFETY: asking reads nothing that could be seen.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}

/// `q4_k`.
#[derive(Clone, Copy)]
struct Avx2K;

impl Kernel for Avx2K {
    type Sums = [__m256; 2];
    const LEN: usize = 256;
    const BYTES: usize = 144;
    const LINES: usize = 64 + 8 + 4 + 2;
    const TILE: usize = 4;
    #[inline(always)]
    unsafe fn zero() -> Self::Sums {
        // SAFETY: as above.
        unsafe { [_mm256_setzero_ps(); 2] }
    }
    #[inline(always)]
    unsafe fn arrange(rows: &[*const u8; ROWS], to: *mut u8) {
        // SAFETY: as above.
        unsafe { arrange_k::<true>(rows, to) }
    }
    #[inline(always)]
    unsafe fn add<const N: usize>(
        arranged: *const u8,
        x: &[Row; N],
        block: usize,
        y: &mut [Self::Sums; N],
    ) {
        // SAFETY: as above.
        unsafe {
            // Sums of products and of offsets, as floats only at the end.
            let mut sums = [[_mm256_setzero_si256(); 2]; N];
            for group in 0..8 {
                let mut words = [[_mm256_setzero_si256(); 2]; N];
                for j in 8 * group..8 * group + 8 {
                    let at = arranged.add(QUAD * j);
                    let w = [_mm256_load_si256(at.cast()), _mm256_load_si256(at.add(32).cast())];
                    for t in 0..N {
                        let x = _mm256_set1_epi32(quad(&x[t], block * 256 + 4 * j));
                        for h in 0..2 {
                            // At most 8 * 2 * 15 * 127.
                            let pairs = _mm256_maddubs_epi16(w[h], x);
                            words[t][h] = _mm256_add_epi16(words[t][h], pairs);
                        }
                    }
                }
                let s = arranged.add(S + QUAD * group);
                let s = [_mm256_load_si256(s.cast()), _mm256_load_si256(s.add(32).cast())];
                for t in 0..N {
                    for h in 0..2 {
                        let scaled = _mm256_madd_epi16(words[t][h], s[h]);
                        sums[t][h] = _mm256_add_epi32(sums[t][h], scaled);
                    }
                }
            }
            for h in 0..2 {
                let d = _mm256_load_ps(arranged.add(D + 32 * h).cast());
                let m = _mm256_load_ps(arranged.add(M + 32 * h).cast());
                for t in 0..N {
                    let mut offsets = _mm256_setzero_si256();
                    for pair in 0..4 {
                        let w = _mm256_load_si256(arranged.add(T + QUAD * pair + 32 * h).cast());
                        let x = _mm256_set1_epi32(two_sums(&x[t], block * 8 + 2 * pair));
                        offsets = _mm256_add_epi32(offsets, _mm256_madd_epi16(w, x));
                    }
                    let scale = _mm256_set1_ps(*x[t].scales.add(block));
                    let (d, m) = (_mm256_mul_ps(d, scale), _mm256_mul_ps(m, scale));
                    y[t][h] = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(sums[t][h]), y[t][h]);
                    y[t][h] = _mm256_fnmadd_ps(m, _mm256_cvtepi32_ps(offsets), y[t][h]);
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn store(sums: Self::Sums, to: *mut f32) {
        // SAFETY: as above.
        unsafe { Avx2::<4>::store(sums, to) }
    }
    #[inline(always)]
    fn ask(at: *const u8) {
        Avx2::<4>::ask(at);
    }
}

/// `q8_0` and `q4_0`: bytes of eight bits are kept with 128 added, since one factor has no sign.
#[derive(Clone, Copy)]
struct Vnni<const BITS: usize>;

impl<const BITS: usize> Kernel for Vnni<BITS> {
    type Sums = __m512;
    const LEN: usize = 32;
    const BYTES: usize = 2 + 4 * BITS;
    const LINES: usize = 9;
    const TILE: usize = 8;
    #[inline(always)]
    unsafe fn zero() -> Self::Sums {
        // SAFETY: as above.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn arrange(rows: &[*const u8; ROWS], to: *mut u8) {
        // SAFETY: as above.
        unsafe { arrange_32::<BITS>(rows, to, i8::MIN) }
    }
    #[inline(always)]
    unsafe fn add<const N: usize>(
        arranged: *const u8,
        x: &[Row; N],
        block: usize,
        y: &mut [Self::Sums; N],
    ) {
        // SAFETY: as above.
        unsafe {
            let mut sums = [_mm512_setzero_si512(); N];
            for j in 0..8 {
                let w = _mm512_load_si512(arranged.add(QUAD * j).cast());
                for t in 0..N {
                    let x = _mm512_set1_epi32(quad(&x[t], block * 32 + 4 * j));
                    sums[t] = _mm512_dpbusd_epi32(sums[t], w, x);
                }
            }
            let d = _mm512_load_ps(arranged.add(8 * QUAD).cast());
            for t in 0..N {
                let added = if BITS == 8 { 128 } else { 8 };
                let offset = added * i32::from(*x[t].sums.add(block));
                let sum = _mm512_sub_epi32(sums[t], _mm512_set1_epi32(offset));
                let d = _mm512_mul_ps(d, _mm512_set1_ps(*x[t].scales.add(block)));
                y[t] = _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(sum), y[t]);
            }
        }
    }
    #[inline(always)]
    unsafe fn store(sums: Self::Sums, to: *mut f32) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(to, sums) }
    }
    #[inline(always)]
    fn ask(at: *const u8) {
        Avx2::<4>::ask(at);
    }
}

/// `q4_k`.
#[derive(Clone, Copy)]
struct VnniK;

impl Kernel for VnniK {
    type Sums = __m512;
    const LEN: usize = 256;
    const BYTES: usize = 144;
    const LINES: usize = 64 + 8 + 4 + 2;
    const TILE: usize = 8;
    #[inline(always)]
    unsafe fn zero() -> Self::Sums {
        // SAFETY: as above.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn arrange(rows: &[*const u8; ROWS], to: *mut u8) {
        // SAFETY: as above.
        unsafe { arrange_k::<false>(rows, to) }
    }
    #[inline(always)]
    unsafe fn add<const N: usize>(
        arranged: *const u8,
        x: &[Row; N],
        block: usize,
        y: &mut [Self::Sums; N],
    ) {
        // SAFETY: as above.
        unsafe {
            let mut sums = [_mm512_setzero_si512(); N];
            for group in 0..8 {
                let mut parts = [_mm512_setzero_si512(); N];
                for j in 8 * group..8 * group + 8 {
                    let w = _mm512_load_si512(arranged.add(QUAD * j).cast());
                    for t in 0..N {
                        let x = _mm512_set1_epi32(quad(&x[t], block * 256 + 4 * j));
                        parts[t] = _mm512_dpbusd_epi32(parts[t], w, x);
                    }
                }
                let s = _mm512_load_si512(arranged.add(S + QUAD * group).cast());
                for t in 0..N {
                    sums[t] = _mm512_add_epi32(sums[t], _mm512_mullo_epi32(parts[t], s));
                }
            }
            let d = _mm512_load_ps(arranged.add(D).cast());
            let m = _mm512_load_ps(arranged.add(M).cast());
            for t in 0..N {
                let mut offsets = _mm512_setzero_si512();
                for pair in 0..4 {
                    let w = _mm512_load_si512(arranged.add(T + QUAD * pair).cast());
                    let x = _mm512_set1_epi32(two_sums(&x[t], block * 8 + 2 * pair));
                    offsets = _mm512_dpwssd_epi32(offsets, w, x);
                }
                let scale = _mm512_set1_ps(*x[t].scales.add(block));
                let (d, m) = (_mm512_mul_ps(d, scale), _mm512_mul_ps(m, scale));
                y[t] = _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(sums[t]), y[t]);
                y[t] = _mm512_fnmadd_ps(m, _mm512_cvtepi32_ps(offsets), y[t]);
            }
        }
    }
    #[inline(always)]
    unsafe fn store(sums: Self::Sums, to: *mut f32) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(to, sums) }
    }
    #[inline(always)]
    fn ask(at: *const u8) {
        Avx2::<4>::ask(at);
    }
}
