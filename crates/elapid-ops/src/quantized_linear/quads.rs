//! Weights in blocks of integers with one or many tokens, where bytes can be multiplied: sixteen rows go together.
//!
//! A block of sixteen rows is rearranged so that four neighbouring integers of each row, a quad, stand side by side: an
//! input's quad is then multiplied with all rows at once, and the sums stand one lane a row. A few tokens use a
//! rearranged block at once; for many, blocks of whole rows are kept and read again for every tile of tokens.

use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
use std::cell::Cell;
use std::hint::black_box;
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
const MOST: usize = 12;

/// The blocks of an encoding on an instruction set. Methods may be called where that is available.
pub(super) trait Kernel {
    /// Elements of a block.
    const LEN: usize;
    /// Bytes of a block.
    const BYTES: usize;
    /// Lines of sixteen rows' blocks when they are rearranged.
    const LINES: usize;
    /// Tokens of a tile, 4 or `MOST`.
    const TILE: usize;
    /// Words of a token's block when it is laid out.
    const WORDS: usize;
    /// Rearranges a block of each row.
    unsafe fn arrange(rows: &[*const u8; ROWS], to: *mut u8);
    /// Lays block `block` of a token out, the `t`-th of `tokens` that are read together.
    unsafe fn lay(x: &Row, block: usize, tokens: usize, t: usize, to: *mut i32);
    /// Adds the products of a rearranged block with a block of tokens to sixteen sums of each. `four` is 4, but the
    /// compiler must not see that: it would unroll the loop over eight quads and keep the quads, not the sums, in
    /// registers.
    unsafe fn add<const T: usize>(arranged: *const u8, x: *const i32, y: *mut f32, four: usize);
}

/// A line of the caches.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Rearranged rows, and tokens laid out.
type Room = (Vec<Line>, Vec<i32>);

thread_local! {
    static ROOM: Cell<Room> = const { Cell::new((Vec::new(), Vec::new())) };
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
            8 if $k::TILE > 4 => $self.$name::<$k, 8>($($argument),*),
            9 if $k::TILE > 4 => $self.$name::<$k, 9>($($argument),*),
            10 if $k::TILE > 4 => $self.$name::<$k, 10>($($argument),*),
            11 if $k::TILE > 4 => $self.$name::<$k, 11>($($argument),*),
            _ if $k::TILE > 4 => $self.$name::<$k, MOST>($($argument),*),
            _ => unreachable!("at most four"),
        }
    };
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
    let (mut room, mut inputs) = ROOM.take();
    let few = tokens <= K::TILE;
    let kept = if few { 2 } else { blocks };
    room.resize(room.len().max(kept * K::LINES), Line([0; 64]));
    inputs.resize(inputs.len().max(tokens.min(TOKENS) * blocks * K::WORDS), 0);
    let four = black_box(4);
    let mut from = 0;
    while from < tokens {
        let end = tokens.min(from + TOKENS);
        // SAFETY: the tokens are there, and so is the room.
        unsafe { lay::<K>(x, from..end, blocks, inputs.as_mut_ptr()) };
        let tiles = (end - from).div_ceil(K::TILE);
        let part = (K::BYTES * ROWS).div_ceil(tiles);
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
            let next = own[0].wrapping_add(ROWS * weight.row_bytes);
            let group = Group { own, blocks, next, part, inputs: inputs.as_ptr(), four };
            // SAFETY: the rows and tokens are there, and so is the room.
            unsafe {
                let room = room.as_mut_ptr().cast();
                if few {
                    by_tokens!(tokens, group.few::<K>(room, to));
                } else {
                    group.arrange::<K>(room);
                    group.all::<K>(from..end, room, to);
                }
            }
            first += ROWS;
        }
        from = end;
    }
    ROOM.set((room, inputs));
}

/// Lays tokens out, tile after tile and in each block after block.
///
/// # Safety
/// The tokens must be there, and room for them.
#[inline(always)]
unsafe fn lay<K: Kernel>(
    x: &Activations<'_>,
    tokens: Range<usize>,
    blocks: usize,
    mut to: *mut i32,
) {
    let mut first = tokens.start;
    while first < tokens.end {
        let count = K::TILE.min(tokens.end - first);
        for t in 0..count {
            let row = x.integers(first + t);
            for block in 0..blocks {
                // SAFETY: the caller's.
                unsafe { K::lay(&row, block, count, t, to.add(block * count * K::WORDS)) };
            }
        }
        to = to.wrapping_add(count * blocks * K::WORDS);
        first += count;
    }
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
    unsafe fn write<const T: usize>(&self, token: usize, sums: &Sums<T>) {
        for (t, sums) in sums.0.iter().enumerate() {
            let to = self.pointer.wrapping_add((token + t) * self.stride);
            // SAFETY: the caller's.
            unsafe {
                if self.count == ROWS {
                    *to.cast::<[f32; ROWS]>() = *sums;
                } else {
                    std::slice::from_raw_parts_mut(to, self.count)
                        .copy_from_slice(&sums[..self.count]);
                }
            }
        }
    }
}

/// Sums of sixteen rows with each token of a tile.
#[repr(C, align(64))]
struct Sums<const T: usize>([[f32; ROWS]; T]);

impl<const T: usize> Sums<T> {
    /// Where they are, hidden from the compiler, which would keep them in registers that the products need.
    #[inline(always)]
    fn in_memory(&mut self) -> *mut f32 {
        black_box(self.0.as_mut_ptr().cast())
    }
}

/// Sixteen rows.
struct Group {
    own: [*const u8; ROWS],
    blocks: usize,
    /// The rows to come, and the bytes of them that a tile asks for beside each of its blocks.
    next: *const u8,
    part: usize,
    /// Tokens, laid out.
    inputs: *const i32,
    /// See [`Kernel::add`].
    four: usize,
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

    /// Asks for the `step`-th part of the rows to come.
    #[inline(always)]
    fn ask(&self, step: usize) {
        let from = step * self.part;
        let mut line = from.next_multiple_of(64);
        while line < from + self.part {
            // SAFETY: asking reads nothing that could be seen.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.next.wrapping_add(line).cast()) };
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
    unsafe fn few<K: Kernel, const T: usize>(&self, room: *mut u8, to: Target) {
        let mut y = Sums([[0.0; ROWS]; T]);
        let sums = y.in_memory();
        if self.blocks > 0 {
            // SAFETY: as above.
            unsafe { K::arrange(&self.at::<K>(0), room) };
        }
        for block in 0..self.blocks {
            self.ask(block);
            // A block is rearranged while the one before is used: what has just been written would be waited for.
            let now = room.wrapping_add(block % 2 * K::LINES * 64);
            let then = room.wrapping_add((block + 1) % 2 * K::LINES * 64);
            // SAFETY: as above.
            unsafe {
                if block + 1 < self.blocks {
                    K::arrange(&self.at::<K>(block + 1), then);
                }
                let x = self.inputs.add(block * T * K::WORDS);
                K::add::<T>(now, x, sums, self.four);
            }
        }
        // SAFETY: as above.
        unsafe { to.write(0, &y) }
    }

    #[inline(always)]
    unsafe fn all<K: Kernel>(&self, tokens: Range<usize>, room: *const u8, to: Target) {
        let mut token = tokens.start;
        while token < tokens.end {
            let count = K::TILE.min(tokens.end - token);
            let before = token - tokens.start;
            // SAFETY: as above.
            unsafe { by_tokens!(count, self.tile::<K>(before, token, room, to)) };
            token += count;
        }
    }

    /// The tile that has `before` tokens before it.
    #[inline(always)]
    unsafe fn tile<K: Kernel, const T: usize>(
        &self,
        before: usize,
        token: usize,
        room: *const u8,
        to: Target,
    ) {
        let mut y = Sums([[0.0; ROWS]; T]);
        let sums = y.in_memory();
        let inputs = self.inputs.wrapping_add(before * self.blocks * K::WORDS);
        for block in 0..self.blocks {
            self.ask(before / K::TILE * self.blocks + block);
            // SAFETY: as above.
            unsafe {
                let (w, x) = (room.add(block * K::LINES * 64), inputs.add(block * T * K::WORDS));
                K::add::<T>(w, x, sums, self.four);
            }
        }
        // SAFETY: as above.
        unsafe { to.write(token, &y) }
    }
}
