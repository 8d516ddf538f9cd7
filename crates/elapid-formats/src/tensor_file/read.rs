//! Reading: the header validated, the data mapped.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use elapid_tensor::{Buffer, DType, Element, MAX_RANK, Tensor, bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::header;
use crate::model_source::Bytes;
use crate::{Error, Result};

/// Opens a file for reading; folders, pipes and devices are refused before they can block.
pub(crate) fn open_regular(path: &Path) -> Result<File> {
    let metadata = fs::metadata(path).map_err(Error::io("open", path))?;
    if metadata.is_dir() {
        return Err(Error::format(path, "expected a file, found a folder"));
    }
    if !metadata.is_file() {
        return Err(Error::format(path, "expected a regular file"));
    }
    File::open(path).map_err(Error::io("open", path))
}

/// Our name of a stored element type; none for those that no tensor of ours has.
fn stored_dtype(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::F32 => DType::F32,
        Dtype::BF16 => DType::BF16,
        Dtype::F16 => DType::F16,
        Dtype::F64 => DType::F64,
        Dtype::I64 => DType::I64,
        Dtype::I32 => DType::I32,
        Dtype::U32 => DType::U32,
        Dtype::U8 => DType::U8,
        _ => return None,
    })
}

/// An open file of named tensors.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    map: Bytes,
    data_start: usize,
    metadata: Metadata,
}

impl TensorFile {
    /// Opens and validates a file.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Format`] if the file is truncated or its header contradicts itself.
    pub fn open(path: &Path) -> Result<Self> {
        Self::of_bytes(path, Bytes::map(path)?)
    }

    /// Validates the bytes of a file; `path` is for errors.
    ///
    /// # Errors
    /// As [`TensorFile::open`].
    pub fn of_bytes(path: &Path, map: Bytes) -> Result<Self> {
        if map.len() < 8 {
            let message =
                format!("truncated: a safetensors file has at least 8 bytes, found {}", map.len());
            return Err(Error::format(path, message));
        }
        let (data_start, metadata) =
            header::parse(&map).map_err(|message| Error::format(path, message))?;
        Ok(Self { path: path.into(), map, data_start, metadata })
    }

    /// True if a header may begin as these bytes do: its length, and a JSON object.
    pub fn may_be(bytes: &[u8]) -> bool {
        bytes.get(8) == Some(&b'{')
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names in the order of the data.
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// True if there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.metadata.info(name).is_some()
    }

    /// A tensor's shape.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.metadata.info(name).map(|info| info.shape.as_slice())
    }

    /// A tensor's element type as the file names it (`F32`, `BF16`, ...).
    pub fn dtype_name(&self, name: &str) -> Option<String> {
        self.metadata.info(name).map(|info| info.dtype.to_string())
    }

    /// A tensor's element type; none also for types that no tensor of ours has.
    pub fn dtype(&self, name: &str) -> Option<DType> {
        self.metadata.info(name).and_then(|info| stored_dtype(info.dtype))
    }

    /// A value of the header's metadata.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// Keys and values of the header's metadata, sorted by key.
    pub fn metadata_entries(&self) -> Vec<(&str, &str)> {
        let mut entries: Vec<(&str, &str)> = self
            .metadata
            .metadata()
            .iter()
            .flatten()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        entries.sort_unstable();
        entries
    }

    /// Bytes of all tensors together.
    pub fn data_len(&self) -> usize {
        self.map.len() - self.data_start
    }

    /// A tensor's bytes, little endian, in order.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let info = self.metadata.info(name).ok_or_else(|| self.missing(name))?;
        let (start, end) = info.data_offsets;
        self.map
            .get(self.data_start..)
            .and_then(|data| data.get(start..end))
            .ok_or_else(|| Error::format(&self.path, format!("{name} lies outside the file")))
    }

    /// A tensor's bytes as a part of the memory map that outlives this.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub(crate) fn stored_bytes(&self, name: &str) -> Result<Bytes> {
        let (start, end) = self.metadata.info(name).ok_or_else(|| self.missing(name))?.data_offsets;
        let shift = |offset: usize| offset.saturating_add(self.data_start);
        self.map
            .slice(shift(start)..shift(end))
            .ok_or_else(|| Error::format(&self.path, format!("{name} lies outside the file")))
    }

    /// A tensor of the type that it is stored as.
    ///
    /// # Errors
    /// If there is none of that name, or its type or number of axes is unknown to us.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let info = self.metadata.info(name).ok_or_else(|| self.missing(name))?;
        let dtype = stored_dtype(info.dtype).ok_or_else(|| {
            let message = format!("{name} has element type {}, which is not supported", info.dtype);
            Error::format(&self.path, message)
        })?;
        let shape = self.checked_shape(name, &info.shape)?;
        let bytes = self.bytes(name)?;
        fn read<T: Element>(bytes: &[u8], shape: &[usize]) -> Result<Tensor> {
            let mut buffer = Buffer::<T>::scratch(bytes.len() / size_of::<T>());
            let target: &mut [u8] = bytemuck::cast_slice_mut(&mut buffer[..]);
            target.copy_from_slice(bytes);
            if cfg!(target_endian = "big") {
                target.chunks_exact_mut(size_of::<T>()).for_each(<[u8]>::reverse);
            }
            Ok(Tensor::from_buffer(buffer, shape)?)
        }
        match dtype {
            DType::F32 => read::<f32>(bytes, shape),
            DType::BF16 => read::<bf16>(bytes, shape),
            DType::F16 => read::<f16>(bytes, shape),
            DType::F64 => read::<f64>(bytes, shape),
            DType::I64 => read::<i64>(bytes, shape),
            DType::I32 => read::<i32>(bytes, shape),
            DType::U32 => read::<u32>(bytes, shape),
            DType::U8 => read::<u8>(bytes, shape),
        }
    }

    /// A shape that a tensor of ours can have: few axes, and no product of extents overflows.
    fn checked_shape<'a>(&self, name: &str, shape: &'a [usize]) -> Result<&'a [usize]> {
        let product = shape.iter().filter(|&&n| n > 0).try_fold(1usize, |a, &b| a.checked_mul(b));
        if shape.len() > MAX_RANK || product.is_none() {
            let message = format!("{name} has shape {shape:?}, which is not supported");
            return Err(Error::format(&self.path, message));
        }
        Ok(shape)
    }

    fn missing(&self, name: &str) -> Error {
        Error::format(&self.path, format!("has no tensor {name:?}"))
    }
}
