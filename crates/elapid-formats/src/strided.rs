//! Views of a buffer with strides, as other programs store transposed or shared tensors, made contiguous.

use elapid_tensor::{DType, MAX_RANK};

use crate::Bytes;

/// Extents and steps, in elements, of a tensor that lies in a larger buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct View {
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

impl View {
    /// The elements of the view as bytes in order: a part of `buffer` where they lie so, else a copy that is
    /// made when it is looked at.
    ///
    /// # Errors
    /// If the view leaves the buffer, or has more elements than the buffer.
    pub(crate) fn of(self, buffer: &Bytes, dtype: DType) -> Result<Bytes, String> {
        let size = dtype.size();
        let held = buffer.len() / size;
        let Self { offset, shape, strides } = &self;
        if shape.len() > MAX_RANK || shape.len() != strides.len() {
            return Err(format!(
                "shape {shape:?} with strides {strides:?} is not supported (at most {MAX_RANK} axes)"
            ));
        }
        let outside = || {
            format!(
                "shape {shape:?} with strides {strides:?} from element {offset} leaves its storage of \
                 {held} elements"
            )
        };
        if shape.contains(&0) {
            return Ok(Vec::new().into());
        }
        let elements = shape.iter().try_fold(1usize, |a, &b| a.checked_mul(b));
        let elements = elements.filter(|&n| n <= held).ok_or_else(outside)?;
        let last = shape.iter().zip(strides).try_fold(*offset, |at, (&extent, &stride)| {
            at.checked_add(stride.checked_mul(extent - 1)?)
        });
        if last.is_none_or(|last| last >= held) {
            return Err(outside());
        }
        if self.is_contiguous() {
            let range = offset * size..(offset + elements) * size;
            return buffer.slice(range).ok_or_else(outside);
        }
        let buffer = buffer.clone();
        Ok(Bytes::computed(elements * size, move || self.copy(&buffer, size, elements)))
    }

    fn is_contiguous(&self) -> bool {
        let mut step = 1;
        self.shape.iter().zip(&self.strides).rev().all(|(&extent, &stride)| {
            let fits = extent == 1 || stride == step;
            step *= extent;
            fits
        })
    }

    fn copy(&self, buffer: &[u8], size: usize, elements: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(elements * size);
        let mut index = [0usize; MAX_RANK];
        let mut at = self.offset;
        for _ in 0..elements {
            bytes.extend_from_slice(&buffer[at * size..(at + 1) * size]);
            for axis in (0..self.shape.len()).rev() {
                index[axis] += 1;
                at += self.strides[axis];
                if index[axis] < self.shape[axis] {
                    break;
                }
                at -= self.strides[axis] * index[axis];
                index[axis] = 0;
            }
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(offset: usize, shape: &[usize], strides: &[usize]) -> View {
        View { offset, shape: shape.into(), strides: strides.into() }
    }

    #[test]
    fn parts_transposes_and_what_leaves_the_buffer() {
        let buffer = Bytes::from((0..12).collect::<Vec<u8>>());
        let read = |view: View| view.of(&buffer, DType::U8).map(|bytes| bytes.to_vec());
        assert_eq!(read(view(2, &[2, 3], &[3, 1])).unwrap(), [2, 3, 4, 5, 6, 7]);
        assert_eq!(
            read(view(0, &[3, 4], &[1, 3])).unwrap(),
            [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
        );
        assert_eq!(read(view(1, &[2, 1, 2], &[6, 99, 2])).unwrap(), [1, 3, 7, 9]);
        assert_eq!(read(view(5, &[], &[])).unwrap(), [5]);
        assert!(read(view(5, &[0, 7], &[1, 1])).unwrap().is_empty());
        let outside = [
            view(12, &[], &[]),
            view(0, &[13], &[1]),
            view(0, &[2, 2], &[usize::MAX, 1]),
            view(usize::MAX, &[2], &[1]),
            view(0, &[5, 5], &[0, 0]),
            view(0, &[1 << 40, 1 << 40], &[0, 0]),
        ];
        for view in outside {
            assert!(read(view).unwrap_err().contains("leaves its storage of 12"));
        }
        assert!(read(view(0, &[1; 7], &[1; 7])).unwrap_err().contains("axes"));
        let part = view(0, &[2, 3], &[3, 1]).of(&buffer, DType::U8).unwrap();
        assert!(part.is_same_place(&buffer.slice(0..6).unwrap()));
    }
}
