//! Weights of plain floats: dot products of rows with tokens, several of both at a time.
//!
//! A row's sum has [`LANES`] lanes on every processor. One or two tokens read rows where they lie. For more, four rows
//! are copied, widened to f32, and multiplied with tiles of tokens, half of the lanes at a time where registers are
//! short: the values and the order of each lane, and so the sums, are the same.

use std::cell::Cell;
use std::ops::Range;

use half::{bf16, f16};

use super::{Activations, Output, Weight};
use crate::blocks::Encoding;

/// Lanes of a sum: part of its definition.
pub(super) const LANES: usize = 16;
/// Rows that are copied and multiplied together.
pub(super) const ROWS: usize = 4;
/// Tokens that are worked off together: their inputs stay in the second-level cache.
const TOKENS: usize = 48;
/// Columns of a tile: its rows and tokens stay in the first-level cache. A multiple of `LANES`.
const COLUMNS: usize = 768;
/// Tokens of the largest tile.
const MOST: usize = 6;

/// Sixteen f32 on one instruction set, whole or in parts. Its methods may be called where that set is available.
pub(super) trait Lanes: Copy {
    /// All lanes.
    type Whole: Copy;
    /// The lanes of one pass of a tile.
    type Part: Copy;
    /// Passes.
    const PARTS: usize;
    /// Tokens of a tile, at most `MOST`.
    const TILE: usize;
    /// All zero.
    unsafe fn zero() -> Self::Whole;
    /// `LANES` floats.
    unsafe fn f32(from: *const u8) -> Self::Whole;
    /// `LANES` bfloat16, in the set's own order of lanes for them.
    unsafe fn bf16(from: *const u8) -> Self::Whole;
    /// `LANES` floats in that order.
    unsafe fn like_bf16(from: *const u8) -> Self::Whole;
    /// The floats of that order to where they belong.
    unsafe fn store_bf16(v: Self::Whole, to: *mut f32);
    /// `LANES` halves.
    unsafe fn f16(from: *const u8) -> Self::Whole;
    /// `a b + c`, rounded once.
    unsafe fn mul_add(a: Self::Whole, b: Self::Whole, c: Self::Whole) -> Self::Whole;
    /// The sum of the lanes: upper half onto lower half until one is left.
    unsafe fn sum(v: Self::Whole) -> f32;
    /// The same for the order of bfloat16.
    unsafe fn sum_bf16(v: Self::Whole) -> f32;
    /// `sum` of four times `LANES` floats.
    #[inline(always)]
    unsafe fn four_sums(from: *const f32) -> [f32; ROWS] {
        let mut sums = [0.0; ROWS];
        for (r, sum) in sums.iter_mut().enumerate() {
            // SAFETY: the caller's.
            *sum = unsafe { Self::sum(Self::f32(from.add(r * LANES).cast())) };
        }
        sums
    }
    /// A part of zeros.
    unsafe fn part_zero() -> Self::Part;
    /// `LANES / PARTS` floats.
    unsafe fn part(from: *const f32) -> Self::Part;
    /// To memory.
    unsafe fn part_store(v: Self::Part, to: *mut f32);
    /// As `mul_add`.
    unsafe fn part_mul_add(a: Self::Part, b: Self::Part, c: Self::Part) -> Self::Part;
    /// Asks for a line of memory; any address will do.
    fn ask(at: *const u8);
}

/// How an element is stored.
pub(super) trait Element: Copy {
    const BYTES: usize;
    unsafe fn load<L: Lanes>(from: *const u8) -> L::Whole;
    unsafe fn input<L: Lanes>(from: *const f32) -> L::Whole;
    unsafe fn sum<L: Lanes>(v: L::Whole) -> f32;
    unsafe fn widen<L: Lanes>(from: *const u8, to: *mut f32);
    fn value(bytes: &[u8]) -> f32;
}

// SAFETY of all methods: the caller's.

/// Elements in their own order.
macro_rules! element {
    ($name:ident, $bytes:literal, $load:ident, $value:expr) => {
        #[derive(Clone, Copy)]
        pub(super) struct $name;
        impl Element for $name {
            const BYTES: usize = $bytes;
            #[inline(always)]
            unsafe fn load<L: Lanes>(from: *const u8) -> L::Whole {
                // SAFETY: as above.
                unsafe { L::$load(from) }
            }
            #[inline(always)]
            unsafe fn input<L: Lanes>(from: *const f32) -> L::Whole {
                // SAFETY: as above.
                unsafe { L::f32(from.cast()) }
            }
            #[inline(always)]
            unsafe fn sum<L: Lanes>(v: L::Whole) -> f32 {
                // SAFETY: as above.
                unsafe { L::sum(v) }
            }
            #[inline(always)]
            unsafe fn widen<L: Lanes>(from: *const u8, to: *mut f32) {
                // SAFETY: as above.
                unsafe { to.cast::<L::Whole>().write_unaligned(L::$load(from)) }
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
element!(F16, 2, f16, |b| f16::from_le_bytes(b).to_f32());

#[derive(Clone, Copy)]
pub(super) struct BF16;
impl Element for BF16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const u8) -> L::Whole {
        // SAFETY: as above.
        unsafe { L::bf16(from) }
    }
    #[inline(always)]
    unsafe fn input<L: Lanes>(from: *const f32) -> L::Whole {
        // SAFETY: as above.
        unsafe { L::like_bf16(from.cast()) }
    }
    #[inline(always)]
    unsafe fn sum<L: Lanes>(v: L::Whole) -> f32 {
        // SAFETY: as above.
        unsafe { L::sum_bf16(v) }
    }
    #[inline(always)]
    unsafe fn widen<L: Lanes>(from: *const u8, to: *mut f32) {
        // SAFETY: as above.
        unsafe { L::store_bf16(L::bf16(from), to) }
    }
    #[inline(always)]
    fn value(bytes: &[u8]) -> f32 {
        bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
    }
}

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
            1 => stripe::<L, E, 4, 1>(call),
            2 => stripe::<L, E, 2, 2>(call),
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
            in_place::<L, E, R, T>(at(call, row, 0));
            row += R;
        }
        while row < call.rows {
            in_place::<L, E, 1, T>(at(call, row, 0));
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

/// `R` rows by `T` tokens, where they lie.
#[inline(always)]
unsafe fn in_place<L: Lanes, E: Element, const R: usize, const T: usize>(call: Call) {
    // SAFETY: whole vectors of the rows and tokens, then copies of their ends.
    unsafe {
        let mut sums = [[L::zero(); T]; R];
        let whole = call.columns / LANES * LANES;
        // The rows to come, asked for at the pace of these.
        let mut next = call.weight.wrapping_add(R * call.row_bytes);
        let mut k = 0;
        while k < whole {
            let mut line = 0;
            while line < R * LANES * E::BYTES {
                L::ask(next.wrapping_add(line));
                line += 64;
            }
            next = next.wrapping_add(R * LANES * E::BYTES);
            let mut x = [L::zero(); T];
            for (t, x) in x.iter_mut().enumerate() {
                *x = E::input::<L>(call.x.add(t * call.x_stride + k));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let w = E::load::<L>(call.weight.add(r * call.row_bytes + k * E::BYTES));
                for (sum, &x) in sums.iter_mut().zip(&x) {
                    *sum = L::mul_add(w, x, *sum);
                }
            }
            k += LANES;
        }
        if whole < call.columns {
            let rest = call.columns - whole;
            for (r, sums) in sums.iter_mut().enumerate() {
                let mut w = [0.0f32; LANES];
                widen_rest::<E>(
                    call.weight.add(r * call.row_bytes + whole * E::BYTES),
                    &mut w[..rest],
                );
                for (t, sum) in sums.iter_mut().enumerate() {
                    let mut x = [0.0f32; LANES];
                    let from = call.x.add(t * call.x_stride + whole);
                    x[..rest].copy_from_slice(std::slice::from_raw_parts(from, rest));
                    // Both in the order of the other terms.
                    let (w, x) = (E::input::<L>(w.as_ptr()), E::input::<L>(x.as_ptr()));
                    *sum = L::mul_add(w, x, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (t, &sum) in sums.iter().enumerate() {
                *call.out.add(t * call.out_stride + r) = E::sum::<L>(sum);
            }
        }
    }
}

/// The elements at `from` as f32.
#[inline(always)]
unsafe fn widen_rest<E: Element>(from: *const u8, to: &mut [f32]) {
    for (i, to) in to.iter_mut().enumerate() {
        // SAFETY: the caller's.
        *to = E::value(unsafe { std::slice::from_raw_parts(from.add(i * E::BYTES), E::BYTES) });
    }
}

/// A line of the caches: rows of lines start where vectors are fastest to load.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LANES]);

/// Room for the copies of rows and tokens and for the sums of tiles that are not complete.
#[derive(Default)]
struct Room {
    /// [ROWS, width]
    wide: Vec<Line>,
    /// [TOKENS, width]
    x: Vec<Line>,
    /// [TOKENS, ROWS]
    sums: Vec<Line>,
}

thread_local! {
    static ROOM: Cell<Room> = Cell::new(Room::default());
}

/// Lines of a copied row: whole vectors, and one more, so that rows do not share their places in the caches.
#[inline(always)]
fn width(columns: usize) -> usize {
    columns.div_ceil(LANES) + 1
}

/// Many tokens, block by block.
///
/// No closures here: one that is not inlined would be compiled without the instruction set.
#[inline(always)]
unsafe fn many<L: Lanes, E: Element>(call: Call) {
    let mut room = ROOM.take();
    let width = width(call.columns);
    let zero = Line([0.0; LANES]);
    room.wide.resize(room.wide.len().max(ROWS * width), zero);
    room.x.resize(room.x.len().max(call.tokens.min(TOKENS) * width), zero);
    room.sums.resize(TOKENS * ROWS, zero);
    let mut token = 0;
    while token < call.tokens {
        let tokens = TOKENS.min(call.tokens - token);
        // SAFETY: rows and tokens inside the call; the room is as large as its fields say.
        unsafe {
            for t in 0..tokens {
                let from = call.x.add((token + t) * call.x_stride).cast();
                widen::<L, F32>(from, call.columns, &mut room.x[t * width..][..width]);
            }
            let mut row = 0;
            while row < call.rows {
                let mut part = at(call, row, token);
                part.tokens = tokens;
                part.rows = ROWS.min(call.rows - row);
                for r in 0..part.rows {
                    let from = part.weight.add(r * call.row_bytes);
                    widen::<L, E>(from, call.columns, &mut room.wide[r * width..][..width]);
                }
                rows_by_tokens::<L>(part, &mut room, width);
                row += part.rows;
            }
        }
        token += tokens;
    }
    ROOM.set(room);
}

/// A row as f32, its end filled with zeros.
#[inline(always)]
unsafe fn widen<L: Lanes, E: Element>(from: *const u8, columns: usize, to: &mut [Line]) {
    let whole = columns / LANES;
    for (i, to) in to.iter_mut().enumerate().take(whole) {
        // SAFETY: a whole vector of the row and a line.
        unsafe { E::widen::<L>(from.add(i * LANES * E::BYTES), to.0.as_mut_ptr()) };
    }
    if whole * LANES < columns {
        let (rest, zeros) = to[whole].0.split_at_mut(columns - whole * LANES);
        // SAFETY: the rest of the row.
        unsafe { widen_rest::<E>(from.add(whole * LANES * E::BYTES), rest) };
        zeros.fill(0.0);
    }
}

/// The copied rows with the copied tokens.
#[inline(always)]
unsafe fn rows_by_tokens<L: Lanes>(call: Call, room: &mut Room, width: usize) {
    let lines = call.columns.div_ceil(LANES);
    // The rows to come are asked for at the pace of the tiles.
    let mut next = call.weight.wrapping_add(ROWS * call.row_bytes);
    let mut left = (ROWS * call.row_bytes).div_ceil(64);
    let turns = call.tokens.div_ceil(L::TILE) * L::PARTS * lines;
    let ask = left.div_ceil(turns.max(1));
    let mut first = 0;
    // SAFETY: tokens below the call's, lines below the rows'; the room is as large as its fields say.
    unsafe {
        while first < lines {
            let end = lines.min(first + COLUMNS / LANES);
            let mut token = 0;
            while token < call.tokens {
                let rest = call.tokens - token;
                let tile = Tile {
                    call: at(call, 0, token),
                    wide: room.wide.as_ptr().cast(),
                    x: room.x.as_ptr().add(token * width).cast(),
                    width: width * LANES,
                    columns: first * LANES..end * LANES,
                    sums: room.sums.as_mut_ptr().add(token * ROWS).cast(),
                    last: end == lines,
                    next,
                    ask: if left > 0 { 64 * ask } else { 0 },
                };
                let asked = ask * L::PARTS * (end - first);
                next = next.wrapping_add(64 * asked);
                left = left.saturating_sub(asked);
                let count = if rest == L::TILE + 1 { L::TILE - 1 } else { rest.min(L::TILE) };
                match count {
                    1 => tile.run::<L, 1>(),
                    2 => tile.run::<L, 2>(),
                    3 => tile.run::<L, 3>(),
                    4 if L::TILE > 3 => tile.run::<L, 4>(),
                    5 if L::TILE > 3 => tile.run::<L, 5>(),
                    _ if L::TILE > 3 => tile.run::<L, MOST>(),
                    _ => unreachable!("at most three"),
                }
                token += count;
            }
            first = end;
        }
    }
}

/// Copied rows by some copied tokens, for a range of columns.
struct Tile {
    call: Call,
    wide: *const f32,
    x: *const f32,
    /// Floats from row to row and from token to token.
    width: usize,
    columns: Range<usize>,
    /// Sums so far and to be, [tokens, ROWS, LANES].
    sums: *mut f32,
    /// True for the last columns.
    last: bool,
    /// What is asked for, and how many bytes a vector of columns.
    next: *const u8,
    ask: usize,
}

impl Tile {
    /// # Safety
    /// The rows and tokens must be there.
    #[inline(always)]
    unsafe fn run<L: Lanes, const T: usize>(&self) {
        let step = LANES / L::PARTS;
        let mut next = self.next;
        // SAFETY: the caller's; a part begins inside of every vector of columns.
        unsafe {
            for part in 0..L::PARTS {
                let mut sums = [[L::part_zero(); T]; ROWS];
                if self.columns.start > 0 {
                    for (r, sums) in sums.iter_mut().enumerate() {
                        for (t, sum) in sums.iter_mut().enumerate() {
                            *sum = L::part(self.sums.add((t * ROWS + r) * LANES + part * step));
                        }
                    }
                }
                let (wide, x) = (self.wide.add(part * step), self.x.add(part * step));
                let mut k = self.columns.start;
                while k < self.columns.end {
                    let mut line = 0;
                    while line < self.ask {
                        L::ask(next.wrapping_add(line));
                        line += 64;
                    }
                    next = next.wrapping_add(self.ask);
                    let mut inputs = [L::part_zero(); T];
                    for (t, input) in inputs.iter_mut().enumerate() {
                        *input = L::part(x.add(t * self.width + k));
                    }
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let w = L::part(wide.add(r * self.width + k));
                        for (sum, &input) in sums.iter_mut().zip(&inputs) {
                            *sum = L::part_mul_add(w, input, *sum);
                        }
                    }
                    k += LANES;
                }
                for (r, sums) in sums.iter().enumerate() {
                    for (t, &sum) in sums.iter().enumerate() {
                        L::part_store(sum, self.sums.add((t * ROWS + r) * LANES + part * step));
                    }
                }
            }
            if self.last {
                for t in 0..T {
                    let to = self.call.out.add(t * self.call.out_stride);
                    let sums = L::four_sums(self.sums.add(t * ROWS * LANES));
                    if self.call.rows == ROWS {
                        to.cast::<[f32; ROWS]>().write_unaligned(sums);
                    } else {
                        std::slice::from_raw_parts_mut(to, self.call.rows)
                            .copy_from_slice(&sums[..self.call.rows]);
                    }
                }
            }
        }
    }
}

/// Plain code.
#[cfg(not(target_arch = "aarch64"))]
#[derive(Clone, Copy)]
pub(super) struct Portable;

#[cfg(not(target_arch = "aarch64"))]
// SAFETY of all methods: the caller's: the elements are there.
impl Lanes for Portable {
    type Whole = [f32; LANES];
    type Part = [f32; LANES];
    const PARTS: usize = 1;
    const TILE: usize = 3;
    #[inline(always)]
    unsafe fn zero() -> Self::Whole {
        [0.0; LANES]
    }
    #[inline(always)]
    unsafe fn f32(from: *const u8) -> Self::Whole {
        // SAFETY: as above.
        unsafe { from.cast::<[[u8; 4]; LANES]>().read_unaligned() }.map(f32::from_le_bytes)
    }
    #[inline(always)]
    unsafe fn bf16(from: *const u8) -> Self::Whole {
        // SAFETY: as above.
        let bytes = unsafe { from.cast::<[[u8; 2]; LANES]>().read_unaligned() };
        bytes.map(|bytes| bf16::from_le_bytes(bytes).to_f32())
    }
    #[inline(always)]
    unsafe fn like_bf16(from: *const u8) -> Self::Whole {
        // SAFETY: as above.
        unsafe { Self::f32(from) }
    }
    #[inline(always)]
    unsafe fn store_bf16(v: Self::Whole, to: *mut f32) {
        // SAFETY: as above.
        unsafe { to.cast::<Self::Whole>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn f16(from: *const u8) -> Self::Whole {
        // SAFETY: as above.
        let bytes = unsafe { from.cast::<[[u8; 2]; LANES]>().read_unaligned() };
        bytes.map(|bytes| f16::from_le_bytes(bytes).to_f32())
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::Whole, b: Self::Whole, c: Self::Whole) -> Self::Whole {
        // Without a fused instruction a call would cost a hundred times as much.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn sum(v: Self::Whole) -> f32 {
        let v: [f32; 8] = std::array::from_fn(|i| v[i] + v[i + 8]);
        let v: [f32; 4] = std::array::from_fn(|i| v[i] + v[i + 4]);
        (v[0] + v[2]) + (v[1] + v[3])
    }
    #[inline(always)]
    unsafe fn sum_bf16(v: Self::Whole) -> f32 {
        // SAFETY: as above.
        unsafe { Self::sum(v) }
    }
    #[inline(always)]
    unsafe fn part_zero() -> Self::Part {
        [0.0; LANES]
    }
    #[inline(always)]
    unsafe fn part(from: *const f32) -> Self::Part {
        // SAFETY: as above.
        unsafe { from.cast::<Self::Part>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn part_store(v: Self::Part, to: *mut f32) {
        // SAFETY: as above.
        unsafe { to.cast::<Self::Part>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn part_mul_add(a: Self::Part, b: Self::Part, c: Self::Part) -> Self::Part {
        // SAFETY: as above.
        unsafe { Self::mul_add(a, b, c) }
    }
    #[inline(always)]
    fn ask(_: *const u8) {}
}
