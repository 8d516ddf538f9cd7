//! Weights of plain floats: dot products of rows with tokens, several of both at a time.
//!
//! A tile of rows by tokens keeps a vector of sums for each pair, so loads are few and no operand is packed. Weights of
//! 16 bits are widened as they are loaded or, for many tokens, once for a block of them: the values, and so the sums,
//! are the same.

use std::cell::RefCell;
use std::ops::Range;

use half::{bf16, f16};

use super::{Activations, Output, Weight};
use crate::blocks::Encoding;

/// Tokens that are worked off together: their inputs stay in the second-level cache.
const TOKENS: usize = 48;
/// From so many tokens on, weights of 16 bits are widened before.
const WIDEN_FROM: usize = 4;
/// Room for a tail of any vector.
const MOST_LANES: usize = 16;

/// A vector of f32 on one instruction set. Its methods may be called where that set is available.
pub(super) trait Lanes: Copy {
    /// Number of lanes.
    const LANES: usize;
    /// The register.
    type Vector: Copy;
    /// All zero.
    unsafe fn zero() -> Self::Vector;
    /// `LANES` floats.
    unsafe fn f32(from: *const u8) -> Self::Vector;
    /// `LANES` bfloat16.
    unsafe fn bf16(from: *const u8) -> Self::Vector;
    /// `LANES` halves.
    unsafe fn f16(from: *const u8) -> Self::Vector;
    /// `a b + c`, rounded once.
    unsafe fn mul_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The sum of the lanes: upper half onto lower half until one is left.
    unsafe fn sum(v: Self::Vector) -> f32;
}

/// How an element is stored.
pub(super) trait Element: Copy {
    const BYTES: usize;
    unsafe fn load<L: Lanes>(from: *const u8) -> L::Vector;
    fn value(bytes: &[u8]) -> f32;
}

macro_rules! element {
    ($name:ident, $bytes:literal, $load:ident, $value:expr) => {
        #[derive(Clone, Copy)]
        pub(super) struct $name;
        impl Element for $name {
            const BYTES: usize = $bytes;
            #[inline(always)]
            unsafe fn load<L: Lanes>(from: *const u8) -> L::Vector {
                // SAFETY: the caller's.
                unsafe { L::$load(from) }
            }
            #[inline(always)]
            fn value(bytes: &[u8]) -> f32 {
                let bytes: [u8; $bytes] = std::array::from_fn(|i| bytes[i]);
                $value(bytes)
            }
        }
    };
}
element!(F32, 4, f32, f32::from_le_bytes);
element!(BF16, 2, bf16, |b| bf16::from_le_bytes(b).to_f32());
element!(F16, 2, f16, |b| f16::from_le_bytes(b).to_f32());

/// The arguments of a product, as kernels take them.
#[derive(Clone, Copy)]
pub(super) struct Call {
    /// First row.
    pub weight: *const u8,
    pub row_bytes: usize,
    pub rows: usize,
    pub columns: usize,
    /// First token.
    pub x: *const f32,
    pub x_stride: usize,
    pub tokens: usize,
    /// First row of the first token, and how far the next token is.
    pub out: *mut f32,
    pub out_stride: usize,
}

/// # Safety
/// As [`super::product`], for weights of plain floats.
pub(super) unsafe fn rows(
    weight: &Weight<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    out: Output,
) {
    let (floats, x_stride) = x.floats();
    let call = Call {
        weight: weight.bytes[rows.start * weight.row_bytes..].as_ptr(),
        row_bytes: weight.row_bytes,
        rows: rows.len(),
        columns: weight.columns,
        x: floats,
        x_stride,
        tokens: x.tokens(),
        out: out.pointer,
        out_stride: out.stride,
    };
    // SAFETY: the caller's; each path looks for its instruction set.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if super::dense_x86::rows(weight.encoding, call) {
            return;
        }
        #[cfg(target_arch = "aarch64")]
        {
            super::dense_neon::rows(weight.encoding, call);
        }
        #[cfg(not(target_arch = "aarch64"))]
        by_encoding::<Portable>(weight.encoding, call);
    }
}

/// # Safety
/// As [`super::product`]; the instruction set of `L` must be available.
#[inline(always)]
pub(super) unsafe fn by_encoding<L: Lanes>(encoding: Encoding, call: Call) {
    // SAFETY: the caller's.
    unsafe {
        match encoding {
            Encoding::F32 => all::<L, F32>(call),
            Encoding::BF16 => all::<L, BF16>(call),
            Encoding::F16 => all::<L, F16>(call),
            _ => unreachable!("blocks have kernels of their own"),
        }
    }
}

/// # Safety
/// As [`by_encoding`].
#[inline(always)]
unsafe fn all<L: Lanes, E: Element>(call: Call) {
    // SAFETY: every tile lies inside the call's rows and tokens.
    unsafe {
        match call.tokens {
            1 => stripe::<L, E, 8, 1>(call),
            2 => stripe::<L, E, 4, 2>(call),
            3 => stripe::<L, E, 4, 3>(call),
            _ => many::<L, E>(call),
        }
    }
}

/// All rows with `T` tokens.
#[inline(always)]
unsafe fn stripe<L: Lanes, E: Element, const R: usize, const T: usize>(call: Call) {
    let mut row = 0;
    // SAFETY: rows below the call's.
    unsafe {
        while row + R <= call.rows {
            tile::<L, E, R, T>(at(call, row, 0));
            row += R;
        }
        while row < call.rows {
            tile::<L, E, 1, T>(at(call, row, 0));
            row += 1;
        }
    }
}

/// The call from a row and a token on.
#[inline(always)]
unsafe fn at(mut call: Call, row: usize, token: usize) -> Call {
    // SAFETY: the caller's: they are inside the call.
    unsafe {
        call.weight = call.weight.add(row * call.row_bytes);
        call.x = call.x.add(token * call.x_stride);
        call.out = call.out.add(token * call.out_stride + row);
    }
    call
}

/// Many tokens, block by block.
#[inline(always)]
unsafe fn many<L: Lanes, E: Element>(call: Call) {
    thread_local! {
        static WIDE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    WIDE.with_borrow_mut(|wide| {
        wide.resize(4 * call.columns, 0.0);
        for token in (0..call.tokens).step_by(TOKENS) {
            let tokens = TOKENS.min(call.tokens - token);
            let mut row = 0;
            while row < call.rows {
                let rows = if row + 4 <= call.rows { 4 } else { 1 };
                // SAFETY: rows and tokens inside the call; `wide` has four rows.
                unsafe {
                    let mut part = at(call, row, token);
                    part.tokens = tokens;
                    if E::BYTES < 4 && tokens >= WIDEN_FROM {
                        widen::<L, E>(part, rows, wide);
                        part.weight = wide.as_ptr().cast();
                        part.row_bytes = 4 * call.columns;
                        rows_by_tokens::<L, F32>(part, rows);
                    } else {
                        rows_by_tokens::<L, E>(part, rows);
                    }
                }
                row += rows;
            }
        }
    });
}

/// Four rows, or one, with the call's tokens.
#[inline(always)]
unsafe fn rows_by_tokens<L: Lanes, E: Element>(call: Call, rows: usize) {
    let mut token = 0;
    // SAFETY: tokens below the call's.
    unsafe {
        while token < call.tokens {
            let part = at(call, 0, token);
            match (rows, call.tokens - token) {
                (4, 1) => tile::<L, E, 4, 1>(part),
                (4, 2) => tile::<L, E, 4, 2>(part),
                (4, _) => tile::<L, E, 4, 3>(part),
                (_, 1) => tile::<L, E, 1, 1>(part),
                (_, 2) => tile::<L, E, 1, 2>(part),
                (_, _) => tile::<L, E, 1, 3>(part),
            }
            token += 3;
        }
    }
}

/// The first `rows` rows as f32.
#[inline(always)]
unsafe fn widen<L: Lanes, E: Element>(call: Call, rows: usize, wide: &mut [f32]) {
    for row in 0..rows {
        let to = &mut wide[row * call.columns..][..call.columns];
        // SAFETY: a row of the weight; whole vectors of it and of `to`.
        unsafe {
            let from = call.weight.add(row * call.row_bytes);
            let mut k = 0;
            while k + L::LANES <= call.columns {
                let v = E::load::<L>(from.add(k * E::BYTES));
                to.as_mut_ptr().add(k).cast::<L::Vector>().write_unaligned(v);
                k += L::LANES;
            }
            for (k, to) in to.iter_mut().enumerate().skip(k) {
                *to = E::value(std::slice::from_raw_parts(from.add(k * E::BYTES), E::BYTES));
            }
        }
    }
}

/// `R` rows by `T` tokens.
#[inline(always)]
unsafe fn tile<L: Lanes, E: Element, const R: usize, const T: usize>(call: Call) {
    // SAFETY: whole vectors of the rows and tokens, then copies of their ends.
    unsafe {
        let mut sums = [[L::zero(); T]; R];
        let whole = call.columns / L::LANES * L::LANES;
        let mut k = 0;
        while k < whole {
            let mut x = [L::zero(); T];
            for (t, x) in x.iter_mut().enumerate() {
                *x = L::f32(call.x.add(t * call.x_stride + k).cast());
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let w = E::load::<L>(call.weight.add(r * call.row_bytes + k * E::BYTES));
                for (sum, &x) in sums.iter_mut().zip(&x) {
                    *sum = L::mul_add(w, x, *sum);
                }
            }
            k += L::LANES;
        }
        if whole < call.columns {
            let rest = call.columns - whole;
            for (r, sums) in sums.iter_mut().enumerate() {
                let mut w = [0.0f32; MOST_LANES];
                let from = call.weight.add(r * call.row_bytes + whole * E::BYTES);
                let bytes = std::slice::from_raw_parts(from, rest * E::BYTES);
                for (w, bytes) in w.iter_mut().zip(bytes.chunks_exact(E::BYTES)) {
                    *w = E::value(bytes);
                }
                let w = L::f32(w.as_ptr().cast());
                for (t, sum) in sums.iter_mut().enumerate() {
                    let mut x = [0.0f32; MOST_LANES];
                    let from = call.x.add(t * call.x_stride + whole);
                    x[..rest].copy_from_slice(std::slice::from_raw_parts(from, rest));
                    *sum = L::mul_add(w, L::f32(x.as_ptr().cast()), *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (t, &sum) in sums.iter().enumerate() {
                *call.out.add(t * call.out_stride + r) = L::sum(sum);
            }
        }
    }
}

/// Plain code, in eight lanes.
#[cfg(not(target_arch = "aarch64"))]
#[derive(Clone, Copy)]
pub(super) struct Portable;

#[cfg(not(target_arch = "aarch64"))]
impl Lanes for Portable {
    const LANES: usize = 8;
    type Vector = [f32; 8];
    #[inline(always)]
    unsafe fn zero() -> [f32; 8] {
        [0.0; 8]
    }
    #[inline(always)]
    unsafe fn f32(from: *const u8) -> [f32; 8] {
        // SAFETY: eight floats.
        unsafe { from.cast::<[[u8; 4]; 8]>().read_unaligned() }.map(f32::from_le_bytes)
    }
    #[inline(always)]
    unsafe fn bf16(from: *const u8) -> [f32; 8] {
        // SAFETY: eight numbers of two bytes.
        let bytes = unsafe { from.cast::<[[u8; 2]; 8]>().read_unaligned() };
        bytes.map(|bytes| bf16::from_le_bytes(bytes).to_f32())
    }
    #[inline(always)]
    unsafe fn f16(from: *const u8) -> [f32; 8] {
        // SAFETY: eight numbers of two bytes.
        let bytes = unsafe { from.cast::<[[u8; 2]; 8]>().read_unaligned() };
        bytes.map(|bytes| f16::from_le_bytes(bytes).to_f32())
    }
    #[inline(always)]
    unsafe fn mul_add(a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        // Without a fused instruction a call would cost a hundred times as much.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn sum(v: [f32; 8]) -> f32 {
        let v: [f32; 4] = std::array::from_fn(|i| v[i] + v[i + 4]);
        (v[0] + v[2]) + (v[1] + v[3])
    }
}
