//! The inputs of a product: f32 as they are, the same as sums of bf16, or rounded to eight bits in blocks.
//!
//! Where a matrix unit multiplies bf16, an input x is the sum of [`PARTS`] such numbers: x without its last 16 bits,
//! the same of what is left, and the rest, which has no more than eight bits. The sum is x exactly, but for what the
//! last parts lose below 2^-126; a part is subtracted only from finite numbers, so infinities and NaN stand in the
//! first part alone.
//!
//! A block of 32 or 256 elements has the scale `d = max |x| / 127` and the integers `round(x / d)`, ties to even. They
//! are kept as bytes and as 16-bit numbers, since kernels differ in what they multiply, with the sum of every 32.

use std::marker::PhantomData;

use crate::blocks::Encoding;

/// Elements whose sum is kept.
pub(super) const SUM: usize = 32;

/// Input elements that share a scale, by the encoding of the weight; 0 for floats, whose inputs are not rounded.
pub const fn block(encoding: Encoding) -> usize {
    match encoding {
        Encoding::F32 | Encoding::F16 | Encoding::BF16 => 0,
        Encoding::Q8_0 | Encoding::Q4_0 => 32,
        Encoding::Q4_K | Encoding::Q6_K => 256,
    }
}

/// What inputs are made of.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// f32 as they are.
    #[default]
    Floats,
    /// Sums of bf16.
    Parts,
    /// Integers with a scale for each block of so many.
    Integers(usize),
}

impl Kind {
    /// What products with weights in `encoding` take on this processor.
    fn of(encoding: Encoding) -> Self {
        match (block(encoding), encoding) {
            #[cfg(target_arch = "x86_64")]
            (_, Encoding::BF16) if super::detected::has_tiles() => Self::Parts,
            (0, _) => Self::Floats,
            (block, _) => Self::Integers(block),
        }
    }

    /// Elements that are written together; 0 if inputs stay as they are.
    fn block(self) -> usize {
        match self {
            Self::Floats => 0,
            Self::Parts => PARTS_BLOCK,
            Self::Integers(block) => block,
        }
    }
}

/// bf16 numbers whose sum an input is.
pub(super) const PARTS: usize = 3;
/// Tokens of a tile of pairs: their parts are 15 of its 16 columns.
pub(super) const PAIRED: usize = 5;
/// Most tokens that lie in pairs. No kernel of any encoding reads a weight's rows where they lie for more.
pub const FEW: usize = 20;
/// Columns of a row of a tile.
const PARTS_BLOCK: usize = 32;
/// Rows of a tile.
const PARTS_ROWS: usize = 16;
/// Parts of a block, a row of a tile.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u16; PARTS_BLOCK]);

/// Where the parts of inputs lie: in tiles of sixteen rows by 32 columns, zeros after the last column.
///
/// The parts of more than [`FEW`] tokens are rows, [T, PARTS], and a tile has sixteen of them; tiles of the same rows
/// lie one after the other. Up to so many tokens lie as the other factor of a product of tiles: a row has the same pair
/// of columns of five tokens, high parts first, then middle and low ones; two tiles, which are ten tokens, lie beside
/// each other for each 32 columns.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts {
    lines: *mut Line,
    /// Tiles in the width of a row.
    blocks: usize,
}

#[cfg_attr(not(any(test, target_arch = "x86_64")), allow(dead_code))]
impl Parts {
    /// Tile `tile` of rows of parts at 32 columns; the next ones follow.
    pub(super) fn rows(&self, tile: usize, block: usize) -> *const u8 {
        self.lines.wrapping_add((tile * self.blocks + block) * PARTS_ROWS).cast()
    }

    /// Two tiles of pairs at 32 columns, of the `ten`-th ten tokens; the next two follow.
    pub(super) fn pairs(&self, ten: usize, block: usize) -> *const u8 {
        self.rows(2 * ten, 2 * block)
    }

    /// Lines that up to `tokens` need, either way; both have tiles in twos.
    fn lines(tokens: usize, columns: usize) -> usize {
        let rows = (tokens * PARTS).div_ceil(2 * PARTS_ROWS);
        let pairs = tokens.min(FEW).div_ceil(2 * PAIRED);
        rows.max(pairs) * 2 * PARTS_ROWS * columns.div_ceil(PARTS_BLOCK)
    }

    /// Writes block `block` of one of `tokens` tokens.
    ///
    /// # Safety
    /// There must be such a block, and nobody else may use it.
    unsafe fn write(&self, token: usize, tokens: usize, block: usize, x: &[f32]) {
        let mut parts = [Line([0; PARTS_BLOCK]); PARTS];
        split(x, &mut parts);
        // SAFETY: the caller's.
        unsafe {
            if tokens > FEW {
                for (part, line) in parts.iter().enumerate() {
                    let row = token * PARTS + part;
                    let tile = self.rows(row / PARTS_ROWS, block).cast_mut().cast::<Line>();
                    *tile.add(row % PARTS_ROWS) = *line;
                }
            } else {
                let tiles = self.pairs(token / (2 * PAIRED), block).cast_mut().cast::<Line>();
                let tile = tiles.add(token / PAIRED % 2 * PARTS_ROWS).cast::<[u16; 2]>();
                for (part, line) in parts.iter().enumerate() {
                    let column = tile.add(part * PAIRED + token % PAIRED);
                    for (row, pair) in line.0.as_chunks::<2>().0.iter().enumerate() {
                        *column.add(row * PARTS_ROWS) = *pair;
                    }
                }
            }
        }
    }
}

/// Room for what is made of a product's inputs: parts or integers.
#[derive(Debug, Default)]
pub struct Storage {
    kind: Kind,
    parts: Vec<Line>,
    tokens: usize,
    columns: usize,
    bytes: Vec<i8>,
    words: Vec<i16>,
    scales: Vec<f32>,
    sums: Vec<i16>,
}

impl Storage {
    /// Room for up to `tokens` rows of `columns` elements, for weights in `encoding`.
    pub fn new(encoding: Encoding, tokens: usize, columns: usize) -> Self {
        Self::of(Kind::of(encoding), tokens, columns)
    }

    pub(super) fn of(kind: Kind, tokens: usize, columns: usize) -> Self {
        let block = kind.block();
        let parts = if kind == Kind::Parts { Parts::lines(tokens, columns) } else { 0 };
        let integers = if matches!(kind, Kind::Integers(_)) { tokens * columns } else { 0 };
        Self {
            kind,
            parts: vec![Line([0; PARTS_BLOCK]); parts],
            tokens,
            columns,
            bytes: vec![0; integers],
            words: vec![0; integers],
            scales: vec![0.0; integers.checked_div(block).unwrap_or(0)],
            sums: vec![0; integers / SUM],
        }
    }

    /// What threads share while they fill it.
    pub fn writer(&mut self) -> Writer {
        let block = self.kind.block();
        let blocks = if block == 0 { 0 } else { self.columns.div_ceil(block) };
        Writer {
            kind: self.kind,
            block,
            blocks,
            parts: Parts { lines: self.parts.as_mut_ptr(), blocks },
            tokens: self.tokens,
            columns: self.columns,
            bytes: self.bytes.as_mut_ptr(),
            words: self.words.as_mut_ptr(),
            scales: self.scales.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
        }
    }

    /// Writes the rows `x` [tokens, columns].
    pub(super) fn fill<'a>(&'a mut self, x: &'a [f32]) -> Activations<'a> {
        let (tokens, columns) = (self.tokens, self.columns);
        assert_eq!(x.len(), tokens * columns, "the rows that there is room for");
        let writer = self.writer();
        for unit in 0..writer.units(tokens) {
            // SAFETY: nobody else uses the storage.
            unsafe { writer.write(unit, tokens, x, columns) };
        }
        // SAFETY: as above, and all is written.
        unsafe { writer.activations(tokens, x, columns) }
    }
}

/// A [`Storage`] that several threads fill and read in turns.
#[derive(Debug, Clone, Copy)]
pub struct Writer {
    kind: Kind,
    /// Columns of a block, and blocks of a row; 0 for floats.
    block: usize,
    blocks: usize,
    parts: Parts,
    tokens: usize,
    columns: usize,
    bytes: *mut i8,
    words: *mut i16,
    scales: *mut f32,
    sums: *mut i16,
}

// SAFETY: its methods put the exclusion on the caller.
unsafe impl Send for Writer {}
// SAFETY: as above.
unsafe impl Sync for Writer {}

impl Writer {
    /// True if anything is written: inputs do not stay as they are.
    pub fn rounds(&self) -> bool {
        self.kind != Kind::Floats
    }

    /// Blocks of `tokens` rows, which may be written in any order by any thread; 0 for floats.
    pub fn units(&self, tokens: usize) -> usize {
        tokens * self.blocks
    }

    /// Writes block `unit` of `tokens` rows `x` that are `stride` apart.
    ///
    /// # Panics
    /// If there is no room for the block or `x` ends before it.
    ///
    /// # Safety
    /// The storage must be alive, and no other thread may use this block meanwhile.
    pub unsafe fn write(&self, unit: usize, tokens: usize, x: &[f32], stride: usize) {
        let (token, at) = (unit / self.blocks, unit % self.blocks);
        // SAFETY: the caller's.
        unsafe { self.write_block(token, tokens, at, &x[token * stride + at * self.block..]) };
    }

    /// Writes the beginning of `x` as block `at` of a token.
    unsafe fn write_block(&self, token: usize, tokens: usize, at: usize, x: &[f32]) {
        assert!(token < tokens && tokens <= self.tokens && at < self.blocks, "block {at}");
        let block = self.block;
        if self.kind == Kind::Parts {
            let columns = block.min(self.columns - at * block);
            // SAFETY: the block lies inside the storage; the caller vouches for exclusion.
            return unsafe { self.parts.write(token, tokens, at, &x[..columns]) };
        }
        let unit = token * self.blocks + at;
        let x = &x[..block];
        let first = unit * block;
        // SAFETY: the block lies inside the storage, which has whole blocks; the caller vouches for exclusion.
        unsafe {
            let bytes = std::slice::from_raw_parts_mut(self.bytes.add(first), block);
            let words = std::slice::from_raw_parts_mut(self.words.add(first), block);
            let sums = std::slice::from_raw_parts_mut(self.sums.add(first / SUM), block / SUM);
            *self.scales.add(unit) = round(x, bytes, words, sums);
        }
    }

    /// Writes row `token` of `tokens`; nothing for floats.
    ///
    /// # Panics
    /// If there is no room for the row or `x` is shorter.
    ///
    /// # Safety
    /// As [`Writer::write`], for all blocks of the row.
    pub unsafe fn write_row(&self, token: usize, tokens: usize, x: &[f32]) {
        for at in 0..self.blocks {
            // SAFETY: the caller's.
            unsafe { self.write_block(token, tokens, at, &x[at * self.block..]) };
        }
    }

    /// The first `tokens` rows, whose values are `x`, `stride` apart.
    ///
    /// # Panics
    /// If there is no room for so many, or `x` ends before them.
    ///
    /// # Safety
    /// The storage must be alive, its blocks written as those of so many rows, and not be written while the result is
    /// used.
    pub unsafe fn activations<'a>(
        &self,
        tokens: usize,
        x: &'a [f32],
        stride: usize,
    ) -> Activations<'a> {
        assert!(tokens <= self.tokens, "{tokens} rows, room for {}", self.tokens);
        assert!(tokens == 0 || x.len() >= (tokens - 1) * stride + self.columns, "rows of floats");
        Activations {
            kind: self.kind,
            parts: self.parts,
            tokens,
            columns: self.columns,
            floats: x.as_ptr(),
            stride,
            bytes: self.bytes,
            words: self.words,
            scales: self.scales,
            sums: self.sums,
            lifetime: PhantomData,
        }
    }
}

/// Inputs [T, columns], ready for weights of one kind of encoding.
#[derive(Debug, Clone, Copy)]
pub struct Activations<'a> {
    kind: Kind,
    parts: Parts,
    tokens: usize,
    columns: usize,
    floats: *const f32,
    stride: usize,
    bytes: *const i8,
    words: *const i16,
    scales: *const f32,
    sums: *const i16,
    lifetime: PhantomData<&'a [f32]>,
}

// SAFETY: it is read only.
unsafe impl Send for Activations<'_> {}
// SAFETY: as above.
unsafe impl Sync for Activations<'_> {}

impl Activations<'_> {
    /// T.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The width.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// True if they were made for weights in `encoding`.
    pub fn serves(&self, encoding: Encoding) -> bool {
        self.kind == Kind::of(encoding)
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// Their parts.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(super) fn parts(&self) -> Parts {
        assert_eq!(self.kind, Kind::Parts);
        self.parts
    }

    /// The values of token 0, and how far the next is.
    pub(super) fn floats(&self) -> (*const f32, usize) {
        (self.floats, self.stride)
    }

    /// Bytes, words, scales and sums of a token.
    pub(super) fn integers(&self, token: usize) -> Row {
        let Kind::Integers(block) = self.kind else { unreachable!("inputs of another kind") };
        assert!(token < self.tokens);
        let first = token * self.columns;
        // SAFETY: the row lies inside the storage.
        unsafe {
            Row {
                bytes: self.bytes.add(first),
                words: self.words.add(first),
                scales: self.scales.add(first / block),
                sums: self.sums.add(first / SUM),
            }
        }
    }
}

/// One token's integers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    /// [columns]
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub bytes: *const i8,
    /// [columns], the same numbers.
    pub words: *const i16,
    /// One a block.
    pub scales: *const f32,
    /// One for each 32 elements.
    pub sums: *const i16,
}

/// The parts of up to 32 inputs; zeros follow.
fn split(x: &[f32], to: &mut [Line; PARTS]) {
    let Ok(whole) = x.try_into() else {
        let mut whole = [0.0f32; PARTS_BLOCK];
        whole[..x.len()].copy_from_slice(x);
        return split(&whole, to);
    };
    #[cfg(target_arch = "x86_64")]
    if super::detected::has_avx2() {
        #[target_feature(enable = "avx2,fma")]
        fn avx2(x: &[f32; PARTS_BLOCK], to: &mut [Line; PARTS]) {
            split_portable(x, to);
        }
        // SAFETY: AVX2 and FMA were found.
        return unsafe { avx2(whole, to) };
    }
    split_portable(whole, to);
}

#[inline(always)]
fn split_portable(x: &[f32; PARTS_BLOCK], [high, middle, low]: &mut [Line; PARTS]) {
    const UPPER: u32 = 0xFFFF_0000;
    const EXPONENT: u32 = 0x7F80_0000;
    const QUIET: u32 = 0x0040_0000;
    for (i, &x) in x.iter().enumerate() {
        let bits = x.to_bits();
        let magnitude = bits & !(1 << 31);
        let first = bits & UPPER | if magnitude > EXPONENT { QUIET } else { 0 };
        let rest = if magnitude >= EXPONENT { 0.0 } else { x - f32::from_bits(first) };
        let second = rest.to_bits() & UPPER;
        let third = rest - f32::from_bits(second);
        high.0[i] = (first >> 16) as u16;
        middle.0[i] = (second >> 16) as u16;
        low.0[i] = (third.to_bits() >> 16) as u16;
    }
}

/// Rounds a block and returns its scale, NaN if a value is not finite.
fn round(x: &[f32], bytes: &mut [i8], words: &mut [i16], sums: &mut [i16]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if super::detected::has_avx2() {
        #[target_feature(enable = "avx2,fma")]
        fn avx2(x: &[f32], bytes: &mut [i8], words: &mut [i16], sums: &mut [i16]) -> f32 {
            round_portable(x, bytes, words, sums)
        }
        // SAFETY: AVX2 and FMA were found.
        return unsafe { avx2(x, bytes, words, sums) };
    }
    round_portable(x, bytes, words, sums)
}

#[inline(always)]
fn round_portable(x: &[f32], bytes: &mut [i8], words: &mut [i16], sums: &mut [i16]) -> f32 {
    // Bits of magnitudes order like the magnitudes, and NaN stands above infinity.
    let largest = x.iter().fold(0u32, |largest, v| largest.max(v.to_bits() & 0x7FFF_FFFF));
    let largest = f32::from_bits(largest);
    let mut inverse = 127.0 / largest;
    let mut scale = largest / 127.0;
    if !inverse.is_finite() {
        (inverse, scale) = (0.0, 0.0);
    }
    if !largest.is_finite() {
        (inverse, scale) = (0.0, f32::NAN);
    }
    // Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    for ((x, byte), word) in x.iter().zip(bytes.iter_mut()).zip(words.iter_mut()) {
        let q = ((x * inverse + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
        *word = q as i16;
        *byte = q as i8;
    }
    for (sum, words) in sums.iter_mut().zip(words.as_chunks::<SUM>().0) {
        *sum = words.iter().sum();
    }
    scale
}
