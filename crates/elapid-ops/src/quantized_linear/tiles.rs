//! Weights of bf16 on a processor's matrix unit, whose tiles of sums take the dot products of bf16 rows.
//!
//! An f32 input is the sum of three bf16 numbers, its **parts**, exactly (`activations.rs`): so nothing is rounded that
//! the other kernels do not round, and the unit multiplies parts, [3 T, columns], with the weight. The order of
//! sums is the unit's own, as measured of `TDPBF16PS`: columns are cut into runs of [`RUN`]; in a run, for each part,
//! `s ← s + (e + o)` over blocks of 32 columns, where e and o are chains of fused multiply-adds over the even and the
//! odd columns of the block from zero on, and numbers below 2^-126 count as zero. A run's sums are added as
//! `(s_low + s_middle) + s_high`, and the runs in ascending order.
//!
//! One factor lies in rows, the other in pairs of neighbouring columns of sixteen rows side by side. They may change
//! places: for few tokens the weight's rows are read where they lie and the tokens lie in pairs; for many, a panel of
//! 32 rows of the weight is put in pairs for all tokens. Both have the same bits.

use std::cell::Cell;
use std::ops::Range;

use super::activations::{FEW, PAIRED, PARTS, Parts};
use super::{Activations, Output, Weight};

/// Rows of a tile, and pairs of columns.
pub(super) const SIDE: usize = 16;
/// Columns of a block: a row of a tile.
pub(super) const COLUMNS: usize = 32;
/// Bytes of a tile, of bf16 or of sums.
pub(super) const TILE: usize = 1024;
/// Columns whose products are added up before the parts are: part of the definition.
pub(super) const RUN: usize = 512;
/// Rows of a panel, and of parts that it is multiplied with at a time: two tiles each.
const PANEL: usize = 2 * SIDE;
/// Tokens whose sums are kept until the parts are added: whole pairs of tiles of parts.
const GROUP: usize = 32;
/// Tokens of two tiles of pairs.
const TEN: usize = 2 * PAIRED;
/// Tokens that are worked off together: a run of theirs (768 KB) stays in the second-level cache.
const TOKENS: usize = 256;

/// The arguments of [`Tiles::multiply`].
#[repr(C)]
pub(super) struct Operands {
    /// Sixteen rows, and sixteen more if M is 2; how far a row's next block is, and the next row.
    pub rows: [*const u8; 2],
    pub step: usize,
    pub stride: usize,
    /// Two tiles of pairs for each block, of which N are used.
    pub pairs: *const u8,
    /// At least one.
    pub blocks: usize,
    /// Memory that is asked for: with each block so many lines, and how far apart they and those of the next block are.
    pub ask: *const u8,
    pub lines: usize,
    pub line_stride: usize,
    pub block_stride: usize,
    /// M by two tiles of f32 [16 rows, 16 rows in pairs], of which N are written for each of the M.
    pub sums: *mut f32,
}

/// A matrix unit. Methods may be called where it is available.
pub(super) trait Tiles {
    /// Makes tiles of sixteen rows of 64 bytes ready for this thread.
    unsafe fn begin();
    /// Gives them back.
    unsafe fn end();
    /// Sixteen rows of sixteen words, `offset` bytes behind `rows`, to as many columns.
    unsafe fn transpose(rows: &[*const u8; SIDE], offset: usize, to: *mut u8);
    /// 16 M rows with 16 N ones in pairs, M and N at most two.
    unsafe fn multiply<const M: usize, const N: usize>(operands: &Operands);
    /// Asks for a line of memory to come as near as the second-level cache; any address will do.
    fn ask(at: *const u8);
}

/// A line of the caches.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

const ZERO: Line = Line([0; 64]);
/// A row of a run that is not there.
static NOTHING: [Line; RUN / COLUMNS] = [ZERO; RUN / COLUMNS];

/// Lines of the sums of a group.
const SUMS: usize = GROUP * PARTS / PANEL * 4 * TILE / 64;

/// What a thread keeps from product to product.
#[derive(Default)]
struct Room {
    /// A panel in pairs.
    pairs: Vec<Line>,
    /// Copies of rows that are no whole blocks.
    rows: Vec<Line>,
    sums: Vec<Line>,
}

thread_local! {
    static ROOM: Cell<Room> = Cell::new(Room::default());
}

struct Call<'a> {
    weight: Weight<'a>,
    rows: Range<usize>,
    x: Parts,
    tokens: usize,
    out: Output,
}

/// # Safety
/// As [`super::product`], for weights of bf16 and inputs in parts; the unit must be available.
#[inline(always)]
pub(super) unsafe fn rows<U: Tiles>(
    weight: &Weight<'_>,
    x: &Activations<'_>,
    rows: Range<usize>,
    out: Output,
) {
    let call = Call { weight: *weight, rows, x: x.parts(), tokens: x.tokens(), out };
    let mut room = ROOM.take();
    grow(&mut room.pairs, PANEL * RUN / COLUMNS);
    grow(&mut room.rows, PANEL * RUN / COLUMNS);
    grow(&mut room.sums, SUMS);
    // SAFETY: the caller's.
    unsafe {
        if weight.columns == 0 {
            call.nothing();
        } else {
            U::begin();
            if call.tokens <= FEW {
                call.few::<U>(&mut room);
            } else {
                call.many::<U>(&mut room);
            }
            U::end();
        }
    }
    ROOM.set(room);
}

fn grow(lines: &mut Vec<Line>, count: usize) {
    if lines.len() < count {
        lines.resize(count, ZERO);
    }
}

/// Asks for `lines` lines from `at` on.
#[inline(always)]
fn ask<U: Tiles>(at: *const u8, lines: usize) {
    for line in 0..lines {
        U::ask(at.wrapping_add(line * 64));
    }
}

/// Calls a function for a number of tiles on both sides.
macro_rules! by_tiles {
    ($m:expr, $n:expr, $operands:expr) => {
        match ($m, $n) {
            (1, 1) => U::multiply::<1, 1>($operands),
            (1, _) => U::multiply::<1, 2>($operands),
            (_, 1) => U::multiply::<2, 1>($operands),
            _ => U::multiply::<2, 2>($operands),
        }
    };
}

// SAFETY of all methods: the caller's: rows and tokens are there, the output holds them, and the unit is available.
impl Call<'_> {
    /// Runs of columns, and the columns of one.
    fn runs(&self) -> usize {
        self.weight.columns.div_ceil(RUN)
    }
    fn width(&self, run: usize) -> usize {
        RUN.min(self.weight.columns - run * RUN)
    }

    /// Where a run of a row of the weight begins.
    #[inline(always)]
    fn row(&self, row: usize, run: usize) -> *const u8 {
        self.weight.bytes.as_ptr().wrapping_add(row * self.weight.row_bytes + run * RUN * 2)
    }

    /// Sums of no columns.
    unsafe fn nothing(&self) {
        for token in 0..self.tokens {
            // SAFETY: as above.
            unsafe {
                let to = self.out.pointer.add(token * self.out.stride);
                to.write_bytes(0, self.rows.len());
            }
        }
    }

    /// Rows of the weight where they lie, and tokens in pairs.
    #[inline(always)]
    unsafe fn few<U: Tiles>(&self, room: &mut Room) {
        let Weight { rows: all, columns, row_bytes, .. } = self.weight;
        let tens = self.tokens.div_ceil(TEN);
        let sums = room.sums.as_mut_ptr().cast::<f32>();
        let whole = columns.is_multiple_of(COLUMNS);
        if whole {
            // Rows are read in the order of columns, but come from memory one after the other.
            ask::<U>(self.row(self.rows.start, 0), PANEL.min(self.rows.len()) * row_bytes / 64);
        }
        let mut first = self.rows.start;
        while first < self.rows.end {
            let wanted = first..self.rows.end.min(first + PANEL);
            let m = wanted.len().div_ceil(SIDE);
            // A tile is whole: its other rows are some that there are, and dropped.
            let direct = whole && all >= m * SIDE;
            let from = if direct { first.min(all - m * SIDE) } else { first };
            let ahead = if direct { PANEL.min(self.rows.end - wanted.end) } else { 0 };
            let mut asked = self.row(wanted.end, 0);
            for run in 0..self.runs() {
                let blocks = self.width(run).div_ceil(COLUMNS);
                let (rows, stride) = if direct {
                    (self.row(from, run), row_bytes)
                } else {
                    // SAFETY: as above.
                    (unsafe { self.copy(wanted.clone(), run, &mut room.rows) }, blocks * 64)
                };
                let mut left = ahead;
                for ten in 0..tens {
                    let tokens = ten * TEN..self.tokens.min((ten + 1) * TEN);
                    let n = tokens.len().div_ceil(PAIRED);
                    let lines = left.div_ceil(tens - ten);
                    let operands = Operands {
                        rows: [rows, rows.wrapping_add(SIDE * stride)],
                        step: 64,
                        stride,
                        pairs: self.x.pairs(ten, run * RUN / COLUMNS),
                        blocks,
                        ask: asked,
                        lines,
                        line_stride: 64,
                        block_stride: lines * 64,
                        sums,
                    };
                    left -= lines;
                    asked = asked.wrapping_add(lines * blocks * 64);
                    // SAFETY: as above; `m` tiles of rows are there or copied.
                    unsafe {
                        by_tiles!(m, n, &operands);
                        for tile in 0..m {
                            let sums = sums.add(tile * 2 * TILE / 4);
                            let rows = from + tile * SIDE;
                            self.put_rows::<U>(rows, wanted.clone(), tokens.clone(), run, sums);
                        }
                    }
                }
            }
            first = wanted.end;
        }
    }

    /// Copies a run of up to 32 rows, each followed by zeros up to whole blocks.
    unsafe fn copy(&self, rows: Range<usize>, run: usize, to: &mut [Line]) -> *const u8 {
        let width = self.width(run);
        let lines = width.div_ceil(COLUMNS);
        to[..PANEL * lines].fill(ZERO);
        for (i, row) in rows.enumerate() {
            // SAFETY: as above.
            unsafe {
                let to = to[i * lines..].as_mut_ptr().cast::<u8>();
                self.row(row, run).copy_to_nonoverlapping(to, width * 2);
            }
        }
        to.as_ptr().cast()
    }

    /// Adds the parts of ten tokens up and writes those of the sixteen rows from `from` on that are `wanted`.
    #[inline(always)]
    unsafe fn put_rows<U: Tiles>(
        &self,
        from: usize,
        wanted: Range<usize>,
        tokens: Range<usize>,
        run: usize,
        sums: *const f32,
    ) {
        let start = wanted.start.max(from);
        let rows = start - from..wanted.end.min(from + SIDE) - from;
        let mut columns = [ZERO; SIDE];
        let mut token = tokens.start;
        while token < tokens.end {
            let five = PAIRED.min(tokens.end - token);
            let tile = sums.wrapping_add((token - tokens.start) / PAIRED * TILE / 4);
            let mut own = [NOTHING.as_ptr().cast::<u8>(); SIDE];
            for (row, own) in own.iter_mut().enumerate() {
                *own = tile.wrapping_add(row * SIDE).cast();
            }
            // SAFETY: as above; a column for each part.
            unsafe {
                let columns = columns.as_mut_ptr().cast::<[f32; SIDE]>();
                U::transpose(&own, 0, columns.cast());
                for t in 0..five {
                    let high = *columns.add(t);
                    let middle = *columns.add(PAIRED + t);
                    let low = *columns.add(2 * PAIRED + t);
                    let to = self.out.pointer.add((token + t) * self.out.stride);
                    put([high, middle, low], rows.clone(), run, to.add(start - self.rows.start));
                }
            }
            token += five;
        }
    }

    /// Parts of tokens in rows, and a panel of the weight in pairs.
    #[inline(always)]
    unsafe fn many<U: Tiles>(&self, room: &mut Room) {
        let sums = room.sums.as_mut_ptr().cast::<f32>();
        let mut token = 0;
        while token < self.tokens {
            let tokens = token..self.tokens.min(token + TOKENS);
            for run in 0..self.runs() {
                // SAFETY: as above.
                unsafe { self.panels::<U>(tokens.clone(), run, room, sums) };
            }
            token = tokens.end;
        }
    }

    #[inline(always)]
    unsafe fn panels<U: Tiles>(
        &self,
        tokens: Range<usize>,
        run: usize,
        room: &mut Room,
        sums: *mut f32,
    ) {
        /// How long two tiles of the weight are turned into pairs, in eighths of what four products of tiles take.
        const PACKING: usize = 22;
        let blocks = self.width(run).div_ceil(COLUMNS);
        let block = run * RUN / COLUMNS;
        let pairs = room.pairs.as_mut_ptr().cast::<u8>();
        // The next panel is asked for while this one is turned and multiplied, in equal shares of time.
        let passes = (tokens.len() * PARTS).div_ceil(PANEL);
        let packing = PANEL * PACKING / (PACKING + 8 * passes);
        let lines = (PANEL - packing).div_ceil(passes);
        let mut first = self.rows.start;
        for row in first..self.rows.end.min(first + PANEL) {
            ask::<U>(self.row(row, run), blocks);
        }
        while first < self.rows.end {
            let count = PANEL.min(self.rows.end - first);
            let n = count.div_ceil(SIDE);
            let mut ahead = first + PANEL..self.rows.end.min(first + 2 * PANEL);
            // SAFETY: as above.
            unsafe {
                let asked = take(&mut ahead, packing);
                for block in 0..blocks {
                    for row in asked.clone() {
                        U::ask(self.row(row, run).wrapping_add(block * 64));
                    }
                }
                for tile in 0..n {
                    let rows = first + tile * SIDE..first + count.min((tile + 1) * SIDE);
                    self.turn::<U>(rows, run, pairs.add(tile * TILE));
                }
                let mut token = tokens.start;
                while token < tokens.end {
                    let group = GROUP.min(tokens.end - token);
                    let parts = group * PARTS;
                    for pair in 0..parts.div_ceil(PANEL) {
                        let m = (parts - pair * PANEL).div_ceil(SIDE).min(2);
                        let tile = (token * PARTS + pair * PANEL) / SIDE;
                        let asked = take(&mut ahead, lines);
                        let operands = Operands {
                            rows: [self.x.rows(tile, block), self.x.rows(tile + 1, block)],
                            step: TILE,
                            stride: 64,
                            pairs,
                            blocks,
                            ask: self.row(asked.start, run),
                            lines: asked.len(),
                            line_stride: self.weight.row_bytes,
                            block_stride: 64,
                            sums: sums.add(pair * 4 * TILE / 4),
                        };
                        by_tiles!(m, n, &operands);
                    }
                    for t in 0..group {
                        let to = self
                            .out
                            .pointer
                            .add((token + t) * self.out.stride + first - self.rows.start);
                        put_token(sums, t, run, n, count, to);
                    }
                    token += group;
                }
            }
            first += PANEL;
        }
    }

    /// A run of up to sixteen rows in pairs, the others as zeros; a tile of two for each block.
    #[inline(always)]
    unsafe fn turn<U: Tiles>(&self, rows: Range<usize>, run: usize, to: *mut u8) {
        let mut from = [NOTHING.as_ptr().cast::<u8>(); SIDE];
        for (row, from) in rows.zip(&mut from) {
            *from = self.row(row, run);
        }
        let width = self.width(run);
        let whole = width / COLUMNS;
        // SAFETY: as above.
        unsafe {
            for block in 0..whole {
                U::transpose(&from, block * 64, to.add(block * 2 * TILE));
            }
            if whole * COLUMNS < width {
                let mut copies = [ZERO; SIDE];
                let ends = ends(&from, whole * 64, (width - whole * COLUMNS) * 2, &mut copies);
                U::transpose(&ends, 0, to.add(whole * 2 * TILE));
            }
        }
    }
}

/// Copies of the last bytes of rows, which zeros follow.
///
/// # Safety
/// They must be there.
#[inline(never)]
unsafe fn ends(
    from: &[*const u8; SIDE],
    offset: usize,
    bytes: usize,
    to: &mut [Line; SIDE],
) -> [*const u8; SIDE] {
    let mut ends = *from;
    for (end, to) in ends.iter_mut().zip(to) {
        let to = to.0.as_mut_ptr();
        // SAFETY: the caller's.
        unsafe { end.add(offset).copy_to_nonoverlapping(to, bytes) };
        *end = to;
    }
    ends
}

/// Adds the parts of the `t`-th token of a group up and writes `count` rows of it.
///
/// # Safety
/// The sums must be there, and so must the output.
#[inline(always)]
unsafe fn put_token(sums: *const f32, t: usize, run: usize, n: usize, count: usize, to: *mut f32) {
    for tile in 0..n {
        // SAFETY: the caller's.
        unsafe {
            let row = t * PARTS;
            let high = sums_of(sums, row, tile);
            let middle = sums_of(sums, row + 1, tile);
            let low = sums_of(sums, row + 2, tile);
            let rows = 0..SIDE.min(count - tile * SIDE);
            put([high, middle, low], rows, run, to.add(tile * SIDE));
        }
    }
}

/// Adds the parts of sixteen rows up and writes or, after the first run, adds `rows` of them.
///
/// # Safety
/// The output must hold them.
#[inline(always)]
unsafe fn put(
    [high, middle, low]: [[f32; SIDE]; PARTS],
    rows: Range<usize>,
    run: usize,
    to: *mut f32,
) {
    let mut y = [0.0f32; SIDE];
    for i in 0..SIDE {
        y[i] = (low[i] + middle[i]) + high[i];
    }
    // SAFETY: the caller's.
    unsafe {
        if rows.len() == SIDE {
            let to = to.cast::<[f32; SIDE]>();
            if run > 0 {
                let before = to.read_unaligned();
                for i in 0..SIDE {
                    y[i] += before[i];
                }
            }
            to.write_unaligned(y);
        } else {
            put_some(&y, rows, run, to);
        }
    }
}

/// # Safety
/// As [`put`].
#[inline(never)]
unsafe fn put_some(y: &[f32; SIDE], rows: Range<usize>, run: usize, to: *mut f32) {
    for (i, y) in y[rows].iter().enumerate() {
        // SAFETY: the caller's.
        unsafe { *to.add(i) = if run > 0 { *to.add(i) + y } else { *y } };
    }
}

/// A row of a tile of sums.
///
/// # Safety
/// It must be there.
#[inline(always)]
unsafe fn sums_of(sums: *const f32, row: usize, tile: usize) -> [f32; SIDE] {
    let at = (row / SIDE * 2 + tile) * TILE / 4 + row % SIDE * SIDE;
    // SAFETY: the caller's.
    unsafe { sums.add(at).cast::<[f32; SIDE]>().read() }
}

/// Takes up to `count` off the beginning of a range.
#[inline(always)]
fn take(range: &mut Range<usize>, count: usize) -> Range<usize> {
    let start = range.start;
    range.start = range.end.min(start + count).max(start);
    start..range.start
}
