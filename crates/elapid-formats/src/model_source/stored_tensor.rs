//! One tensor of a model file: how its elements are written, its shape, its bytes.

use std::ops::Range;

use elapid_ops::blocks::{Encoding, dequantize};

use super::Bytes;
use crate::Result;

/// Elements converted at a time when values are only looked at.
const PIECE: usize = 1 << 12;

/// A tensor as it lies in a file. The shape is that of the Hugging Face layout (convolution taps [E, 1, W]).
#[derive(Debug, Clone)]
pub struct StoredTensor {
    /// How the elements are written.
    pub encoding: Encoding,
    /// Extents of the axes; the last is a whole number of blocks.
    pub shape: Vec<usize>,
    /// The rows, one after the other, little endian.
    pub bytes: Bytes,
    /// The file's own name of the element type where it is another than the encoding's.
    file_type: Option<&'static str>,
}

impl StoredTensor {
    /// A tensor whose bytes are as many as its shape says.
    ///
    /// # Errors
    /// What does not fit, as a sentence without the tensor's name.
    pub fn new(encoding: Encoding, shape: Vec<usize>, bytes: Bytes) -> Result<Self, String> {
        let expected = byte_len(encoding, &shape)?;
        if bytes.len() != expected {
            return Err(format!(
                "shape {shape:?} as {encoding} has {expected} bytes, found {}",
                bytes.len()
            ));
        }
        Ok(Self { encoding, shape, bytes, file_type: None })
    }

    /// The same, with the name that the file has for its elements (`F64` for values that are given as f32).
    pub fn with_file_type(self, name: &'static str) -> Self {
        Self { file_type: Some(name), ..self }
    }

    /// The element type in the file: `F32`, `BF16`, `F64`, `Q4_K`, ...
    pub fn type_name(&self) -> String {
        self.file_type.map_or_else(|| self.encoding.name().to_uppercase(), str::to_owned)
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// All elements as f32, in order.
    ///
    /// # Errors
    /// If `values` has another number of elements.
    pub fn read_f32(&self, values: &mut [f32]) -> Result<()> {
        Ok(dequantize(self.encoding, &self.bytes, values)?)
    }

    /// Some elements as f32.
    ///
    /// # Errors
    /// If they are not all there.
    pub fn read_part(&self, range: Range<usize>) -> Result<Vec<f32>> {
        let (len, size) = (self.encoding.block_len(), self.encoding.block_bytes());
        let (first, end) = (range.start / len, range.end.div_ceil(len));
        let bytes = self.bytes.get(first * size..end * size).unwrap_or_default();
        let mut values = vec![0.0; (end - first) * len];
        dequantize(self.encoding, bytes, &mut values)?;
        values.drain(..range.start - first * len);
        values.truncate(range.len());
        Ok(values)
    }

    /// The first element that is infinite or no number, as its position and value. Reads every byte.
    ///
    /// # Errors
    /// If the bytes cannot be read as this encoding.
    pub fn first_not_finite(&self) -> Result<Option<(usize, f32)>> {
        let (len, size) = (self.encoding.block_len(), self.encoding.block_bytes());
        let piece = PIECE / len * len;
        let mut values = vec![0.0; piece];
        for (number, bytes) in self.bytes.chunks(piece / len * size).enumerate() {
            let values = &mut values[..bytes.len() / size * len];
            dequantize(self.encoding, bytes, values)?;
            if let Some(at) = first_not_finite(values) {
                return Ok(Some((number * piece + at, values[at])));
            }
        }
        Ok(None)
    }
}

/// The position of the first value that is infinite or no number.
pub(super) fn first_not_finite(values: &[f32]) -> Option<usize> {
    // Whole pieces are judged at once, so that the usual case runs at the speed of memory.
    let finite = |values: &[f32]| values.iter().fold(true, |all, value| all & value.is_finite());
    let piece = values.chunks(PIECE).position(|piece| !finite(piece))?;
    values[piece * PIECE..].iter().position(|value| !value.is_finite()).map(|at| piece * PIECE + at)
}

/// Bytes of a tensor of that shape; an error if its rows are no whole blocks or memory cannot hold it.
fn byte_len(encoding: Encoding, shape: &[usize]) -> Result<usize, String> {
    let too_large = || format!("shape {shape:?} is larger than memory");
    let (&columns, outer) = match shape.split_last() {
        Some(parts) => parts,
        None => (&1, &[][..]),
    };
    // Extents beside an empty one may not overflow either.
    let product = shape.iter().filter(|&&extent| extent > 0);
    product.copied().try_fold(4usize, usize::checked_mul).ok_or_else(too_large)?;
    let row = encoding.row_bytes(columns).map_err(|error| error.to_string())?;
    outer.iter().copied().try_fold(row, usize::checked_mul).ok_or_else(too_large)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(values: &[f32]) -> StoredTensor {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        StoredTensor::new(Encoding::F32, vec![values.len()], bytes.into()).unwrap()
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let bytes = || Bytes::from(vec![0; 8]);
        assert!(StoredTensor::new(Encoding::F32, vec![2], bytes()).is_ok());
        assert!(StoredTensor::new(Encoding::F32, vec![3], bytes()).unwrap_err().contains("12"));
        for shape in [vec![usize::MAX, 2], vec![0, usize::MAX, usize::MAX], vec![1 << 62]] {
            let error = StoredTensor::new(Encoding::F16, shape, bytes()).unwrap_err();
            assert!(error.contains("memory"), "{error}");
        }
        let error = StoredTensor::new(Encoding::Q8_0, vec![33], bytes()).unwrap_err();
        assert!(error.contains("32"), "{error}");
    }

    #[test]
    fn parts_are_those_of_the_whole() {
        let values: Vec<f32> = (0..512).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
        for encoding in Encoding::ALL {
            let bytes = elapid_ops::blocks::quantize(encoding, 256, &values).unwrap();
            let tensor = StoredTensor::new(encoding, vec![2, 256], bytes.into()).unwrap();
            let mut all = vec![0.0; 512];
            tensor.read_f32(&mut all).unwrap();
            for range in [0..512, 0..0, 3..4, 31..33, 250..300, 512..512] {
                assert_eq!(tensor.read_part(range.clone()).unwrap(), all[range]);
            }
            assert!(tensor.read_part(500..513).is_err());
        }
    }

    #[test]
    fn the_first_value_that_is_not_finite() {
        let mut values = vec![1.0; 3 * PIECE + 5];
        assert_eq!(tensor(&values).first_not_finite().unwrap(), None);
        values[3 * PIECE + 2] = f32::NEG_INFINITY;
        values[3 * PIECE + 4] = f32::NAN;
        let expected = Some((3 * PIECE + 2, f32::NEG_INFINITY));
        assert_eq!(tensor(&values).first_not_finite().unwrap(), expected);
        assert_eq!(first_not_finite(&values), Some(3 * PIECE + 2));
    }
}
