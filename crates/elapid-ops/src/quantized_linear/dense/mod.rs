//! Weights of plain floats: dot products of rows with tokens, several of both at a time.
//!
//! A row's sum is cut into blocks of [`BLOCK`] columns. In a block, the lanes of one vector of the machine add up every
//! `LANES`-th product in ascending order by fused multiply-adds; the lanes are added in a fixed tree, and the blocks' sums in ascending
//! order. Every kernel of an instruction set keeps this order, so that a product has the same bits with any number of tokens.
//!
//! One or two tokens read rows where they lie (`in_place.rs`). For more, blocks of eight rows are copied, widened to
//! f32, and multiplied with all tokens in tiles (`tiled.rs`).

mod in_place;
#[cfg(target_arch = "aarch64")]
pub(super) mod neon;
#[cfg(not(target_arch = "aarch64"))]
pub(super) mod portable;
mod tiled;
mod vectors;
#[cfg(target_arch = "x86_64")]
pub(super) mod x86;

use std::cell::Cell;
use std::ops::Range;

use vectors::{BF16, Element, F16, F32, Vectors};

use super::{Activations, Output, Weight};
use crate::blocks::Encoding;

/// Columns whose products are added up before the lanes are: part of the definition. A multiple of two vectors of any
/// machine.
const BLOCK: usize = 512;
/// Floats from row to row of copies: a line more than a block, so that rows do not share their places in the caches.
const ROW: usize = BLOCK + 16;

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
        if x86::rows(weight.encoding, call) {
            return;
        }
        #[cfg(target_arch = "aarch64")]
        neon::rows(weight.encoding, call);
        #[cfg(not(target_arch = "aarch64"))]
        portable::rows(weight.encoding, call);
    }
}

/// # Safety
/// As [`super::product`]; the instruction set of `L` must be available.
#[inline(always)]
unsafe fn by_encoding<L: Vectors>(encoding: Encoding, call: Call) {
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
unsafe fn all<L: Vectors, E: Element>(call: Call) {
    let mut room = ROOM.take();
    // SAFETY: the caller's.
    unsafe {
        match call.tokens {
            1 => in_place::product::<L, E, 1>(call, &mut room.x),
            2 => in_place::product::<L, E, 2>(call, &mut room.x),
            _ => tiled::product::<L, E>(call, &mut room),
        }
    }
    ROOM.set(room);
}

/// A line of the caches: rows of lines start where vectors are fastest to load.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// A block of a row or of a token, widened, and then zeros to whole vectors.
type Copied = [Line; ROW / 16];

/// Copies, kept from product to product.
#[derive(Default)]
struct Room {
    /// Of tokens.
    x: Vec<Copied>,
    /// Of rows.
    rows: Vec<Copied>,
}

thread_local! {
    static ROOM: Cell<Room> = Cell::new(Room::default());
}

/// Makes room for `count` copies.
fn grow(copies: &mut Vec<Copied>, count: usize) {
    if copies.len() < count {
        copies.resize(count, [Line([0.0; 16]); ROW / 16]);
    }
}

/// Columns of block `block`.
#[inline(always)]
fn width(columns: usize, block: usize) -> usize {
    BLOCK.min(columns - block * BLOCK)
}

/// Copies a token's block in the order in which `E` gives its columns.
///
/// # Safety
/// `columns` floats must be at `from`.
#[inline(always)]
unsafe fn copy_token<L: Vectors, E: Element>(from: *const f32, columns: usize, to: &mut Copied) {
    let step = 2 * L::LANES;
    let whole = columns / step * step;
    let to = to.as_mut_ptr().cast::<f32>();
    let mut rest = [0.0f32; 64];
    // SAFETY: whole steps of the input and of a block, whose width is a whole number of steps.
    unsafe {
        let mut k = 0;
        while k < whole {
            L::store_two(E::input::<L>(from.add(k)), to.add(k));
            k += step;
        }
        if whole < columns {
            from.add(whole).copy_to_nonoverlapping(rest.as_mut_ptr(), columns - whole);
            L::store_two(E::input::<L>(rest.as_ptr()), to.add(whole));
        }
    }
}

/// Two vectors of a row of which there is less.
///
/// # Safety
/// `count` elements must be at `from`, at most two vectors.
#[inline(always)]
unsafe fn load_rest<L: Vectors, E: Element>(from: *const u8, count: usize) -> [L::Vector; 2] {
    let mut rest = [0u8; 256];
    // SAFETY: the caller's; zero bytes are zeros in every encoding.
    unsafe {
        from.copy_to_nonoverlapping(rest.as_mut_ptr(), count * E::BYTES);
        E::load::<L>(rest.as_ptr())
    }
}
