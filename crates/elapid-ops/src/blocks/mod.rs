//! How weights lie in memory: plain floats, and blocks of few-bit integers that share a scale.
//!
//! The block layouts are those of llama.cpp's GGUF files, little endian, so a tensor of such a file is used where
//! it is mapped. A row of a matrix `[rows, columns]` is a whole number of blocks; rows follow each other without
//! padding. This module owns the layouts, the exact meaning of a block ([`dequantize`]) and the choice of the
//! integers ([`quantize`]); products over these bytes live with their kernels and are tested against this
//! definition.
//!
//! | encoding | elements | bytes | value of an element |
//! |---|---|---|---|
//! | `q8_0` | 32 | 34 | `d q`, q in -128..=127 |
//! | `q4_0` | 32 | 18 | `d (q - 8)`, q in 0..=15 |
//! | `q4_k` | 256 | 144 | `d s q - m t`: q in 0..=15, six-bit s and t for each 32 elements |
//! | `q6_k` | 256 | 210 | `d s (q - 32)`: q in 0..=63, eight-bit s for each 16 elements |

mod fit;
pub mod q4_0;
pub mod q4_k;
pub mod q6_k;
pub mod q8_0;
#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;

use elapid_tensor::{Error, Result};
use half::{bf16, f16};
use rayon::prelude::*;

/// Elements that one task converts; a multiple of every block length.
const TASK: usize = 1 << 14;

/// The layout of a stored matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
pub enum Encoding {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    BF16,
    /// 32 signed bytes and a scale ([`q8_0`]).
    Q8_0,
    /// 32 four-bit integers and a scale ([`q4_0`]).
    Q4_0,
    /// 256 four-bit integers, eight scales and offsets ([`q4_k`]).
    Q4_K,
    /// 256 six-bit integers, sixteen scales ([`q6_k`]).
    Q6_K,
}

impl Encoding {
    /// Every encoding.
    pub const ALL: [Encoding; 7] = [
        Encoding::F32,
        Encoding::F16,
        Encoding::BF16,
        Encoding::Q8_0,
        Encoding::Q4_0,
        Encoding::Q4_K,
        Encoding::Q6_K,
    ];

    /// The lower-case name: `f32`, `q4_k`, ...
    pub const fn name(self) -> &'static str {
        match self {
            Encoding::F32 => "f32",
            Encoding::F16 => "f16",
            Encoding::BF16 => "bf16",
            Encoding::Q8_0 => "q8_0",
            Encoding::Q4_0 => "q4_0",
            Encoding::Q4_K => "q4_k",
            Encoding::Q6_K => "q6_k",
        }
    }

    /// Elements of one block; 1 for plain floats.
    pub const fn block_len(self) -> usize {
        match self {
            Encoding::F32 | Encoding::F16 | Encoding::BF16 => 1,
            Encoding::Q8_0 => q8_0::LEN,
            Encoding::Q4_0 => q4_0::LEN,
            Encoding::Q4_K => q4_k::LEN,
            Encoding::Q6_K => q6_k::LEN,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Encoding::F32 => 4,
            Encoding::F16 | Encoding::BF16 => 2,
            Encoding::Q8_0 => q8_0::BYTES,
            Encoding::Q4_0 => q4_0::BYTES,
            Encoding::Q4_K => q4_k::BYTES,
            Encoding::Q6_K => q6_k::BYTES,
        }
    }

    /// True for blocks of integers, false for plain floats.
    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// True if rows of `columns` elements are whole blocks.
    pub const fn divides(self, columns: usize) -> bool {
        columns.is_multiple_of(self.block_len())
    }

    /// Bytes of a row of `columns` elements.
    ///
    /// # Errors
    /// If `columns` is not a whole number of blocks, or the size overflows.
    pub fn row_bytes(self, columns: usize) -> Result<usize> {
        if !self.divides(columns) {
            return Err(Error::argument(
                self.name(),
                format!(
                    "a row has {columns} elements, expected a multiple of {}",
                    self.block_len()
                ),
            ));
        }
        (columns / self.block_len()).checked_mul(self.block_bytes()).ok_or_else(|| {
            Error::argument(
                self.name(),
                format!("a row of {columns} elements is larger than memory"),
            )
        })
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Encoding {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let lower = text.to_ascii_lowercase();
        Encoding::ALL.into_iter().find(|encoding| encoding.name() == lower).ok_or_else(|| {
            Error::argument(
                "encoding",
                format!(
                    "unknown name {text:?}, expected one of f32, f16, bf16, q8_0, q4_0, q4_k, q6_k"
                ),
            )
        })
    }
}

/// The bytes of rows of `columns` elements each. Plain floats are rounded to nearest, ties to even.
///
/// The bits depend on the values alone, not on threads.
///
/// # Errors
/// As [`quantize_into`].
pub fn quantize(encoding: Encoding, columns: usize, rows: &[f32]) -> Result<Vec<u8>> {
    let row_bytes = encoding.row_bytes(columns)?;
    let count = rows.len().checked_div(columns).unwrap_or(0);
    let mut bytes = vec![0; count * row_bytes];
    quantize_into(encoding, columns, rows, &mut bytes)?;
    Ok(bytes)
}

/// Writes the bytes of rows of `columns` elements each to `out`.
///
/// # Errors
/// If `rows` is not whole rows, a row not whole blocks, or `out` has another size than these rows need; for
/// blocks of integers if a value is not finite or too large for the block's scale, for `f16` if a finite value
/// is too large.
pub fn quantize_into(
    encoding: Encoding,
    columns: usize,
    rows: &[f32],
    out: &mut [u8],
) -> Result<()> {
    let row_bytes = encoding.row_bytes(columns)?;
    let count = rows.len().checked_div(columns).unwrap_or(0);
    if count * columns != rows.len() {
        return Err(Error::argument(
            encoding.name(),
            format!("{} elements are not whole rows of {columns}", rows.len()),
        ));
    }
    if out.len() != count * row_bytes {
        return Err(Error::argument(
            encoding.name(),
            format!(
                "{} bytes for {count} rows of {columns}, expected {}",
                out.len(),
                count * row_bytes
            ),
        ));
    }
    let task_bytes = TASK / encoding.block_len() * encoding.block_bytes();
    rows.par_chunks(TASK)
        .zip(out.par_chunks_mut(task_bytes))
        .enumerate()
        .try_for_each(|(task, (x, out))| quantize_task(encoding, x, out, task * TASK))
}

/// The values that `bytes` stand for: the definition of every encoding.
///
/// # Errors
/// If `out` is not whole blocks, or `bytes` has another size than `out` needs.
pub fn dequantize(encoding: Encoding, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    let needed = encoding.row_bytes(out.len())?;
    if bytes.len() != needed {
        return Err(Error::argument(
            encoding.name(),
            format!("{} bytes for {} elements, expected {needed}", bytes.len(), out.len()),
        ));
    }
    if out.len() <= TASK {
        // A row for a thread that has no part in the pool must not wait for it.
        dequantize_task(encoding, bytes, out);
        return Ok(());
    }
    let task_bytes = TASK / encoding.block_len() * encoding.block_bytes();
    bytes
        .par_chunks(task_bytes)
        .zip(out.par_chunks_mut(TASK))
        .for_each(|(bytes, out)| dequantize_task(encoding, bytes, out));
    Ok(())
}

/// True if all values that `bytes`, whole blocks, stand for are finite: from their exponents and the blocks' scales
/// alone, several times as fast as making the values.
pub fn are_finite(encoding: Encoding, bytes: &[u8]) -> bool {
    const HALF: u16 = 0x7c00;
    /// Of whole runs of N bytes: whether the exponent at any of `at` is all ones.
    fn any_full<const N: usize>(bytes: &[u8], at: &[usize], exponent: u16) -> bool {
        let full = |run: &[u8; N], at: usize| {
            u16::from_le_bytes([run[at], run[at + 1]]) & exponent == exponent
        };
        let (runs, _) = bytes.as_chunks::<N>();
        // Without an early end, so that it becomes vector code.
        runs.iter().fold(false, |any, run| at.iter().fold(any, |any, &at| any | full(run, at)))
    }
    !match encoding {
        Encoding::F32 => any_full::<4>(bytes, &[2], 0x7f80),
        Encoding::BF16 => any_full::<2>(bytes, &[0], 0x7f80),
        Encoding::F16 => any_full::<2>(bytes, &[0], HALF),
        Encoding::Q8_0 => any_full::<{ q8_0::BYTES }>(bytes, &[0], HALF),
        Encoding::Q4_0 => any_full::<{ q4_0::BYTES }>(bytes, &[0], HALF),
        Encoding::Q4_K => any_full::<{ q4_k::BYTES }>(bytes, &[0, 2], HALF),
        Encoding::Q6_K => any_full::<{ q6_k::BYTES }>(bytes, &[q6_k::SCALE], HALF),
    }
}

fn quantize_task(encoding: Encoding, x: &[f32], out: &mut [u8], first: usize) -> Result<()> {
    match encoding {
        Encoding::F32 => {
            for (value, bytes) in x.iter().zip(out.as_chunks_mut::<4>().0) {
                *bytes = value.to_le_bytes();
            }
            Ok(())
        }
        Encoding::BF16 => {
            for (value, bytes) in x.iter().zip(out.as_chunks_mut::<2>().0) {
                *bytes = bf16::from_f32(*value).to_le_bytes();
            }
            Ok(())
        }
        Encoding::F16 => {
            for (i, (value, bytes)) in x.iter().zip(out.as_chunks_mut::<2>().0).enumerate() {
                let rounded = f16::from_f32(*value);
                if rounded.is_infinite() && value.is_finite() {
                    return Err(too_large(encoding, first + i, *value));
                }
                *bytes = rounded.to_le_bytes();
            }
            Ok(())
        }
        Encoding::Q8_0 => quantize_blocks(encoding, x, out, first, q8_0::quantize),
        Encoding::Q4_0 => quantize_blocks(encoding, x, out, first, q4_0::quantize),
        Encoding::Q4_K => quantize_blocks(encoding, x, out, first, q4_k::quantize),
        Encoding::Q6_K => quantize_blocks(encoding, x, out, first, q6_k::quantize),
    }
}

fn quantize_blocks<const LEN: usize, const BYTES: usize>(
    encoding: Encoding,
    x: &[f32],
    out: &mut [u8],
    first: usize,
    block: fn(&[f32; LEN]) -> Option<[u8; BYTES]>,
) -> Result<()> {
    for (b, (x, out)) in
        x.as_chunks::<LEN>().0.iter().zip(out.as_chunks_mut::<BYTES>().0).enumerate()
    {
        let at = first + b * LEN;
        if let Some(i) = x.iter().position(|value| !value.is_finite()) {
            return Err(Error::argument(
                encoding.name(),
                format!("element {} is {}, expected a finite number", at + i, x[i]),
            ));
        }
        *out = block(x).ok_or_else(|| {
            let largest = (0..LEN).max_by(|&i, &j| x[i].abs().total_cmp(&x[j].abs())).unwrap_or(0);
            too_large(encoding, at + largest, x[largest])
        })?;
    }
    Ok(())
}

fn too_large(encoding: Encoding, index: usize, value: f32) -> Error {
    Error::argument(
        encoding.name(),
        format!("element {index} is {value}, too large for this encoding"),
    )
}

fn dequantize_task(encoding: Encoding, bytes: &[u8], out: &mut [f32]) {
    match encoding {
        Encoding::F32 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        Encoding::BF16 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = bf16::from_le_bytes(*bytes).to_f32();
            }
        }
        Encoding::F16 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = f16::from_le_bytes(*bytes).to_f32();
            }
        }
        Encoding::Q8_0 => dequantize_blocks(bytes, out, q8_0::dequantize),
        Encoding::Q4_0 => dequantize_blocks(bytes, out, q4_0::dequantize),
        Encoding::Q4_K => dequantize_blocks(bytes, out, q4_k::dequantize),
        Encoding::Q6_K => dequantize_blocks(bytes, out, q6_k::dequantize),
    }
}

fn dequantize_blocks<const LEN: usize, const BYTES: usize>(
    bytes: &[u8],
    out: &mut [f32],
    block: fn(&[u8; BYTES]) -> [f32; LEN],
) {
    for (out, bytes) in out.as_chunks_mut::<LEN>().0.iter_mut().zip(bytes.as_chunks::<BYTES>().0) {
        *out = block(bytes);
    }
}

/// The half-precision number at `at`.
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// A scale as it is stored, unless it is too large for half precision.
fn to_half(scale: f32) -> Option<f16> {
    Some(f16::from_f32(scale)).filter(|scale| scale.is_finite())
}
