//! Tiles of AMX-BF16: eight registers of sixteen rows of 64 bytes, configured and released by each product.
//!
//! The language has no stable names for these instructions, and its compiler knows of no values in tiles. So all blocks
//! of a product of tiles are one piece of assembly, after which no tile holds anything.

use core::arch::asm;
use core::arch::x86_64::*;
use std::mem::offset_of;
use std::ops::Range;

use super::tiles::{Operands, SIDE, TILE, Tiles, rows as on};
use super::{Activations, Output, Weight};

/// # Safety
/// AVX-512 and tiles must be available; else as [`super::tiles::rows`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn rows(
    weight: &Weight<'_>,
    x: &Activations<'_>,
    range: Range<usize>,
    out: Output,
) {
    // SAFETY: the caller's.
    unsafe { on::<Amx>(weight, x, range, out) }
}

/// What `ldtilecfg` reads: palette 1, and bytes of a row and rows of each of eight tiles.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIGURATION: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

struct Amx;

// SAFETY of all methods: the caller's: what is named is at the addresses, and the instructions are available where a
// method is inlined.
impl Tiles for Amx {
    #[inline(always)]
    unsafe fn begin() {
        // SAFETY: as above; the configuration is one of palette 1.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, preserves_flags, readonly));
        }
    }
    #[inline(always)]
    unsafe fn end() {
        // SAFETY: as above; nothing is left in tiles.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) }
    }
    #[inline(always)]
    unsafe fn transpose(rows: &[*const u8; SIDE], offset: usize, to: *mut u8) {
        // SAFETY: as above.
        unsafe {
            let mut v = [_mm512_setzero_si512(); SIDE];
            for (v, row) in v.iter_mut().zip(rows) {
                *v = _mm512_loadu_si512(row.add(offset).cast());
            }
            // Words of two rows in turns, then of four: in each quarter one column of four rows.
            let mut two = v;
            for i in 0..8 {
                two[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
                two[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
            }
            let mut four = two;
            for i in 0..4 {
                let [a, b, c, d] = [two[4 * i], two[4 * i + 1], two[4 * i + 2], two[4 * i + 3]];
                four[4 * i] = _mm512_unpacklo_epi64(a, c);
                four[4 * i + 1] = _mm512_unpackhi_epi64(a, c);
                four[4 * i + 2] = _mm512_unpacklo_epi64(b, d);
                four[4 * i + 3] = _mm512_unpackhi_epi64(b, d);
            }
            for j in 0..4 {
                let [a, b, c, d] = [four[j], four[4 + j], four[8 + j], four[12 + j]];
                // Even quarters, then odd ones.
                let ab = _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
                let cd = _mm512_shuffle_i32x4::<0b10_00_10_00>(c, d);
                let columns = [
                    _mm512_shuffle_i32x4::<0b10_00_10_00>(ab, cd),
                    _mm512_shuffle_i32x4::<0b11_01_11_01>(ab, cd),
                ];
                _mm512_storeu_si512(to.add(64 * j).cast(), columns[0]);
                _mm512_storeu_si512(to.add(64 * (8 + j)).cast(), columns[1]);
                let ab = _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b);
                let cd = _mm512_shuffle_i32x4::<0b11_01_11_01>(c, d);
                let columns = [
                    _mm512_shuffle_i32x4::<0b10_00_10_00>(ab, cd),
                    _mm512_shuffle_i32x4::<0b11_01_11_01>(ab, cd),
                ];
                _mm512_storeu_si512(to.add(64 * (4 + j)).cast(), columns[0]);
                _mm512_storeu_si512(to.add(64 * (12 + j)).cast(), columns[1]);
            }
        }
    }
    #[inline(always)]
    unsafe fn multiply<const M: usize, const N: usize>(operands: &Operands) {
        /// Sums in tiles 0 to 3, rows in 4 and 5, pairs in 6 and 7.
        macro_rules! product {
            ([$($begin:literal),*], [$($block:literal),*], [$($end:literal),*]) => {
                asm!(
                    $($begin,)*
                    "2:",
                    $($block,)*
                    "add {rows}, [{operands} + {step}]",
                    "add {second}, [{operands} + {step}]",
                    "add {pairs}, 2048",
                    "mov {line}, {ask}",
                    "mov {left}, [{operands} + {lines}]",
                    "test {left}, {left}",
                    "jz 4f",
                    "3:",
                    "prefetcht1 [{line}]",
                    "add {line}, [{operands} + {line_stride}]",
                    "dec {left}",
                    "jnz 3b",
                    "add {ask}, [{operands} + {block_stride}]",
                    "4:",
                    "dec {blocks}",
                    "jnz 2b",
                    "mov {left}, [{operands} + {sums}]",
                    $($end,)*
                    rows = inout(reg) operands.rows[0] => _,
                    second = inout(reg) operands.rows[1] => _,
                    stride = in(reg) operands.stride,
                    pairs = inout(reg) operands.pairs => _,
                    line_bytes = in(reg) 64usize,
                    blocks = inout(reg) operands.blocks => _,
                    ask = inout(reg) operands.ask => _,
                    line = out(reg) _,
                    left = out(reg) _,
                    operands = in(reg) operands,
                    step = const offset_of!(Operands, step),
                    lines = const offset_of!(Operands, lines),
                    line_stride = const offset_of!(Operands, line_stride),
                    block_stride = const offset_of!(Operands, block_stride),
                    sums = const offset_of!(Operands, sums),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                )
            };
        }
        const { assert!(TILE == 1024 && M >= 1 && M <= 2 && N >= 1 && N <= 2) };
        // SAFETY: as above; tiles are loaded from whole rows and tiles of the operands, and stored to their sums.
        unsafe {
            match (M, N) {
                (1, 1) => product!(
                    ["tilezero tmm0"],
                    [
                        "tileloadd tmm4, [{rows} + {stride}*1]",
                        "tileloadd tmm6, [{pairs} + {line_bytes}*1]",
                        "tdpbf16ps tmm0, tmm4, tmm6"
                    ],
                    ["tilestored [{left} + {line_bytes}*1], tmm0"]
                ),
                (1, _) => product!(
                    ["tilezero tmm0", "tilezero tmm1"],
                    [
                        "tileloadd tmm4, [{rows} + {stride}*1]",
                        "tileloadd tmm6, [{pairs} + {line_bytes}*1]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tileloadd tmm7, [{pairs} + {line_bytes}*1 + 1024]",
                        "tdpbf16ps tmm1, tmm4, tmm7"
                    ],
                    [
                        "tilestored [{left} + {line_bytes}*1], tmm0",
                        "tilestored [{left} + {line_bytes}*1 + 1024], tmm1"
                    ]
                ),
                (_, 1) => product!(
                    ["tilezero tmm0", "tilezero tmm2"],
                    [
                        "tileloadd tmm4, [{rows} + {stride}*1]",
                        "tileloadd tmm6, [{pairs} + {line_bytes}*1]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tileloadd tmm5, [{second} + {stride}*1]",
                        "tdpbf16ps tmm2, tmm5, tmm6"
                    ],
                    [
                        "tilestored [{left} + {line_bytes}*1], tmm0",
                        "tilestored [{left} + {line_bytes}*1 + 2048], tmm2"
                    ]
                ),
                _ => product!(
                    ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
                    [
                        "tileloadd tmm4, [{rows} + {stride}*1]",
                        "tileloadd tmm6, [{pairs} + {line_bytes}*1]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tileloadd tmm7, [{pairs} + {line_bytes}*1 + 1024]",
                        "tdpbf16ps tmm1, tmm4, tmm7",
                        "tileloadd tmm5, [{second} + {stride}*1]",
                        "tdpbf16ps tmm2, tmm5, tmm6",
                        "tdpbf16ps tmm3, tmm5, tmm7"
                    ],
                    [
                        "tilestored [{left} + {line_bytes}*1], tmm0",
                        "tilestored [{left} + {line_bytes}*1 + 1024], tmm1",
                        "tilestored [{left} + {line_bytes}*1 + 2048], tmm2",
                        "tilestored [{left} + {line_bytes}*1 + 3072], tmm3"
                    ]
                ),
            }
        }
    }
    #[inline(always)]
    fn ask(at: *const u8) {
        // SAFETY: asking reads nothing that could be seen.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
}
