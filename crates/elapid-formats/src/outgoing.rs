//! Tensors on their way into a file: shown piece by piece in the encoding that is wanted, so that neither a
//! model nor a tensor is in memory as a whole. Bits are kept where the encoding stays.

use std::io;

use elapid_ops::blocks::{Encoding, dequantize, quantize_into};
use elapid_tensor::DType;

use crate::{Result, StoredTensor};

/// Elements converted at a time; a multiple of every block.
const PIECE: usize = 1 << 15;

/// A tensor that is to be written as f32, bf16 or f16, or as it is.
#[derive(Debug, Clone)]
pub(crate) struct Outgoing {
    /// The name in the new file.
    pub name: String,
    pub tensor: StoredTensor,
    /// A plain float.
    pub encoding: Encoding,
}

impl Outgoing {
    /// A tensor as `wanted`, or without a wish as it is; blocks of integers then become f32.
    pub(crate) fn new(name: &str, tensor: &StoredTensor, wanted: Option<Encoding>) -> Self {
        let own = if tensor.encoding.is_quantized() { Encoding::F32 } else { tensor.encoding };
        let encoding = wanted.unwrap_or(own);
        Self { name: name.to_owned(), tensor: tensor.clone(), encoding }
    }

    /// The element type in the new file.
    pub(crate) fn dtype(&self) -> DType {
        match self.encoding {
            Encoding::BF16 => DType::BF16,
            Encoding::F16 => DType::F16,
            _ => DType::F32,
        }
    }

    /// Bytes in the new file.
    pub(crate) fn len(&self) -> usize {
        self.tensor.elements() * self.dtype().size()
    }

    /// Refuses what the new type cannot hold, before anything is written.
    ///
    /// # Errors
    /// If a value is too large for f16.
    pub(crate) fn check(&self) -> Result<()> {
        if self.encoding == Encoding::F16 && self.tensor.encoding != Encoding::F16 {
            let mut failed = None;
            let mut check = |_: &[u8]| Ok(());
            if let Err(error) = self.pieces(&mut check) {
                failed = Some(error);
            }
            if let Some(error) = failed {
                let message = format!("{}: {error}", self.name);
                return Err(elapid_tensor::Error::argument("convert", message).into());
            }
        }
        Ok(())
    }

    /// Shows all bytes, in pieces.
    ///
    /// # Errors
    /// Those of `show`, or if a value does not fit the encoding.
    pub(crate) fn pieces(&self, show: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let from = self.tensor.encoding;
        if from == self.encoding {
            return show(&self.tensor.bytes);
        }
        let step = PIECE / from.block_len() * from.block_bytes();
        let mut values = vec![0.0; PIECE];
        let mut bytes = vec![0; PIECE * self.dtype().size()];
        for piece in self.tensor.bytes.chunks(step) {
            let count = piece.len() / from.block_bytes() * from.block_len();
            let (values, bytes) = (&mut values[..count], &mut bytes[..count * self.dtype().size()]);
            dequantize(from, piece, values).map_err(io::Error::other)?;
            quantize_into(self.encoding, count, values, bytes).map_err(io::Error::other)?;
            show(bytes)?;
        }
        Ok(())
    }
}
