//! Eight rows with one token on AVX2. The integers of a block are multiplied in pairs, and the eight rows' vectors
//! of sums are added up into one vector with a lane a row.

use core::arch::x86_64::*;

use super::activations::Row;
use super::unpack::Blocks;
use crate::blocks::{Encoding, q4_k};

/// How far ahead of use rows are asked for: the next eight rows.
const AHEAD: usize = super::direct::GROUP;

/// # Safety
/// AVX2, FMA and F16C must be available; eight rows of `blocks` blocks at `from`, `row_bytes` apart, as many blocks in
/// `x`, room for eight numbers at `out`.
#[inline]
pub(super) unsafe fn eight<B: Blocks>(
    from: *const u8,
    row_bytes: usize,
    blocks: usize,
    x: &Row,
    out: *mut f32,
) {
    // SAFETY: the caller's.
    unsafe {
        match B::ENCODING {
            Encoding::Q8_0 => q8_0(from, row_bytes, blocks, x, out),
            Encoding::Q4_0 => q4_0(from, row_bytes, blocks, x, out),
            Encoding::Q4_K => q4_k(from, row_bytes, blocks, x, out),
            _ => unpacked::<B>(from, row_bytes, blocks, x, out),
        }
    }
}

/// The sums of eight vectors of eight.
#[inline]
#[target_feature(enable = "avx2")]
fn add_up(v: [__m256i; 8]) -> __m256i {
    let a = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    let b = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
    let low = _mm256_permute2x128_si256::<0x20>(a, b);
    _mm256_add_epi32(low, _mm256_permute2x128_si256::<0x31>(a, b))
}

/// The half-precision numbers at `from` of eight rows.
///
/// # Safety
/// They must be there.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn halves(from: *const u8, row_bytes: usize) -> __m256 {
    // SAFETY: the caller's.
    let half = |row: usize| unsafe {
        i16::from_le_bytes(from.add(row * row_bytes).cast::<[u8; 2]>().read_unaligned())
    };
    _mm256_cvtph_ps(_mm_set_epi16(
        half(7),
        half(6),
        half(5),
        half(4),
        half(3),
        half(2),
        half(1),
        half(0),
    ))
}

/// Asks for `BYTES` of the rows to come, at the same place of the walk. An address beyond the weight does no harm.
#[inline]
#[target_feature(enable = "avx2")]
fn ask_ahead<const BYTES: usize>(from: *const u8, row_bytes: usize, block: usize) {
    let next = from.wrapping_add(AHEAD * row_bytes + block * BYTES * 8);
    let mut at = 0;
    while at < BYTES * 8 {
        _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(at).cast());
        at += 64;
    }
}

/// # Safety
/// As [`eight`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q8_0(from: *const u8, row_bytes: usize, blocks: usize, x: &Row, out: *mut f32) {
    let mut y = _mm256_setzero_ps();
    for block in 0..blocks {
        ask_ahead::<34>(from, row_bytes, block);
        // SAFETY: the block of each row, and the token's.
        unsafe {
            let words = x.words.add(block * 32).cast::<__m256i>();
            let (low, high) = (_mm256_loadu_si256(words), _mm256_loadu_si256(words.add(1)));
            let at = from.add(block * 34);
            let mut sums = [_mm256_setzero_si256(); 8];
            for (row, sum) in sums.iter_mut().enumerate() {
                let q = at.add(row * row_bytes + 2).cast::<__m128i>();
                let a = _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(q)), low);
                let b = _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(q.add(1))), high);
                *sum = _mm256_add_epi32(a, b);
            }
            let scale = _mm256_mul_ps(halves(at, row_bytes), _mm256_set1_ps(*x.scales.add(block)));
            y = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(add_up(sums)), y);
        }
    }
    // SAFETY: room for eight.
    unsafe { _mm256_storeu_ps(out, y) };
}

/// # Safety
/// As [`eight`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q4_0(from: *const u8, row_bytes: usize, blocks: usize, x: &Row, out: *mut f32) {
    let mut y = _mm256_setzero_ps();
    let nibble = _mm256_set1_epi8(15);
    let ones = _mm256_set1_epi16(1);
    for block in 0..blocks {
        ask_ahead::<18>(from, row_bytes, block);
        // SAFETY: the block of each row, and the token's.
        unsafe {
            let bytes = x.bytes.add(block * 32).cast::<__m128i>();
            let low = _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes));
            let high = _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.add(1)));
            let at = from.add(block * 18);
            // Row r in the lower half, row r + 4 in the upper half.
            let mut sums = [_mm256_setzero_si256(); 4];
            for (row, sum) in sums.iter_mut().enumerate() {
                let q = at.add(row * row_bytes + 2);
                let q = _mm256_loadu2_m128i(q.add(4 * row_bytes).cast(), q.cast());
                let a = _mm256_maddubs_epi16(_mm256_and_si256(q, nibble), low);
                let q = _mm256_and_si256(_mm256_srli_epi16::<4>(q), nibble);
                // At most 4 * 15 * 127.
                let words = _mm256_add_epi16(a, _mm256_maddubs_epi16(q, high));
                *sum = _mm256_madd_epi16(words, ones);
            }
            let a = _mm256_hadd_epi32(sums[0], sums[1]);
            let sum = _mm256_hadd_epi32(a, _mm256_hadd_epi32(sums[2], sums[3]));
            let offset = 8 * i32::from(*x.sums.add(block));
            let sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(offset));
            let scale = _mm256_mul_ps(halves(at, row_bytes), _mm256_set1_ps(*x.scales.add(block)));
            y = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(sum), y);
        }
    }
    // SAFETY: room for eight.
    unsafe { _mm256_storeu_ps(out, y) };
}

/// # Safety
/// As [`eight`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q4_k(from: *const u8, row_bytes: usize, blocks: usize, x: &Row, out: *mut f32) {
    let mut y = _mm256_setzero_ps();
    let nibble = _mm256_set1_epi8(15);
    for block in 0..blocks {
        ask_ahead::<144>(from, row_bytes, block);
        // SAFETY: the block of each row, and the token's.
        unsafe {
            let bytes = x.bytes.add(block * 256).cast::<__m256i>();
            let at = from.add(block * 144);
            let x_sums = _mm_loadu_si128(x.sums.add(block * 8).cast());
            let mut sums = [_mm256_setzero_si256(); 8];
            let mut offsets = [_mm256_setzero_si256(); 8];
            for row in 0..8 {
                let at = at.add(row * row_bytes);
                let packed = at.add(q4_k::SCALES).cast::<[u8; 12]>().read_unaligned();
                let (s, t) = six_bits(&packed);
                let mut sum = _mm256_setzero_si256();
                for pair in 0..4 {
                    let q = _mm256_loadu_si256(at.add(q4_k::LEVELS + 32 * pair).cast());
                    let low = _mm256_and_si256(q, nibble);
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(q), nibble);
                    let low = _mm256_maddubs_epi16(low, _mm256_loadu_si256(bytes.add(2 * pair)));
                    let high =
                        _mm256_maddubs_epi16(high, _mm256_loadu_si256(bytes.add(2 * pair + 1)));
                    let low = _mm256_madd_epi16(low, _mm256_set1_epi16(s[2 * pair]));
                    let high = _mm256_madd_epi16(high, _mm256_set1_epi16(s[2 * pair + 1]));
                    sum = _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
                }
                sums[row] = sum;
                let t = _mm_madd_epi16(_mm_loadu_si128(t.as_ptr().cast()), x_sums);
                offsets[row] = _mm256_zextsi128_si256(t);
            }
            let x_scale = _mm256_set1_ps(*x.scales.add(block));
            let scale = _mm256_mul_ps(halves(at, row_bytes), x_scale);
            y = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(add_up(sums)), y);
            let scale = _mm256_mul_ps(halves(at.add(2), row_bytes), x_scale);
            y = _mm256_fnmadd_ps(scale, _mm256_cvtepi32_ps(add_up(offsets)), y);
        }
    }
    // SAFETY: room for eight.
    unsafe { _mm256_storeu_ps(out, y) };
}

/// [`q4_k::scales`], four at a time.
#[inline]
#[target_feature(enable = "avx2")]
fn six_bits(packed: &[u8; 12]) -> ([i16; 8], [i16; 8]) {
    let word = |i: usize| u32::from_le_bytes(std::array::from_fn(|b| packed[4 * i + b]));
    let (a, b, c) = (word(0), word(1), word(2));
    let s_high = (c & 0x0F0F_0F0F) | ((a >> 6) & 0x0303_0303) << 4;
    let t_high = ((c >> 4) & 0x0F0F_0F0F) | ((b >> 6) & 0x0303_0303) << 4;
    let s = u64::from(a & 0x3F3F_3F3F) | u64::from(s_high) << 32;
    let t = u64::from(b & 0x3F3F_3F3F) | u64::from(t_high) << 32;
    let mut out = ([0i16; 8], [0i16; 8]);
    // SAFETY: the arrays hold eight words each.
    unsafe {
        let s = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(s as i64));
        let t = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(t as i64));
        _mm_storeu_si128(out.0.as_mut_ptr().cast(), s);
        _mm_storeu_si128(out.1.as_mut_ptr().cast(), t);
    }
    out
}

/// Any other encoding: a block is unpacked first.
///
/// # Safety
/// As [`eight`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unpacked<B: Blocks>(
    from: *const u8,
    row_bytes: usize,
    blocks: usize,
    x: &Row,
    out: *mut f32,
) {
    for row in 0..8 {
        // SAFETY: the caller's.
        unsafe {
            *out.add(row) = super::direct::portable::<B>(from.add(row * row_bytes), blocks, x)
        };
    }
}
