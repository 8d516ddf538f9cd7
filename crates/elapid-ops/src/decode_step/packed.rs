//! Weights in the order in which decode steps read them: made on the card, from f32 or from blocks of Q8_0.

use elapid_tensor::cuda::{DeviceBuffer, DeviceSlice, Gpu, KernelArguments, Launch, Result};

use super::OP;
use super::cuda::rows_module;
use crate::gpu::{linear_blocks, wrong};

/// How a weight is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// bf16, 2 bytes.
    Bf16,
    /// int8 with a half-precision scale for 32 neighbours of a row, 17/16 bytes: the numbers of llama.cpp's Q8_0.
    Q8,
}

impl Encoding {
    /// Bytes of 16 rows by 32 terms.
    pub(super) fn block_bytes(self) -> usize {
        match self {
            Self::Bf16 => 1024,
            Self::Q8 => 544,
        }
    }

    /// The macro of the kernels.
    pub(super) fn quantised(self) -> &'static str {
        match self {
            Self::Bf16 => "0",
            Self::Q8 => "1",
        }
    }
}

impl std::fmt::Display for Encoding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::Q8 => "q8_0",
        })
    }
}

impl std::str::FromStr for Encoding {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "bf16" => Ok(Self::Bf16),
            "q8_0" => Ok(Self::Q8),
            _ => Err(format!("{text:?}: decode steps on a GPU have weights in bf16 or q8_0")),
        }
    }
}

/// A matrix [rows, terms] as it lies in the memory of a GPU before it is packed.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// f32, row by row.
    F32(DeviceSlice<'a, f32>),
    /// Blocks of Q8_0, row by row: 34 bytes for 32 terms.
    Q8_0(DeviceSlice<'a, u8>),
}

/// A packed matrix [rows, terms].
#[derive(Debug)]
pub struct Packed {
    buffer: DeviceBuffer<u8>,
    encoding: Encoding,
    rows: usize,
    first_rows: usize,
    terms: usize,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PackArguments {
    from: u64,
    to: u64,
    rows: i64,
    terms: i64,
    first_rows: i64,
    tiles: i64,
    blocks: i64,
    quantised_source: i32,
}
// SAFETY: the layout of `PackArguments` in rows.cu.
unsafe impl KernelArguments for PackArguments {}

impl Packed {
    /// Packs a matrix of `rows` by `terms`, in two parts of which the second starts at row `first_rows` (all rows: in one
    /// part): a tile of rows belongs to one part.
    ///
    /// # Errors
    /// If the source has another size, or there is no memory.
    pub fn new(
        gpu: &Gpu,
        source: Source<'_>,
        (rows, terms): (usize, usize),
        first_rows: usize,
        encoding: Encoding,
    ) -> Result<Self> {
        let blocks = terms.div_ceil(32);
        let (from, quantised_source) = match source {
            Source::F32(slice) if slice.len() == rows * terms => (slice.address(), 0),
            Source::Q8_0(slice) if terms % 32 == 0 && slice.len() == rows * blocks * 34 => {
                (slice.address(), 1)
            }
            Source::F32(slice) => {
                let message = format!("{} numbers for [{rows}, {terms}]", slice.len());
                return Err(wrong(OP, message));
            }
            Source::Q8_0(slice) => {
                let message = format!("{} bytes of Q8_0 for [{rows}, {terms}]", slice.len());
                return Err(wrong(OP, message));
            }
        };
        if rows == 0 || terms == 0 || first_rows > rows {
            return Err(wrong(OP, format!("[{rows}, {terms}] in parts from row {first_rows} on")));
        }
        let tiles = Self::tiles_of(rows, first_rows);
        let buffer = gpu.scratch::<u8>(tiles * blocks * encoding.block_bytes())?;
        let arguments = PackArguments {
            from,
            to: buffer.address(),
            rows: rows as i64,
            terms: terms as i64,
            first_rows: first_rows as i64,
            tiles: tiles as i64,
            blocks: blocks as i64,
            quantised_source,
        };
        let kernel = rows_module(gpu, encoding)?.kernel("decode_pack")?;
        let launch = Launch::linear(linear_blocks(gpu, (tiles * blocks).div_ceil(8)), 256);
        // SAFETY: the source has that size, and every block of the packed matrix lies in its buffer.
        unsafe { gpu.launch(&kernel, launch, &arguments)? };
        Ok(Self { buffer, encoding, rows, first_rows, terms })
    }

    fn tiles_of(rows: usize, first_rows: usize) -> usize {
        first_rows.div_ceil(16) + (rows - first_rows).div_ceil(16)
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Terms of a row's sum.
    pub fn terms(&self) -> usize {
        self.terms
    }

    /// How it is kept.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Bytes in the memory of the GPU.
    pub fn bytes(&self) -> usize {
        self.buffer.len()
    }

    /// The packed bytes.
    ///
    /// # Errors
    /// If the GPU failed.
    pub fn read(&self) -> Result<Vec<u8>> {
        self.buffer.read()
    }

    pub(super) fn first_rows(&self) -> usize {
        self.first_rows
    }

    /// Tiles of 16 rows.
    pub(super) fn tiles(&self) -> usize {
        Self::tiles_of(self.rows, self.first_rows)
    }

    /// Blocks of 32 terms.
    pub(super) fn blocks(&self) -> usize {
        self.terms.div_ceil(32)
    }

    pub(super) fn address(&self) -> u64 {
        self.buffer.address()
    }
}
