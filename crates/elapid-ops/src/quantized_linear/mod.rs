//! Products with a stored weight as it lies in memory: `y[T, rows] = x[T, columns] Wᵀ` for W in any
//! [`Encoding`], without a copy in f32.
//!
//! One definition holds for every number of tokens, so that decoding, batches and prompts agree bit for bit; a
//! row's sum does not depend on T, on threads, or on how rows are shared out.
//!
//! - **Floats** (`dense/`): x stays f32. In blocks of 512 columns, each lane of a vector adds up its terms by fused
//!   multiply-adds in ascending order; the lanes are then added in halves, and the blocks one after the other: the same
//!   bits on every machine with vectors as wide.
//! - **bf16 where the processor has tiles** (`tiles.rs`; AMX on Linux): x is the sum of three bf16 numbers, exactly,
//!   whose products the unit adds up in its own order: the same bits on every machine with tiles.
//! - **Blocks of integers** (`integers.rs`): x is rounded to eight bits under a scale for each 32 (`q8_0`, `q4_0`) or
//!   256 (`q4_k`, `q6_k`) elements ([`Activations`]). The integers of a block are added up exactly, then
//!   `y ← fma(d_w d_x, Σ, y)` block after block: the same bits on every machine that fuses.
//!
//! Few tokens read rows where they lie; many read panels of rows that are unpacked once for all of them.

mod activations;
mod dense;
#[cfg(target_arch = "x86_64")]
mod detected;
mod direct;
#[cfg(target_arch = "x86_64")]
mod direct_x86;
mod integers;
#[cfg(target_arch = "x86_64")]
mod lanes_x86;
mod panel;
#[cfg(target_arch = "x86_64")]
mod panel_x86;
#[cfg(target_arch = "x86_64")]
mod quads;
#[cfg(target_arch = "x86_64")]
mod quads_x86;
mod reference;
#[cfg(test)]
mod tests;
#[cfg(any(test, target_arch = "x86_64"))]
mod tiles;
#[cfg(test)]
mod tiles_emulated;
#[cfg(test)]
mod tiles_tests;
#[cfg(target_arch = "x86_64")]
mod tiles_x86;
mod unpack;

use std::ops::Range;

use elapid_tensor::{Error, Result};
use rayon::prelude::*;

use crate::blocks::Encoding;

use activations::Kind;
pub use activations::{Activations, FEW as FEW_TOKENS, Writer, block as rounding_block};
pub use reference::reference;

/// True if weights of bf16 are multiplied in the tiles of AMX.
pub fn has_tiles() -> bool {
    #[cfg(target_arch = "x86_64")]
    return detected::has_tiles();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Rows are best shared out in multiples of this.
pub const ROW_GROUP: usize = 16;

/// A stored weight [rows, columns].
#[derive(Debug, Clone, Copy)]
pub struct Weight<'a> {
    encoding: Encoding,
    rows: usize,
    columns: usize,
    row_bytes: usize,
    bytes: &'a [u8],
}

impl<'a> Weight<'a> {
    /// The weight [rows, columns] in `bytes`.
    ///
    /// # Errors
    /// If a row is not whole blocks, or `bytes` has another size.
    pub fn new(encoding: Encoding, rows: usize, columns: usize, bytes: &'a [u8]) -> Result<Self> {
        let row_bytes = encoding.row_bytes(columns)?;
        if row_bytes.checked_mul(rows) != Some(bytes.len()) {
            return Err(Error::argument(
                "quantized_linear",
                format!("{} bytes for {rows} rows of {row_bytes} bytes in {encoding}", bytes.len()),
            ));
        }
        Ok(Self { encoding, rows, columns, row_bytes, bytes })
    }

    /// How it is stored.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The bytes of one row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> &'a [u8] {
        &self.bytes[row * self.row_bytes..][..self.row_bytes]
    }
}

/// Where rows of a product go: token t's element of the i-th of them to `pointer[t * stride + i]`.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// The first row of token 0.
    pub pointer: *mut f32,
    /// From token to token.
    pub stride: usize,
}

/// The elements of `rows` of the product of `x` with `weight`, on this thread.
///
/// # Panics
/// If `x` was not made for this encoding and width, or there are no such rows.
///
/// # Safety
/// `out` must hold every token's elements of these rows, and nobody else may use them meanwhile.
pub unsafe fn product(weight: &Weight<'_>, x: &Activations<'_>, rows: Range<usize>, out: Output) {
    assert!(rows.start <= rows.end && rows.end <= weight.rows, "rows {rows:?} of {}", weight.rows);
    assert_eq!(x.columns(), weight.columns, "columns of the input");
    assert!(x.serves(weight.encoding), "the input was made for another encoding");
    if rows.is_empty() || x.tokens() == 0 {
        return;
    }
    // SAFETY: the rows are the weight's, the input has its width and kind; the caller vouches for the output.
    unsafe {
        match x.kind() {
            Kind::Integers(_) => integers::rows(weight, x, rows, out),
            Kind::Floats => dense::rows(weight, x, rows, out),
            #[cfg(target_arch = "x86_64")]
            Kind::Parts => tiles_x86::rows(weight, x, rows, out),
            #[cfg(not(target_arch = "x86_64"))]
            Kind::Parts => unreachable!("no matrix unit"),
        }
    }
}

/// `x Wᵀ`, [T, rows], for `x` [T, columns]; on all threads.
///
/// # Errors
/// If `x` is not whole rows of the weight's width.
pub fn quantized_linear(x: &[f32], weight: &Weight<'_>) -> Result<Vec<f32>> {
    let (rows, columns) = (weight.rows, weight.columns);
    if columns == 0 || !x.len().is_multiple_of(columns) {
        return Err(Error::argument(
            "quantized_linear",
            format!("{} values are not whole rows of {columns}", x.len()),
        ));
    }
    let tokens = x.len() / columns;
    let mut storage = activations::Storage::new(weight.encoding, tokens, columns);
    let activations = storage.fill(x);
    let mut y = vec![0.0; tokens * rows];
    let out = Shared(Output { pointer: y.as_mut_ptr(), stride: rows });
    // Every task lays out the inputs for itself, so there are a few a thread.
    let groups = rows.div_ceil(ROW_GROUP);
    let task = groups.div_ceil(4 * rayon::current_num_threads()) * ROW_GROUP;
    (0..rows.div_ceil(task.max(1))).into_par_iter().for_each(|at| {
        let rows = at * task..rows.min((at + 1) * task);
        // SAFETY: every task writes its own rows of `y`, which has all of them.
        unsafe {
            let Output { pointer, stride } = out.get();
            let pointer = pointer.add(rows.start);
            product(weight, &activations, rows, Output { pointer, stride });
        }
    });
    Ok(y)
}

#[derive(Clone, Copy)]
struct Shared(Output);
// SAFETY: tasks write disjoint elements.
unsafe impl Sync for Shared {}
impl Shared {
    fn get(&self) -> Output {
        self.0
    }
}

pub use activations::Storage;
