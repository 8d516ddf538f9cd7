//! Weights in blocks of integers with one or many tokens, where bytes can be multiplied: sixteen rows go together.
//!
//! A block of sixteen rows is rearranged so that four neighbouring integers of each row, a quad, stand side by side: an
//! input's quad is then multiplied with all rows at once, and the sums stand one lane a row. A few tokens use a
//! rearranged block at once; for many, blocks of whole rows are kept and read again for every tile of tokens.

use std::cell::Cell;
use std::ops::Range;

use super::activations::Row;
use super::{Activations, Output, Weight};

/// Rows that go together.
pub(super) const ROWS: usize = 16;
/// Bytes of all rows' quads at one place.
pub(super) const QUAD: usize = 4 * ROWS;
/// Tokens that are worked off together: their inputs stay in the second-level cache.
const TOKENS: usize = 96;
/// Most tokens of a tile.
const MOST: usize = 8;

/// The blocks of an encoding on an instruction set. Methods may be called where that is available.
pub(super) trait Kernel: Copy {
    /// Sums of sixteen rows.
    type Sums: Copy;
    /// Elements of a block.
    const LEN: usize;
    /// Bytes of a block.
    const BYTES: usize;
    /// Lines of sixteen rows' blocks when they are rearranged.
    const LINES: usize;
    /// Tokens of a tile, 4 or `MOST`.
    const TILE: usize;
    /// All zero.
    unsafe fn zero() -> Self::Sums;
    /// Rearranges a block of each row.
    unsafe fn arrange(rows: &[*const u8; ROWS], to: *mut u8);
    /// Adds the products of a rearranged block with block `block` of tokens to `y`.
    unsafe fn add<const T: usize>(
        arranged: *const u8,
        x: &[Row; T],
        block: usize,
        y: &mut [Self::Sums; T],
    );
    /// To memory.
    unsafe fn store(sums: Self::Sums, to: *mut f32);
    /// Asks for a line of memory; any address will do.
    fn ask(at: *const u8);
}

/// A line of the caches.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

thread_local! {
    static ROOM: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// # Safety
/// As [`super::product`], for weights in the kernel's blocks; its instruction set must be available.
#[inline(always)]
pub(super) unsafe fn rows<K: Kernel>(
    weight: &Weight<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    out: Output,
) {
    let blocks = weight.columns / K::LEN;
    let tokens = x.tokens();
    let mut room = ROOM.take();
    let few = tokens <= K::TILE;
    let kept = if few { 1 } else { blocks };
    room.resize(room.len().max(kept * K::LINES), Line([0; 64]));
    let mut from = 0;
    while from < tokens {
        let end = tokens.min(from + TOKENS);
        let mut first = rows.start;
        while first < rows.end {
            // Rows that are not there are others; their sums are dropped.
            let mut own = [weight.bytes.as_ptr(); ROWS];
            for (r, own) in own.iter_mut().enumerate() {
                let row = (first + r).min(rows.end - 1);
                *own = weight.bytes[row * weight.row_bytes..].as_ptr();
            }
            let to = Target {
                pointer: out.pointer.wrapping_add(first - rows.start),
                stride: out.stride,
                count: ROWS.min(rows.end - first),
            };
            let group = Group { own, blocks, next: own[0].wrapping_add(ROWS * weight.row_bytes) };
            // SAFETY: the rows and tokens are there, and so is the room.
            unsafe {
                if few {
                    group.at_once::<K>(x, room.as_mut_ptr().cast(), to);
                } else {
                    group.arrange::<K>(room.as_mut_ptr().cast());
                    group.all::<K>(x, from..end, room.as_ptr().cast(), to);
                }
            }
            first += ROWS;
        }
        from = end;
    }
    ROOM.set(room);
}

/// Where the sums of a group go.
#[derive(Clone, Copy)]
struct Target {
    pointer: *mut f32,
    stride: usize,
    count: usize,
}

impl Target {
    /// # Safety
    /// The output must hold them.
    #[inline(always)]
    unsafe fn write<K: Kernel, const T: usize>(&self, token: usize, y: [K::Sums; T]) {
        for (t, y) in y.into_iter().enumerate() {
            let to = self.pointer.wrapping_add((token + t) * self.stride);
            // SAFETY: the caller's.
            unsafe {
                if self.count == ROWS {
                    K::store(y, to);
                } else {
                    let mut room = [0.0f32; ROWS];
                    K::store(y, room.as_mut_ptr());
                    std::slice::from_raw_parts_mut(to, self.count)
                        .copy_from_slice(&room[..self.count]);
                }
            }
        }
    }
}

/// Sixteen rows.
struct Group {
    own: [*const u8; ROWS],
    blocks: usize,
    /// The rows to come.
    next: *const u8,
}

/// Calls a function for a number of tokens.
macro_rules! by_tokens {
    ($count:expr, $self:ident.$name:ident::<$k:ident>($($argument:expr),*)) => {
        match $count {
            1 => $self.$name::<$k, 1>($($argument),*),
            2 => $self.$name::<$k, 2>($($argument),*),
            3 => $self.$name::<$k, 3>($($argument),*),
            4 => $self.$name::<$k, 4>($($argument),*),
            5 if $k::TILE > 4 => $self.$name::<$k, 5>($($argument),*),
            6 if $k::TILE > 4 => $self.$name::<$k, 6>($($argument),*),
            7 if $k::TILE > 4 => $self.$name::<$k, 7>($($argument),*),
            _ if $k::TILE > 4 => $self.$name::<$k, MOST>($($argument),*),
            _ => unreachable!("at most four"),
        }
    };
}

// SAFETY of all methods: the caller's: rows, tokens and room are there.
impl Group {
    /// The blocks of the rows at one place.
    #[inline(always)]
    fn at<K: Kernel>(&self, block: usize) -> [*const u8; ROWS] {
        let mut at = self.own;
        for at in &mut at {
            *at = at.wrapping_add(block * K::BYTES);
        }
        at
    }

    /// Asks for what stands at this place of the walk in the rows to come.
    #[inline(always)]
    fn ask<K: Kernel>(&self, block: usize) {
        let next = self.next.wrapping_add(block * K::BYTES * ROWS);
        let mut line = 0;
        while line < K::BYTES * ROWS {
            K::ask(next.wrapping_add(line));
            line += 64;
        }
    }

    #[inline(always)]
    unsafe fn arrange<K: Kernel>(&self, room: *mut u8) {
        for block in 0..self.blocks {
            // SAFETY: as above.
            unsafe { K::arrange(&self.at::<K>(block), room.add(block * K::LINES * 64)) };
        }
    }

    #[inline(always)]
    unsafe fn at_once<K: Kernel>(&self, x: &Activations<'_>, room: *mut u8, to: Target) {
        // SAFETY: as above.
        unsafe { by_tokens!(x.tokens(), self.few::<K>(x, room, to)) }
    }

    #[inline(always)]
    unsafe fn few<K: Kernel, const T: usize>(
        &self,
        x: &Activations<'_>,
        room: *mut u8,
        to: Target,
    ) {
        // SAFETY: as above.
        unsafe {
            let inputs = inputs::<T>(x, 0);
            let mut y = [K::zero(); T];
            for block in 0..self.blocks {
                self.ask::<K>(block);
                K::arrange(&self.at::<K>(block), room);
                K::add(room, &inputs, block, &mut y);
            }
            to.write::<K, T>(0, y);
        }
    }

    #[inline(always)]
    unsafe fn all<K: Kernel>(
        &self,
        x: &Activations<'_>,
        tokens: Range<usize>,
        room: *const u8,
        to: Target,
    ) {
        let mut token = tokens.start;
        while token < tokens.end {
            let count = K::TILE.min(tokens.end - token);
            let first = token == tokens.start;
            // SAFETY: as above.
            unsafe { by_tokens!(count, self.tile::<K>(x, token, first, room, to)) };
            token += count;
        }
    }

    #[inline(always)]
    unsafe fn tile<K: Kernel, const T: usize>(
        &self,
        x: &Activations<'_>,
        token: usize,
        first: bool,
        room: *const u8,
        to: Target,
    ) {
        // SAFETY: as above.
        unsafe {
            let inputs = inputs::<T>(x, token);
            let mut y = [K::zero(); T];
            for block in 0..self.blocks {
                if first {
                    self.ask::<K>(block);
                }
                K::add(room.add(block * K::LINES * 64), &inputs, block, &mut y);
            }
            to.write::<K, T>(token, y);
        }
    }
}

#[inline(always)]
fn inputs<const T: usize>(x: &Activations<'_>, token: usize) -> [Row; T] {
    let mut rows = [x.integers(token); T];
    for (t, row) in rows.iter_mut().enumerate().skip(1) {
        *row = x.integers(token + t);
    }
    rows
}
