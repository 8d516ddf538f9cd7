//! What the launches of GPU kernels share: element types, tensors for results, rows of device memory, sequences in
//! device memory.

use std::sync::Arc;

use elapid_tensor::autograd::Place;
use elapid_tensor::cuda::{DeviceBuffer, DeviceSlice, Gpu, GpuError, Result};
use elapid_tensor::{DType, Device, Element, Error, Sequences, Shape, Tensor, bf16};

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

/// Runs an expression with `$T` bound to the element type of a tensor on a GPU.
macro_rules! with_gpu_element {
    ($op:expr, $tensor:expr, $T:ident => $body:expr) => {
        match $tensor.dtype() {
            elapid_tensor::DType::F32 => {
                type $T = f32;
                $body
            }
            elapid_tensor::DType::BF16 => {
                type $T = elapid_tensor::bf16;
                $body
            }
            _ => Err($tensor.unsupported($op)),
        }
    };
}
pub(crate) use with_gpu_element;

/// The name, in a kernel's text, of the type of a tensor's elements.
///
/// # Errors
/// If kernels are not compiled for it.
pub(crate) fn kernel_type(
    op: &'static str,
    tensor: &Tensor,
) -> elapid_tensor::Result<&'static str> {
    with_gpu_element!(op, tensor, T => Ok(T::CUDA))
}

/// A tensor of arbitrary values, f32 or bf16, for a kernel that writes all of them.
///
/// # Errors
/// If there is no memory, or the type is another.
pub(crate) fn scratch_tensor(
    gpu: &Gpu,
    op: &'static str,
    dtype: DType,
    shape: Shape,
) -> elapid_tensor::Result<Tensor> {
    match dtype {
        DType::F32 => Tensor::from_device(gpu.scratch::<f32>(shape.elements())?, shape),
        DType::BF16 => Tensor::from_device(gpu.scratch::<bf16>(shape.elements())?, shape),
        _ => Err(Error::Unsupported { op, device: Device::Cuda(gpu.id()), dtype }),
    }
}

/// Address and row stride of the place of a gradient `[rows, width]`.
///
/// # Errors
/// If the place has another shape.
pub(crate) fn place_of(
    op: &'static str,
    place: &Place,
    rows: usize,
    width: usize,
) -> elapid_tensor::Result<(u64, usize)> {
    if *place.shape() != [rows, width] {
        let found = place.shape();
        let message = format!("the place of a gradient is {found}, expected [{rows}, {width}]");
        return Err(wrong(op, message).into());
    }
    Ok((place.address()?, place.stride()))
}

/// Address and row stride of what a launch writes as `[rows, width]`: a place that was asked for, or a buffer of its own.
///
/// # Errors
/// As [`place_of`].
pub(crate) fn target<T: Element>(
    op: &'static str,
    place: Option<&Place>,
    own: &DeviceBuffer<T>,
    (rows, width): (usize, usize),
) -> elapid_tensor::Result<(u64, i64)> {
    let Some(place) = place else { return Ok((own.address(), width as i64)) };
    let (address, stride) = place_of(op, place, rows, width)?;
    Ok((address, stride as i64))
}

/// A gradient that a launch wrote to its place, or to a buffer of its own.
pub(crate) fn placed<T: Element>(
    place: Option<Place>,
    own: DeviceBuffer<T>,
    shape: Shape,
) -> elapid_tensor::Result<Tensor> {
    place.map_or_else(|| Tensor::from_device(own, shape), |place| Ok(place.filled()))
}

/// Blocks along x for a kernel whose blocks go round until all is done: as many as asked for, up to some for each
/// multiprocessor.
pub(crate) fn linear_blocks(gpu: &Gpu, wanted: usize) -> u32 {
    wanted.min(16 * gpu.multiprocessors()) as u32
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

/// The sizes of a division of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extents {
    /// T.
    pub tokens: usize,
    /// Rows of the state.
    pub slots: usize,
    /// S.
    pub sequences: usize,
    /// Whether a sequence reads its slot.
    pub any_continued: bool,
}

impl From<&Sequences> for Extents {
    fn from(sequences: &Sequences) -> Self {
        Self {
            tokens: sequences.tokens(),
            slots: sequences.slots(),
            sequences: sequences.len(),
            any_continued: sequences.any_continued(),
        }
    }
}

/// The sequences of a batch, in device memory.
#[derive(Debug)]
pub struct DeviceSequences {
    table: DeviceBuffer<[i64; 3]>,
    extents: Extents,
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
        Ok(Self { table: gpu.upload(&rows)?, extents: sequences.into() })
    }

    /// [`DeviceSequences::upload`] on the first call, later what that call made.
    ///
    /// # Errors
    /// As [`DeviceSequences::upload`].
    pub fn of(gpu: &Gpu, sequences: &Sequences) -> elapid_tensor::Result<Arc<Self>> {
        let key = (Device::Cuda(gpu.id()), [0; 4]);
        sequences.kept(key, || Ok(Self::upload(gpu, sequences)?))
    }

    /// The sizes of the division.
    pub fn extents(&self) -> Extents {
        self.extents
    }

    pub(crate) fn address(&self) -> u64 {
        self.table.address()
    }
}

/// The tensor without a place in the graph, copied if anything but its rows lies apart.
pub(crate) fn by_rows(tensor: &Tensor) -> elapid_tensor::Result<Tensor> {
    let tensor = tensor.detach();
    if tensor.has_whole_rows() { Ok(tensor) } else { tensor.contiguous() }
}

/// The rows of a tensor made by [`by_rows`].
pub(crate) fn rows<T: GpuElement>(tensor: &Tensor) -> elapid_tensor::Result<Rows<'_, T>> {
    let stride = tensor.strides().first().copied().unwrap_or(1);
    Ok(Rows::part(tensor.strided_device_slice::<T>()?, 0, stride))
}

/// The tensor without a place in the graph, without gaps.
pub(crate) fn whole(tensor: &Tensor) -> elapid_tensor::Result<Tensor> {
    tensor.detach().contiguous()
}

/// The elements of a tensor made by [`whole`], if there is one.
pub(crate) fn slice_of(
    tensor: &Option<Tensor>,
) -> elapid_tensor::Result<Option<DeviceSlice<'_, f32>>> {
    tensor.as_ref().map(Tensor::device_slice).transpose()
}

/// Checks of an operation's argument on a GPU: where it is, and its type.
pub(crate) fn expect(
    op: &'static str,
    name: &str,
    tensor: &Tensor,
    gpu: &Gpu,
    dtype: DType,
) -> elapid_tensor::Result<()> {
    tensor.expect_device(op, name, Device::Cuda(gpu.id()))?;
    tensor.expect_dtype(op, name, dtype)
}
