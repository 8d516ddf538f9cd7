//! Gradients of the parts of a tensor, written where the gradient of the whole will be.

use std::sync::{Mutex, PoisonError};

use crate::{DType, Device, Result, Shape, Tensor};

/// The gradient of a tensor on a GPU that was split along its second axis, made when the first part asks for its place.
/// (Rows of the host's memory would be lent to several parts at once, so there the parts are joined by a copy.)
pub(crate) struct Joined {
    device: Device,
    dtype: DType,
    shape: Shape,
    widths: Vec<usize>,
    whole: Mutex<Option<Tensor>>,
}

/// Where the gradient of an input may be written, as rows of [`Place::stride`] elements: what comes after takes it from
/// there without a copy.
#[derive(Debug)]
pub struct Place(Tensor);

impl Place {
    /// Of the first element, in the memory of the input's GPU. Nobody else reads or writes there until the gradient
    /// has been returned.
    ///
    /// # Errors
    /// None: a place is on a GPU.
    pub fn address(&self) -> Result<u64> {
        self.0.device_address()
    }

    /// Of the input.
    pub fn shape(&self) -> Shape {
        self.0.shape()
    }

    /// Elements from one row to the next.
    pub fn stride(&self) -> usize {
        self.0.strides()[0]
    }

    /// The gradient, once every element of it has been written (or launched to be).
    pub fn filled(self) -> Tensor {
        self.0
    }
}

impl Joined {
    pub(crate) fn new(
        tensor: &Tensor,
        dtype: DType,
        axis: usize,
        widths: &[usize],
    ) -> Option<Self> {
        let fits = tensor.gpu().is_some() && tensor.rank() == 2 && axis == 1;
        fits.then(|| Self {
            device: tensor.device(),
            dtype,
            shape: tensor.shape(),
            widths: widths.to_vec(),
            whole: Mutex::new(None),
        })
    }

    fn part(&self, whole: &Tensor, index: usize) -> Result<Tensor> {
        let start = self.widths[..index].iter().sum();
        whole.narrowed(1, start, self.widths[index])
    }

    /// The place of a part's gradient, if it is of this type.
    pub(super) fn place(&self, index: usize, dtype: DType) -> Result<Option<Place>> {
        if dtype != self.dtype {
            return Ok(None);
        }
        let mut whole = self.whole.lock().unwrap_or_else(PoisonError::into_inner);
        let whole = match &mut *whole {
            Some(whole) => whole,
            none => none.insert(Tensor::scratch_on(self.device, self.dtype, self.shape)?),
        };
        Ok(Some(Place(self.part(whole, index)?)))
    }

    /// The gradient of the whole, if any part asked for its place; those that are elsewhere are copied there.
    pub(crate) fn take(&self, parts: &[Option<Tensor>]) -> Result<Option<Tensor>> {
        let whole = self.whole.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(whole) = whole else { return Ok(None) };
        for (index, part) in parts.iter().enumerate() {
            let place = self.part(&whole, index)?;
            match part {
                Some(part) if part.is_same(&place) => {}
                Some(part) => place.fill_place(part)?,
                None => {
                    place.fill_place(&Tensor::zeros_on(self.device, self.dtype, place.shape())?)?;
                }
            }
        }
        Ok(Some(whole))
    }
}
