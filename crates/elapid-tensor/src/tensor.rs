//! `Tensor`: a typed, possibly strided view of shared storage, and its place in the autograd graph.

use std::fmt;
use std::sync::Arc;

use crate::autograd::{Identity, Meta};
use crate::cuda::DeviceBlock;
use crate::memory::{Block, Buffer};
use crate::{DType, Device, Element, Error, Result, Shape};

/// What a tensor's bytes are kept in; one variant a device.
#[derive(Debug)]
pub(crate) enum Storage {
    Cpu(Block),
    Cuda(DeviceBlock),
}

/// A typed array of up to six axes. Cloning is cheap and shares the storage; nothing that holds a clone
/// ever sees a change, because [`Tensor::data_mut`] copies storage that is shared.
#[derive(Clone)]
pub struct Tensor {
    pub(crate) storage: Arc<Storage>,
    pub(crate) shape: Shape,
    pub(crate) strides: Shape,
    pub(crate) offset: usize,
    pub(crate) dtype: DType,
    pub(crate) meta: Option<Arc<Meta>>,
}

/// A two-axis reading of a tensor: `rows` rows of `width` neighbouring elements, `stride` apart.
#[derive(Debug, Clone, Copy)]
pub struct RowView<'a, T> {
    /// From the first element of the first row on.
    pub data: &'a [T],
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row.
    pub width: usize,
    /// Elements from one row's first element to the next row's.
    pub stride: usize,
}

impl<'a, T> RowView<'a, T> {
    /// Row `index`.
    #[inline]
    pub fn row(&self, index: usize) -> &'a [T] {
        &self.data[index * self.stride..][..self.width]
    }
}

impl Tensor {
    /// A tensor from a filled buffer, without a copy.
    ///
    /// # Errors
    /// If the shape does not have as many elements as the buffer.
    pub fn from_buffer<T: Element>(buffer: Buffer<T>, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        if shape.elements() != buffer.len() {
            return Err(Error::Shape {
                op: "from_buffer",
                tensor: "buffer".into(),
                expected: format!("{shape} = {} elements", shape.elements()),
                got: Shape::new(&[buffer.len()]),
            });
        }
        Ok(Self {
            storage: Arc::new(Storage::Cpu(buffer.into_block())),
            shape,
            strides: shape.contiguous_strides(),
            offset: 0,
            dtype: T::DTYPE,
            meta: None,
        })
    }

    /// A tensor that holds a copy of `values`.
    pub fn from_slice<T: Element>(values: &[T], shape: impl Into<Shape>) -> Result<Self> {
        Self::from_buffer(Buffer::copy_of(values), shape)
    }

    /// A tensor of one element and no axis.
    pub fn scalar<T: Element>(value: T) -> Self {
        Self::filled(value, [])
    }

    /// A tensor whose elements all are `value`.
    pub fn filled<T: Element>(value: T, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        let mut buffer = Buffer::scratch(shape.elements());
        buffer.fill(value);
        Self {
            storage: Arc::new(Storage::Cpu(buffer.into_block())),
            shape,
            strides: shape.contiguous_strides(),
            offset: 0,
            dtype: T::DTYPE,
            meta: None,
        }
    }

    /// Zeros.
    pub fn zeros<T: Element>(shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        Self {
            storage: Arc::new(Storage::Cpu(Buffer::<T>::zeros(shape.elements()).into_block())),
            shape,
            strides: shape.contiguous_strides(),
            offset: 0,
            dtype: T::DTYPE,
            meta: None,
        }
    }

    /// The extents.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Steps between neighbours along each axis, in elements.
    pub fn strides(&self) -> Shape {
        self.strides
    }

    /// Extent of an axis; 1 for an axis that the tensor does not have.
    pub fn dim(&self, axis: usize) -> usize {
        self.shape.get(axis).copied().unwrap_or(1)
    }

    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.elements()
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the tensor lives.
    pub fn device(&self) -> Device {
        match &*self.storage {
            Storage::Cpu(_) => Device::Cpu,
            Storage::Cuda(block) => Device::Cuda(block.gpu().id()),
        }
    }

    /// True if the elements lie in order without gaps.
    pub fn is_contiguous(&self) -> bool {
        self.elements() == 0 || inner_contiguous(&self.shape, &self.strides, 0)
    }

    /// The elements in order.
    ///
    /// # Errors
    /// If the type is not `T` or the tensor is a view with gaps (see [`Tensor::contiguous`]).
    pub fn data<T: Element>(&self) -> Result<&[T]> {
        if !self.is_contiguous() {
            return Err(Error::argument(
                "data",
                format!("a view of shape {} with strides {} has gaps", self.shape, self.strides),
            ));
        }
        Ok(&self.elements_from_offset::<T>()?[..self.elements()])
    }

    /// The elements from the first one on to the end of the storage, to be read with [`Tensor::strides`].
    ///
    /// # Errors
    /// If the type is not `T`.
    pub fn strided_data<T: Element>(&self) -> Result<&[T]> {
        self.elements_from_offset()
    }

    fn elements_from_offset<T: Element>(&self) -> Result<&[T]> {
        self.expect_dtype("data", "tensor", T::DTYPE)?;
        match &*self.storage {
            Storage::Cpu(block) => {
                let all: &[T] = bytemuck::cast_slice(
                    &block.bytes()[..block.bytes().len() / size_of::<T>() * size_of::<T>()],
                );
                Ok(&all[self.offset.min(all.len())..])
            }
            Storage::Cuda(_) => Err(self.device_error("data", "tensor", Device::Cpu)),
        }
    }

    /// The tensor read as rows along its first axis; the other axes must be contiguous among themselves.
    ///
    /// # Errors
    /// If the type is not `T`, or the inner axes have gaps.
    pub fn row_view<T: Element>(&self) -> Result<RowView<'_, T>> {
        let rows = self.dim(0);
        let width = self.shape.iter().skip(1).product();
        if rows * width > 0 && !inner_contiguous(&self.shape, &self.strides, 1) {
            return Err(Error::argument(
                "row_view",
                format!(
                    "a view of shape {} with strides {} has gaps in a row",
                    self.shape, self.strides
                ),
            ));
        }
        let stride = if self.rank() == 0 { width } else { self.strides[0] };
        Ok(RowView { data: self.elements_from_offset()?, rows, width, stride })
    }

    /// The elements in order, to be changed. Storage that others share is copied first; a view with gaps
    /// becomes contiguous.
    ///
    /// # Errors
    /// If the type is not `T`, or the tensor is the result of a recorded operation.
    pub fn data_mut<T: Element>(&mut self) -> Result<&mut [T]> {
        self.expect_dtype("data_mut", "tensor", T::DTYPE)?;
        if self.meta.as_ref().is_some_and(|meta| meta.node().is_some()) {
            return Err(Error::Graph(
                "the result of a recorded operation cannot be changed".into(),
            ));
        }
        let whole = self.offset == 0 && self.is_contiguous();
        if !whole || Arc::get_mut(&mut self.storage).is_none() {
            let copy = self.detach().copied()?;
            self.storage = copy.storage;
            self.strides = copy.strides;
            self.offset = 0;
        }
        let device = self.device();
        let elements = self.elements();
        match Arc::get_mut(&mut self.storage) {
            Some(Storage::Cpu(block)) => {
                Ok(bytemuck::cast_slice_mut(&mut block.bytes_mut()[..elements * size_of::<T>()]))
            }
            Some(Storage::Cuda(_)) => Err(Error::Device {
                op: "data_mut",
                tensor: "tensor".into(),
                expected: Device::Cpu,
                got: device,
            }),
            None => Err(Error::Graph("the storage is shared".into())),
        }
    }

    /// The elements in order, as a vector; from a GPU, after all work before this call.
    ///
    /// # Errors
    /// If the type is not `T`, or the GPU fails.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        self.expect_dtype("to_vec", "tensor", T::DTYPE)?;
        if self.device() != Device::Cpu {
            return self.detach().to(Device::Cpu)?.to_vec();
        }
        let mut values = Vec::with_capacity(self.elements());
        self.for_each_run(|run: &[T]| values.extend_from_slice(run))?;
        Ok(values)
    }

    /// [`Tensor::to_vec`], as f64.
    ///
    /// # Errors
    /// If the GPU fails.
    pub fn to_f64_vec(&self) -> Result<Vec<f64>> {
        fn convert<T: Element>(tensor: &Tensor) -> Result<Vec<f64>> {
            let mut values = Vec::with_capacity(tensor.elements());
            tensor.for_each_run(|run: &[T]| values.extend(run.iter().map(|v| v.to_f64())))?;
            Ok(values)
        }
        if self.device() != Device::Cpu {
            return self.detach().to(Device::Cpu)?.to_f64_vec();
        }
        crate::views::with_element!(self.dtype, T => convert::<T>(self))
    }

    /// The only element.
    ///
    /// # Errors
    /// If there is not exactly one element, or the type is not `T`.
    pub fn item<T: Element>(&self) -> Result<T> {
        match self.to_vec()?.as_slice() {
            [value] => Ok(*value),
            _ => Err(Error::Shape {
                op: "item",
                tensor: "tensor".into(),
                expected: "one element".into(),
                got: self.shape,
            }),
        }
    }

    /// Calls `f` with each contiguous run of elements, in order.
    pub(crate) fn for_each_run<T: Element>(&self, mut f: impl FnMut(&[T])) -> Result<()> {
        if self.elements() == 0 {
            return Ok(());
        }
        let data = self.elements_from_offset::<T>()?;
        // The longest suffix of axes without gaps is one run.
        let split = (0..=self.rank())
            .find(|&axis| inner_contiguous(&self.shape, &self.strides, axis))
            .unwrap_or(self.rank());
        let run: usize = self.shape[split..].iter().product();
        let mut index = [0usize; crate::MAX_RANK];
        loop {
            let start: usize = (0..split).map(|axis| index[axis] * self.strides[axis]).sum();
            f(&data[start..start + run]);
            let mut axis = split;
            loop {
                if axis == 0 {
                    return Ok(());
                }
                axis -= 1;
                index[axis] += 1;
                if index[axis] < self.shape[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
    }

    /// The same values without a place in the graph.
    pub fn detach(&self) -> Self {
        Self { meta: None, ..self.clone() }
    }

    /// The same values as a leaf of the graph, whose gradient [`crate::autograd::backward`] can return.
    pub fn requires_grad(&self) -> Self {
        Self { meta: Some(Meta::leaf()), ..self.clone() }
    }

    /// True if a gradient can flow to or through this tensor.
    pub fn tracks_grad(&self) -> bool {
        self.meta.is_some()
    }

    /// What tells this tensor from all others in the graph; none for untracked tensors.
    pub(crate) fn identity(&self) -> Option<Identity> {
        self.meta.as_ref().map(|meta| meta.identity())
    }

    /// Checks the shape of an operation's argument.
    ///
    /// # Errors
    /// [`Error::Shape`] that names operation and tensor, if it differs.
    pub fn expect_shape(&self, op: &'static str, tensor: &str, expected: &[usize]) -> Result<()> {
        if *self.shape == *expected {
            return Ok(());
        }
        Err(self.shape_error(op, tensor, format!("{expected:?}")))
    }

    /// Checks the number of axes of an operation's argument; `expected` is the shape in letters.
    pub fn expect_rank(
        &self,
        op: &'static str,
        tensor: &str,
        rank: usize,
        expected: &str,
    ) -> Result<()> {
        if self.rank() == rank {
            return Ok(());
        }
        Err(self.shape_error(op, tensor, expected))
    }

    /// An [`Error::Shape`] about this tensor.
    pub fn shape_error(
        &self,
        op: &'static str,
        tensor: &str,
        expected: impl Into<String>,
    ) -> Error {
        Error::Shape { op, tensor: tensor.into(), expected: expected.into(), got: self.shape }
    }

    /// Checks the element type of an operation's argument.
    pub fn expect_dtype(&self, op: &'static str, tensor: &str, expected: DType) -> Result<()> {
        if self.dtype == expected {
            return Ok(());
        }
        Err(Error::DType { op, tensor: tensor.into(), expected, got: self.dtype })
    }

    /// Checks that an operation's argument lies where the operation runs.
    ///
    /// # Errors
    /// [`Error::Device`] that names both devices, if not.
    pub fn expect_device(&self, op: &'static str, tensor: &str, expected: Device) -> Result<()> {
        if self.device() == expected {
            return Ok(());
        }
        Err(self.device_error(op, tensor, expected))
    }

    fn device_error(&self, op: &'static str, tensor: &str, expected: Device) -> Error {
        Error::Device { op, tensor: tensor.into(), expected, got: self.device() }
    }

    /// An [`Error::Unsupported`] for this tensor's device and type.
    pub fn unsupported(&self, op: &'static str) -> Error {
        Error::Unsupported { op, device: self.device(), dtype: self.dtype }
    }
}

/// True if the axes from `first` on have no gaps among themselves.
pub(crate) fn inner_contiguous(shape: &[usize], strides: &[usize], first: usize) -> bool {
    let mut step = 1;
    for axis in (first..shape.len()).rev() {
        if shape[axis] != 1 && strides[axis] != step {
            return false;
        }
        step *= shape[axis];
    }
    true
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor {}{}", self.dtype, self.shape)?;
        if self.device() != Device::Cpu {
            return write!(f, " on {}", self.device());
        }
        if self.elements() <= 16
            && let Ok(values) = self.to_f64_vec()
        {
            write!(f, " {values:?}")?;
        }
        Ok(())
    }
}
