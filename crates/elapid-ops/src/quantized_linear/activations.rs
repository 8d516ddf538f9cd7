//! The inputs of a product: f32 as they are, or rounded to eight bits in blocks.
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

/// Room for the rounded inputs of a product.
#[derive(Debug, Default)]
pub struct Storage {
    block: usize,
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
        let block = block(encoding);
        let integers = if block == 0 { 0 } else { tokens * columns };
        Self {
            block,
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
        Writer {
            block: self.block,
            tokens: self.tokens,
            columns: self.columns,
            bytes: self.bytes.as_mut_ptr(),
            words: self.words.as_mut_ptr(),
            scales: self.scales.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
        }
    }

    /// Rounds the rows `x` [tokens, columns].
    pub(super) fn fill<'a>(&'a mut self, x: &'a [f32]) -> Activations<'a> {
        let (tokens, columns) = (self.tokens, self.columns);
        assert_eq!(x.len(), tokens * columns, "the rows that there is room for");
        let writer = self.writer();
        for unit in 0..writer.units(tokens) {
            // SAFETY: nobody else uses the storage.
            unsafe { writer.write(unit, x, columns) };
        }
        // SAFETY: as above, and all is written.
        unsafe { writer.activations(tokens, x, columns) }
    }
}

/// A [`Storage`] that several threads fill and read in turns.
#[derive(Debug, Clone, Copy)]
pub struct Writer {
    block: usize,
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
    /// True if inputs are rounded at all.
    pub fn rounds(&self) -> bool {
        self.block > 0
    }

    /// Blocks of `tokens` rows, which may be written in any order by any thread; 0 for floats.
    pub fn units(&self, tokens: usize) -> usize {
        (tokens * self.columns).checked_div(self.block).unwrap_or(0)
    }

    /// Rounds block `unit` of rows `x` that are `stride` apart.
    ///
    /// # Panics
    /// If there is no room for the block or `x` ends before it.
    ///
    /// # Safety
    /// The storage must be alive, and no other thread may use this block meanwhile.
    pub unsafe fn write(&self, unit: usize, x: &[f32], stride: usize) {
        let per_row = self.columns / self.block;
        let (token, at) = (unit / per_row, unit % per_row * self.block);
        // SAFETY: the caller's.
        unsafe { self.write_block(unit, &x[token * stride + at..]) };
    }

    /// Rounds the beginning of `x` into block `unit`.
    unsafe fn write_block(&self, unit: usize, x: &[f32]) {
        assert!(unit < self.units(self.tokens), "block {unit}");
        let x = &x[..self.block];
        let first = unit * self.block;
        // SAFETY: the block lies inside the storage, which has whole blocks; the caller vouches for exclusion.
        unsafe {
            let bytes = std::slice::from_raw_parts_mut(self.bytes.add(first), self.block);
            let words = std::slice::from_raw_parts_mut(self.words.add(first), self.block);
            let sums = std::slice::from_raw_parts_mut(self.sums.add(first / SUM), self.block / SUM);
            *self.scales.add(unit) = round(x, bytes, words, sums);
        }
    }

    /// Rounds row `token`; nothing for floats.
    ///
    /// # Panics
    /// If there is no room for the row or `x` is shorter.
    ///
    /// # Safety
    /// As [`Writer::write`], for all blocks of the row.
    pub unsafe fn write_row(&self, token: usize, x: &[f32]) {
        let units = self.units(1);
        for unit in 0..units {
            // SAFETY: the caller's.
            unsafe { self.write_block(token * units + unit, &x[unit * self.block..]) };
        }
    }

    /// The first `tokens` rows, whose values are `x`, `stride` apart.
    ///
    /// # Panics
    /// If there is no room for so many, or `x` ends before them.
    ///
    /// # Safety
    /// The storage must be alive and its blocks written, and not be written while the result is used.
    pub unsafe fn activations<'a>(
        &self,
        tokens: usize,
        x: &'a [f32],
        stride: usize,
    ) -> Activations<'a> {
        assert!(tokens <= self.tokens, "{tokens} rows, room for {}", self.tokens);
        assert!(tokens == 0 || x.len() >= (tokens - 1) * stride + self.columns, "rows of floats");
        Activations {
            block: self.block,
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
    block: usize,
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
        self.block == block(encoding)
    }

    /// The values of token 0, and how far the next is.
    pub(super) fn floats(&self) -> (*const f32, usize) {
        (self.floats, self.stride)
    }

    /// Bytes, words, scales and sums of a token.
    pub(super) fn integers(&self, token: usize) -> Row {
        assert!(token < self.tokens && self.block > 0);
        let first = token * self.columns;
        // SAFETY: the row lies inside the storage.
        unsafe {
            Row {
                bytes: self.bytes.add(first),
                words: self.words.add(first),
                scales: self.scales.add(first / self.block),
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
