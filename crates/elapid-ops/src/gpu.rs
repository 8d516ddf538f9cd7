//! What the launches of GPU kernels share: element types, rows of device memory, sequences in device memory, the
//! reading of small results in tests.

use elapid_tensor::cuda::{DeviceBuffer, DeviceSlice, Gpu, GpuError, Result};
use elapid_tensor::{Element, Sequences, bf16};

/// Element types that kernels are compiled for.
pub trait GpuElement: Element {
    /// Its name in a kernel's text.
    const CUDA: &'static str;
}

impl GpuElement for f32 {
    const CUDA: &'static str = "float";
}

impl GpuElement for bf16 {
    const CUDA: &'static str = "bf16";
}

/// Rows of device memory, `stride` elements apart, the first at element `first`.
#[derive(Debug)]
pub struct Rows<'a, T> {
    slice: DeviceSlice<'a, T>,
    first: usize,
    stride: usize,
}

// Not derived: that would ask for T: Copy, and the elements are only referred to.
impl<T> Clone for Rows<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Rows<'_, T> {}

impl<'a, T: GpuElement> Rows<'a, T> {
    /// Rows that lie end to end.
    pub fn new(slice: impl Into<DeviceSlice<'a, T>>, width: usize) -> Self {
        Self { slice: slice.into(), first: 0, stride: width }
    }

    /// Part of wider rows: those of `stride` elements, from element `first` on.
    pub fn part(slice: impl Into<DeviceSlice<'a, T>>, first: usize, stride: usize) -> Self {
        Self { slice: slice.into(), first, stride }
    }

    /// Elements from one row to the next.
    pub(crate) fn stride(&self) -> i64 {
        self.stride as i64
    }

    /// Address of the first row, after a check that `rows` rows of `width` elements are there.
    pub(crate) fn address(&self, op: &'static str, rows: usize, width: usize) -> Result<u64> {
        let needed = match rows {
            0 => 0,
            rows => self.first + (rows - 1) * self.stride + width,
        };
        if needed > self.slice.len() {
            return Err(wrong(
                op,
                format!("rows reach to {needed}, the buffer to {}", self.slice.len()),
            ));
        }
        Ok(self.slice.address() + (self.first * size_of::<T>()) as u64)
    }
}

/// Address of an array of `len` elements.
pub(crate) fn array<'a, T: Element>(
    op: &'static str,
    name: &str,
    slice: impl Into<DeviceSlice<'a, T>>,
    len: usize,
) -> Result<u64> {
    let slice = slice.into();
    if slice.len() != len {
        return Err(wrong(op, format!("{name} has {} elements, expected {len}", slice.len())));
    }
    Ok(slice.address())
}

/// As [`array`]; a null pointer without one.
pub(crate) fn optional<T: Element>(
    op: &'static str,
    name: &str,
    slice: Option<DeviceSlice<'_, T>>,
    len: usize,
) -> Result<u64> {
    slice.map_or(Ok(0), |slice| array(op, name, slice, len))
}

/// An error about an operation's arguments.
pub(crate) fn wrong(op: &'static str, message: String) -> GpuError {
    GpuError::Kernel { kernel: op.to_owned(), source_name: op, message }
}

/// The sequences of a batch, in device memory.
#[derive(Debug)]
pub struct DeviceSequences {
    table: DeviceBuffer<[i64; 3]>,
    sequences: Sequences,
}

impl DeviceSequences {
    /// Copies the division of a batch to the GPU.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn upload(gpu: &Gpu, sequences: &Sequences) -> Result<Self> {
        // start, len, and slot and continued as two 32-bit numbers, the first in the lower half.
        let rows: Vec<[i64; 3]> = sequences
            .iter()
            .map(|s| {
                let slot = s.slot as i64 | i64::from(s.continued) << 32;
                [s.start as i64, s.len as i64, slot]
            })
            .collect();
        Ok(Self { table: gpu.upload(&rows)?, sequences: sequences.clone() })
    }

    /// The division that was copied.
    pub fn host(&self) -> &Sequences {
        &self.sequences
    }

    pub(crate) fn address(&self) -> u64 {
        self.table.address()
    }
}
