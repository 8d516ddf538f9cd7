//! Tensors in the memory of a GPU: moving there and back, copies, and what launches are given of them.

use std::sync::Arc;

use crate::cuda::copy::{self, Layout};
use crate::cuda::{DeviceBlock, DeviceBuffer, DeviceSlice, Gpu};
use crate::tensor::{Storage, inner_contiguous};
use crate::views::with_element;
use crate::{Buffer, DType, Device, Element, Error, Result, Shape, Tensor};

impl Tensor {
    fn from_device_block(block: DeviceBlock, dtype: DType, shape: Shape) -> Self {
        Self {
            storage: Arc::new(Storage::Cuda(block)),
            shape,
            strides: shape.contiguous_strides(),
            offset: 0,
            dtype,
            meta: None,
        }
    }

    /// A tensor from a filled buffer of a GPU, without a copy.
    ///
    /// # Errors
    /// If the shape does not have as many elements as the buffer.
    pub fn from_device<T: Element>(
        buffer: DeviceBuffer<T>,
        shape: impl Into<Shape>,
    ) -> Result<Self> {
        let shape = shape.into();
        if shape.elements() != buffer.len() {
            return Err(Error::Shape {
                op: "from_device",
                tensor: "buffer".into(),
                expected: format!("{shape} = {} elements", shape.elements()),
                got: Shape::new(&[buffer.len()]),
            });
        }
        Ok(Self::from_device_block(buffer.into_block(), T::DTYPE, shape))
    }

    /// Zeros on a device.
    ///
    /// # Errors
    /// If there is no memory for them.
    pub fn zeros_on(device: Device, dtype: DType, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        match device.gpu()? {
            None => Ok(with_element!(dtype, T => Tensor::zeros::<T>(shape))),
            Some(gpu) => {
                let block = gpu.zeroed(shape.elements() * dtype.size())?;
                Ok(Self::from_device_block(block, dtype, shape))
            }
        }
    }

    /// Unwritten memory on a GPU, or zeros on the host.
    pub(crate) fn scratch_on(device: Device, dtype: DType, shape: Shape) -> Result<Self> {
        match device.gpu()? {
            None => Self::zeros_on(device, dtype, shape),
            Some(gpu) => {
                let block = gpu.scratch_block(shape.elements() * dtype.size())?;
                Ok(Self::from_device_block(block, dtype, shape))
            }
        }
    }

    /// Writes values into this view of a storage of which nobody else uses this part.
    pub(crate) fn fill_place(&self, values: &Tensor) -> Result<()> {
        const OP: &str = "split";
        values.expect_shape(OP, "gradient of a part", &self.shape)?;
        values.expect_device(OP, "gradient of a part", self.device())?;
        // SAFETY: a view lies within its storage; the caller alone uses this part of it.
        unsafe { copy::copy(self.device_block()?.gpu(), &values.layout()?, &self.layout()?)? };
        Ok(())
    }

    /// The same values on another device; free if they are there. Their gradient comes back to this one.
    ///
    /// # Errors
    /// If the device cannot be used or is full.
    pub fn to(&self, device: Device) -> Result<Self> {
        let from = self.device();
        if from == device {
            return Ok(self.clone());
        }
        let moved = match (&*self.storage, device.gpu()?) {
            (Storage::Cpu(_), Some(gpu)) => {
                let whole = self.detach().contiguous()?;
                let block = with_element!(self.dtype, T => {
                    gpu.upload(whole.data::<T>()?)?.into_block()
                });
                Self::from_device_block(block, self.dtype, self.shape)
            }
            (Storage::Cuda(_), None) => self.downloaded()?,
            // From one card to another by way of the host.
            (_, _) => self.detach().to(Device::Cpu)?.to(device)?,
        };
        Ok(crate::autograd::record_one("to", &[self], moved, || {
            move |context: &mut crate::autograd::Backward| {
                Ok(vec![context.take_grad(0).map(|grad| grad.to(from)).transpose()?])
            }
        }))
    }

    fn downloaded(&self) -> Result<Self> {
        fn read<T: Element>(tensor: &Tensor) -> Result<Tensor> {
            let mut buffer = Buffer::<T>::scratch(tensor.elements());
            if let Storage::Cuda(block) = &*tensor.storage {
                block.read_into(
                    tensor.offset * size_of::<T>(),
                    bytemuck::cast_slice_mut(&mut buffer[..]),
                )?;
            }
            Tensor::from_buffer(buffer, tensor.shape)
        }
        let whole = self.detach().contiguous()?;
        with_element!(self.dtype, T => read::<T>(&whole))
    }

    /// The values of many tensors on the host, without gradients. Those of a GPU are gathered there, without gaps, and come in
    /// one piece: for small ones that takes a fraction of the time of one transfer for each. They are held twice on the GPU
    /// meanwhile, and the results share one storage, which is there as long as any of them is.
    ///
    /// # Errors
    /// If a GPU fails or is full.
    pub fn all_to_host(tensors: &[Tensor]) -> Result<Vec<Tensor>> {
        // So that elements of every type are aligned.
        const ALIGN: usize = 64;
        let Some(gpu) = tensors.iter().find_map(Tensor::gpu) else {
            return Ok(tensors.iter().map(Tensor::detach).collect());
        };
        let mut bytes = 0;
        let places: Vec<Option<usize>> = tensors
            .iter()
            .map(|tensor| {
                (tensor.device() == Device::Cuda(gpu.id())).then(|| {
                    let place = bytes;
                    bytes += (tensor.elements() * tensor.dtype.size()).next_multiple_of(ALIGN);
                    place
                })
            })
            .collect();
        let block = gpu.scratch_block(bytes)?;
        for (tensor, place) in tensors.iter().zip(&places) {
            let Some(place) = place else { continue };
            let from = tensor.layout()?;
            let address = block.address() + *place as u64;
            // SAFETY: a view lies within its storage; nobody else has the block, in which each tensor has its place.
            unsafe {
                if tensor.is_contiguous() {
                    let bytes = tensor.elements() * tensor.dtype.size();
                    gpu.copy_within(address, from.address, bytes)?;
                } else {
                    let strides = tensor.shape.contiguous_strides();
                    copy::copy(gpu, &from, &Layout { address, strides, ..from })?;
                }
            }
        }
        let mut buffer = Buffer::<u8>::scratch(bytes);
        block.read_into(0, &mut buffer)?;
        let storage = Arc::new(Storage::Cpu(buffer.into_block()));
        let fetched = tensors.iter().zip(places).map(|(tensor, place)| match place {
            None => tensor.detach().to(Device::Cpu),
            Some(place) => Ok(Self {
                storage: storage.clone(),
                shape: tensor.shape,
                strides: tensor.shape.contiguous_strides(),
                offset: place / tensor.dtype.size(),
                dtype: tensor.dtype,
                meta: None,
            }),
        });
        fetched.collect()
    }

    /// The GPU that the tensor is on; none for the host.
    pub fn gpu(&self) -> Option<&Gpu> {
        match &*self.storage {
            Storage::Cpu(_) => None,
            Storage::Cuda(block) => Some(block.gpu()),
        }
    }

    fn device_block(&self) -> Result<&DeviceBlock> {
        match &*self.storage {
            Storage::Cuda(block) => Ok(block),
            Storage::Cpu(_) => {
                Err(Error::argument("device_slice", "the tensor is on cpu, expected a GPU"))
            }
        }
    }

    /// The elements in order, in the memory of the GPU.
    ///
    /// # Errors
    /// If the type is not `T`, the tensor is not on a GPU, or is a view with gaps.
    pub fn device_slice<T: Element>(&self) -> Result<DeviceSlice<'_, T>> {
        if !self.is_contiguous() {
            return Err(Error::argument(
                "device_slice",
                format!("a view of shape {} with strides {} has gaps", self.shape, self.strides),
            ));
        }
        Ok(self.strided_device_slice::<T>()?.range(0, self.elements()))
    }

    /// The elements from the first one on to the end of the storage, to be read with [`Tensor::strides`].
    ///
    /// # Errors
    /// If the type is not `T` or the tensor is not on a GPU.
    pub fn strided_device_slice<T: Element>(&self) -> Result<DeviceSlice<'_, T>> {
        self.expect_dtype("device_slice", "tensor", T::DTYPE)?;
        Ok(self.device_block()?.slice(self.offset * size_of::<T>()))
    }

    /// Address of the first element, for kernels that take any type; the other elements lie [`Tensor::strides`] apart.
    ///
    /// # Errors
    /// If the tensor is not on a GPU.
    pub fn device_address(&self) -> Result<u64> {
        let block = self.device_block()?;
        Ok(block.address() + (self.offset * self.dtype.size()) as u64)
    }

    /// Address of the elements in order, to be changed by a launch. Storage that others share is copied first; a view
    /// with gaps becomes contiguous.
    ///
    /// # Errors
    /// If the tensor is not on a GPU, is the result of a recorded operation, or the GPU fails.
    pub fn device_address_mut(&mut self) -> Result<u64> {
        if self.meta.as_ref().is_some_and(|meta| meta.node().is_some()) {
            return Err(Error::Graph(
                "the result of a recorded operation cannot be changed".into(),
            ));
        }
        let whole = self.offset == 0 && self.is_contiguous();
        if !whole || Arc::get_mut(&mut self.storage).is_none() {
            let copy = self.detach().copied_on_gpu(self.dtype)?;
            self.storage = copy.storage;
            self.strides = copy.strides;
            self.offset = 0;
        }
        self.device_address()
    }

    /// Takes over the values of a tensor of the same shape, type and GPU in place.
    ///
    /// # Errors
    /// If those differ, or this tensor's storage is shared or a view.
    pub fn overwrite(&mut self, values: &Tensor) -> Result<()> {
        const OP: &str = "overwrite";
        values.expect_shape(OP, "values", &self.shape)?;
        values.expect_dtype(OP, "values", self.dtype)?;
        values.expect_device(OP, "values", self.device())?;
        let whole = self.offset == 0 && self.is_contiguous();
        if !whole || Arc::get_mut(&mut self.storage).is_none() {
            return Err(Error::argument(OP, "the tensor's storage is shared, or it is a view"));
        }
        let to = self.layout()?;
        // SAFETY: the storage is this tensor's alone, and a view lies within its storage.
        unsafe { copy::copy(self.device_block()?.gpu(), &values.layout()?, &to)? };
        Ok(())
    }

    /// Takes over the values of a tensor of the same type and device into the rows from `start` on, in place if nobody
    /// shares the storage.
    ///
    /// # Errors
    /// If there are no such rows, or the other axes, the type or the device differ.
    pub fn overwrite_rows(&mut self, start: usize, values: &Tensor) -> Result<()> {
        const OP: &str = "overwrite_rows";
        values.expect_dtype(OP, "values", self.dtype)?;
        values.expect_device(OP, "values", self.device())?;
        let rows = values.shape().first().copied().unwrap_or(1);
        let expected: Vec<usize> =
            std::iter::once(rows).chain(self.shape.iter().skip(1).copied()).collect();
        values.expect_shape(OP, "values", &expected)?;
        self.narrowed(0, start, rows)?;
        if self.device() == Device::Cpu {
            let values = values.contiguous()?;
            let width: usize = self.shape.iter().skip(1).product();
            with_element!(self.dtype, T => {
                let own = &mut self.data_mut::<T>()?[start * width..][..rows * width];
                own.copy_from_slice(values.data::<T>()?);
            });
            return Ok(());
        }
        // Makes the storage this tensor's alone.
        self.device_address_mut()?;
        let place = self.narrowed(0, start, rows)?;
        // SAFETY: the storage was this tensor's alone, and the rows lie within it.
        unsafe { copy::copy(self.device_block()?.gpu(), &values.layout()?, &place.layout()?)? };
        Ok(())
    }

    /// How many tensors share this one's storage, itself counted.
    pub fn holders(&self) -> usize {
        Arc::strong_count(&self.storage)
    }

    /// True if both are the same view of the same storage.
    pub fn is_same(&self, other: &Tensor) -> bool {
        Arc::ptr_eq(&self.storage, &other.storage)
            && (self.offset, self.shape, self.strides) == (other.offset, other.shape, other.strides)
    }

    /// True if the axes after the first lie without gaps among themselves, so that the tensor can be read by rows.
    pub fn has_whole_rows(&self) -> bool {
        self.elements() == 0 || inner_contiguous(&self.shape, &self.strides, 1)
    }

    fn layout(&self) -> Result<Layout> {
        Ok(Layout {
            address: self.device_address()?,
            dtype: self.dtype,
            shape: self.shape,
            strides: self.strides,
        })
    }

    /// A contiguous copy of another type in the same memory, without gradient.
    pub(crate) fn copied_on_gpu(&self, dtype: DType) -> Result<Self> {
        let gpu = self.device_block()?.gpu();
        let block = gpu.scratch_block(self.elements() * dtype.size())?;
        let copy = Self::from_device_block(block, dtype, self.shape);
        // SAFETY: a view lies within its storage, and the copy is new.
        unsafe { copy::copy(gpu, &self.layout()?, &copy.layout()?)? };
        Ok(copy)
    }

    /// Tensors of one GPU, checked to fit, joined along an axis.
    pub(crate) fn concat_on_gpu(
        gpu: &Gpu,
        tensors: &[&Tensor],
        axis: usize,
        shape: Shape,
    ) -> Result<Self> {
        let dtype = tensors.first().map_or(DType::F32, |tensor| tensor.dtype);
        let block = gpu.scratch_block(shape.elements() * dtype.size())?;
        let joined = Self::from_device_block(block, dtype, shape);
        let mut at = 0;
        for tensor in tensors {
            let place = Layout {
                address: joined.device_address()?
                    + (at * joined.strides[axis] * dtype.size()) as u64,
                dtype,
                shape: tensor.shape,
                strides: joined.strides,
            };
            // SAFETY: the parts' extents add up to the joined axis, and nobody else has the joined tensor yet.
            unsafe { copy::copy(gpu, &tensor.layout()?, &place)? };
            at += tensor.shape[axis];
        }
        Ok(joined)
    }

    /// `self += term`, both on one GPU and of one shape.
    pub(crate) fn add_on_gpu(&mut self, term: &Tensor) -> Result<()> {
        let term = term.detach().contiguous()?;
        let address = self.device_address_mut()?;
        let gpu = self.device_block()?.gpu();
        let (sum, term_at) = ((address, self.dtype), (term.device_address()?, term.dtype));
        // SAFETY: both have the same number of elements without gaps, and the sum is this tensor's alone.
        unsafe { copy::add(gpu, sum, term_at, self.elements())? };
        Ok(())
    }
}
