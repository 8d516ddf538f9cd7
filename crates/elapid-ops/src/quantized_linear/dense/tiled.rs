//! Many tokens: a block of eight rows is copied to the first-level cache, widened, and multiplied with all tokens in
//! tiles of four rows by some tokens, whose sums fill the registers.
//!
//! Copies of tokens stay in the second-level cache and pass through the first-level one once for eight rows.

use super::{BLOCK, Call, Copied, Element, ROW, Room, Vectors, copy_token, grow, load_rest, width};

/// Rows of a panel: with their copies and those of a tile's tokens the first-level cache is two thirds full.
const PANEL: usize = 8;
/// Rows of a tile.
const ROWS: usize = 4;
/// Copied blocks of tokens that stay in the second-level cache, and so the tokens that are worked off together.
const COPIES: usize = 128;
/// Vectors of a turn of the inner loop.
const UNROLL: usize = 4;
/// Tokens of the largest tile.
const MOST: usize = 6;

/// # Safety
/// As [`super::by_encoding`].
#[inline(always)]
pub(super) unsafe fn product<L: Vectors, E: Element>(call: Call, room: &mut Room) {
    let blocks = call.columns.div_ceil(BLOCK);
    grow(&mut room.rows, PANEL);
    let mut token = 0;
    while token < call.tokens {
        let tokens = COPIES.min(call.tokens - token);
        // If all blocks of the tokens fit, rows are read from end to end, else block after block.
        let together = if tokens * blocks <= COPIES { blocks } else { 1 };
        grow(&mut room.x, tokens * together);
        let mut first = 0;
        // SAFETY: rows, tokens and blocks inside the call; the room is as large as its fields say.
        unsafe {
            let mut part = call;
            part.x = call.x.add(token * call.x_stride);
            part.out = call.out.add(token * call.out_stride);
            part.tokens = tokens;
            let tiles = Tiles::of::<L>(tokens);
            while first < blocks {
                for block in first..first + together {
                    let copies = &mut room.x[(block - first) * tokens..][..tokens];
                    for (t, copy) in copies.iter_mut().enumerate() {
                        let from = part.x.add(t * call.x_stride + block * BLOCK);
                        copy_token::<L, E>(from, width(call.columns, block), copy);
                    }
                }
                let mut row = 0;
                while row < call.rows {
                    for block in first..first + together {
                        let x = room.x[(block - first) * tokens..].as_ptr();
                        panel::<L, E>(part, row, block, x, tiles, &mut room.rows);
                    }
                    row += PANEL;
                }
                first += together;
            }
        }
        token += tokens;
    }
}

/// How tokens are cut into tiles of about equal size, so that none has too few sums to keep the processor busy.
#[derive(Clone, Copy)]
struct Tiles {
    /// Tokens of a tile, and how many tiles have one more.
    tokens: usize,
    larger: usize,
    /// Rows of the next panel that each tile asks for until none is left.
    rows_ahead: usize,
}

impl Tiles {
    fn of<L: Vectors>(tokens: usize) -> Self {
        let tiles = tokens.div_ceil(L::TOKENS);
        let rows_ahead = PANEL.div_ceil(tiles * PANEL / ROWS);
        Self { tokens: tokens / tiles, larger: tokens % tiles, rows_ahead }
    }
}

/// One block of a panel's rows with all tokens, whose copies are at `x`; the next panel's is asked for.
#[inline(always)]
unsafe fn panel<L: Vectors, E: Element>(
    call: Call,
    row: usize,
    block: usize,
    x: *const Copied,
    tiles: Tiles,
    copies: &mut [Copied],
) {
    let columns = width(call.columns, block);
    let rows = PANEL.min(call.rows - row);
    // SAFETY: rows and columns of the call.
    unsafe {
        let from = call.weight.add(row * call.row_bytes + block * BLOCK * E::BYTES);
        for (r, copy) in copies.iter_mut().enumerate().take(rows) {
            copy_row::<L, E>(from.add(r * call.row_bytes), columns, copy);
        }
    }
    let columns = columns.next_multiple_of(2 * L::LANES);
    let mut next = row + PANEL;
    let mut token = 0;
    let mut larger = tiles.larger;
    while token < call.tokens {
        let count = tiles.tokens + usize::from(larger > 0);
        larger = larger.saturating_sub(1);
        let x = x.wrapping_add(token);
        let ahead = x.wrapping_add(count).cast::<u8>();
        // The results of the next tiles, which are added to.
        for t in 0..count {
            L::ask(call.out.wrapping_add((token + count + t) * call.out_stride + row).cast());
        }
        let mut r = 0;
        while r < rows {
            let end = call.rows.min(row + 2 * PANEL).min(next + tiles.rows_ahead).max(next);
            let tile = Tile {
                rows: copies[r..].as_ptr().cast(),
                x: x.cast(),
                columns,
                ahead: ahead.wrapping_add(r / ROWS * share::<L>()),
                next: call.weight.wrapping_add(next * call.row_bytes + block * BLOCK * E::BYTES),
                row_bytes: call.row_bytes,
                rows_ahead: end - next,
                out: call.out.wrapping_add(token * call.out_stride + row + r),
                out_stride: call.out_stride,
                count: ROWS.min(rows - r),
                add: block > 0,
            };
            next = end;
            // SAFETY: copies of rows (those beyond the last are of others, and dropped) and tokens.
            unsafe {
                match count {
                    1 => tile.run::<L, E, 1>(),
                    2 => tile.run::<L, E, 2>(),
                    3 => tile.run::<L, E, 3>(),
                    4 if L::TOKENS > 3 => tile.run::<L, E, 4>(),
                    5 if L::TOKENS > 3 => tile.run::<L, E, 5>(),
                    _ if L::TOKENS > 3 => tile.run::<L, E, MOST>(),
                    _ => unreachable!("at most three"),
                }
            }
            r += ROWS;
        }
        token += count;
    }
}

/// Copies a block of a row, widened.
#[inline(always)]
unsafe fn copy_row<L: Vectors, E: Element>(from: *const u8, columns: usize, to: &mut Copied) {
    let step = 2 * L::LANES;
    let whole = columns / step * step;
    let to = to.as_mut_ptr().cast::<f32>();
    // SAFETY: whole steps of the row and of a block.
    unsafe {
        let mut k = 0;
        while k < whole {
            L::store_two(E::load::<L>(from.add(k * E::BYTES)), to.add(k));
            k += step;
        }
        if whole < columns {
            let rest = load_rest::<L, E>(from.add(whole * E::BYTES), columns - whole);
            L::store_two(rest, to.add(whole));
        }
    }
}

/// Bytes of the next tokens that each tile of a panel asks for.
const fn share<L: Vectors>() -> usize {
    L::TOKENS * size_of::<Copied>() / (PANEL / ROWS)
}

/// Bytes of them for each column of a tile, so that a turn asks for whole lines.
const fn asked<L: Vectors>() -> usize {
    let turn = UNROLL * L::LANES;
    (share::<L>() * turn / BLOCK).next_multiple_of(64) / turn
}

/// Four copied rows by some copied tokens.
struct Tile {
    rows: *const f32,
    x: *const f32,
    /// A whole number of steps of two vectors.
    columns: usize,
    /// A part of the next tokens, asked for along the way.
    ahead: *const u8,
    /// The same columns of rows to come, asked for as well.
    next: *const u8,
    row_bytes: usize,
    rows_ahead: usize,
    out: *mut f32,
    out_stride: usize,
    /// Rows that there are.
    count: usize,
    /// True if the sums are added to what is there.
    add: bool,
}

impl Tile {
    /// # Safety
    /// The copies must be there, and the results be this thread's.
    #[inline(always)]
    unsafe fn run<L: Vectors, E: Element, const T: usize>(&self) {
        // SAFETY: the caller's.
        unsafe {
            let mut sums = [[L::zero(); ROWS]; T];
            let mut k = 0;
            // Longer turns leave more of the processor's width to the products.
            while k + UNROLL * L::LANES <= self.columns {
                let ahead = self.ahead.wrapping_add(k * asked::<L>());
                let mut line = 0;
                while line < UNROLL * L::LANES * asked::<L>() {
                    L::ask(ahead.wrapping_add(line));
                    line += 64;
                }
                for r in 0..self.rows_ahead {
                    let at = self.next.wrapping_add(r * self.row_bytes + k * E::BYTES);
                    let mut line = 0;
                    while line < UNROLL * L::LANES * E::BYTES {
                        L::ask(at.wrapping_add(line));
                        line += 64;
                    }
                }
                for _ in 0..UNROLL {
                    sums = term::<L, T>(self.rows.add(k), self.x.add(k), sums);
                    k += L::LANES;
                }
            }
            while k < self.columns {
                sums = term::<L, T>(self.rows.add(k), self.x.add(k), sums);
                k += L::LANES;
            }
            // No loop: sums that are indexed by a variable would lie on the stack all along.
            self.put_two::<L, T>(0, &sums);
            self.put_two::<L, T>(2, &sums);
            self.put_two::<L, T>(4, &sums);
        }
    }

    /// The sums of tokens `t` and `t + 1`, if there are such.
    ///
    /// # Safety
    /// As [`Tile::run`].
    #[inline(always)]
    unsafe fn put_two<L: Vectors, const T: usize>(&self, t: usize, sums: &[[L::Vector; ROWS]; T]) {
        // SAFETY: the caller's.
        unsafe {
            if t + 1 < T {
                let [first, second] = L::sums_of_two([sums[t], sums[t + 1]]);
                self.put(t, first);
                self.put(t + 1, second);
            } else if t < T {
                self.put(t, L::sums(sums[t]));
            }
        }
    }

    /// A token's sums.
    ///
    /// # Safety
    /// As [`Tile::run`].
    #[inline(always)]
    unsafe fn put(&self, token: usize, mut sums: [f32; ROWS]) {
        // SAFETY: the caller's.
        unsafe {
            let to = self.out.add(token * self.out_stride);
            if self.count == ROWS {
                let to = to.cast::<[f32; ROWS]>();
                if self.add {
                    let old = to.read_unaligned();
                    for (sum, old) in sums.iter_mut().zip(old) {
                        *sum += old;
                    }
                }
                to.write_unaligned(sums);
            } else {
                for (r, &sum) in sums.iter().enumerate().take(self.count) {
                    *to.add(r) = if self.add { *to.add(r) + sum } else { sum };
                }
            }
        }
    }
}

/// A vector of each row with each token's. Sums go in and out as values, so that they stay in registers.
#[inline(always)]
unsafe fn term<L: Vectors, const T: usize>(
    rows: *const f32,
    x: *const f32,
    mut sums: [[L::Vector; ROWS]; T],
) -> [[L::Vector; ROWS]; T] {
    // SAFETY: the caller's.
    unsafe {
        let mut inputs = [L::zero(); T];
        for (t, input) in inputs.iter_mut().enumerate() {
            *input = L::load(x.add(t * ROW));
        }
        for r in 0..ROWS {
            let w = L::load(rows.add(r * ROW));
            for (sums, &input) in sums.iter_mut().zip(&inputs) {
                sums[r] = L::mul_add(w, input, sums[r]);
            }
        }
    }
    sums
}
