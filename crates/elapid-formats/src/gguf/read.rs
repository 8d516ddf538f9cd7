//! Reading: the header validated in full, the data left in the memory map.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::cursor::Cursor;
use super::element::ElementType;
use super::value::Value;
use crate::model_source::Bytes;
use crate::{Error, Result};

/// The first bytes of a GGUF file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Where tensors begin unless the file says otherwise.
pub(super) const ALIGNMENT: u64 = 32;
pub(super) const ALIGNMENT_KEY: &str = "general.alignment";

/// Axes that a tensor can have.
const MAX_AXES: u32 = 4;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name in the file.
    pub name: String,
    /// Extents of the axes, the last running fastest (files list them the other way round).
    pub shape: Vec<usize>,
    /// The element type.
    pub element: ElementType,
    /// Where its bytes are in the file.
    pub range: Range<usize>,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// An open GGUF file, of version 2 or 3.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    bytes: Bytes,
    version: u32,
    metadata: BTreeMap<String, Value>,
    tensors: Vec<TensorInfo>,
}

impl GgufFile {
    /// Opens and validates a file; no weight is read.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Format`] if the file is no GGUF file, is truncated, or its header contradicts
    /// itself.
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_bytes(path, Bytes::map(path)?)
    }

    /// The same for bytes that are there already; `path` is for errors.
    ///
    /// # Errors
    /// [`Error::Format`].
    pub fn from_bytes(path: &Path, bytes: Bytes) -> Result<Self> {
        let (version, metadata, tensors) =
            parse(&bytes).map_err(|message| Error::format(path, message))?;
        Ok(Self { path: path.into(), bytes, version, metadata, tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The version of its layout.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// All metadata.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// The tensors, in the order of the file's list.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// A tensor's bytes, little endian, in order.
    ///
    /// # Errors
    /// If the tensor is not one of this file.
    pub fn bytes(&self, tensor: &TensorInfo) -> Result<Bytes> {
        self.bytes.slice(tensor.range.clone()).ok_or_else(|| {
            Error::format(&self.path, format!("{} lies outside the file", tensor.name))
        })
    }

    /// The architecture's name in files: `mamba`, `mamba2`, `llama`, ...
    ///
    /// # Errors
    /// If there is none.
    pub fn architecture(&self) -> Result<&str> {
        self.text("general.architecture")?.ok_or_else(|| {
            self.error("general.architecture", "the name of an architecture", "no such key")
        })
    }

    /// An [`Error::Config`] for a key.
    pub(super) fn error(&self, key: &str, expected: &str, found: impl ToString) -> Error {
        Error::Config {
            path: self.path.clone(),
            key: key.into(),
            expected: expected.into(),
            found: found.to_string(),
        }
    }

    /// A value of a certain type, if the key is there.
    pub(super) fn value<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| self.error(key, expected, value)),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>> {
        self.value(key, "a text", Value::as_text)
    }
}

type Header = (u32, BTreeMap<String, Value>, Vec<TensorInfo>);

fn parse(file: &[u8]) -> Result<Header, String> {
    let mut cursor = Cursor::new(file);
    if cursor.fixed::<4>()? != MAGIC {
        return Err("not a GGUF file: it does not begin with \"GGUF\"".into());
    }
    let version = cursor.u32()?;
    match version {
        2 | 3 => {}
        _ if version.swap_bytes() <= 3 => {
            return Err("is big endian, which is not supported".into());
        }
        other => return Err(format!("has version {other}, expected 2 or 3")),
    }
    // A tensor has a length, a number of axes, a type and an offset; a value a length, a type and a byte.
    let tensor_count = cursor.count("tensors", 8 + 4 + 4 + 8)?;
    let value_count = cursor.count("metadata values", 8 + 4 + 1)?;
    let mut metadata = BTreeMap::new();
    for _ in 0..value_count {
        let key = cursor.text("a metadata key")?;
        let value = cursor.value(key)?;
        if metadata.insert(key.to_owned(), value).is_some() {
            return Err(format!("has the metadata key {key:?} twice"));
        }
    }
    let alignment = alignment(&metadata)?;
    let mut tensors = Vec::new();
    let mut names = BTreeSet::new();
    for _ in 0..tensor_count {
        let tensor = tensor(&mut cursor, alignment)?;
        if !names.insert(tensor.name.clone()) {
            return Err(format!("has the tensor {:?} twice", tensor.name));
        }
        tensors.push(tensor);
    }
    place(&mut tensors, cursor.position(), file.len(), alignment)?;
    Ok((version, metadata, tensors))
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<usize, String> {
    let Some(value) = metadata.get(ALIGNMENT_KEY) else { return Ok(ALIGNMENT as usize) };
    value
        .as_u64()
        .filter(|alignment| alignment.is_power_of_two() && (8..=1 << 20).contains(alignment))
        .and_then(|alignment| usize::try_from(alignment).ok())
        .ok_or_else(|| {
            format!("{ALIGNMENT_KEY}: expected a power of two from 8 to 1048576, found {value}")
        })
}

/// A tensor whose range still counts from the start of the data.
fn tensor(cursor: &mut Cursor<'_>, alignment: usize) -> Result<TensorInfo, String> {
    let name = cursor.text("a tensor's name")?.to_owned();
    let axes = cursor.u32()?;
    if axes > MAX_AXES {
        return Err(format!("{name:?} has {axes} axes, expected at most {MAX_AXES}"));
    }
    let mut shape = Vec::new();
    for _ in 0..axes {
        let extent = cursor.u64()?;
        match usize::try_from(extent) {
            Ok(extent) if extent > 0 => shape.push(extent),
            _ => return Err(format!("{name:?} has an axis of {extent} elements")),
        }
    }
    shape.reverse();
    let number = cursor.u32()?;
    let element = ElementType::new(number)
        .ok_or_else(|| format!("{name:?} has the unknown element type {number}"))?;
    let (len, size) = element.block();
    let columns = shape.last().copied().unwrap_or(1);
    if !columns.is_multiple_of(len) {
        return Err(format!(
            "{name:?} has rows of {columns}, expected a multiple of {len} for {element}"
        ));
    }
    let bytes = shape
        .iter()
        .try_fold(1usize, |product, &extent| product.checked_mul(extent))
        .and_then(|elements| (elements / len).checked_mul(size))
        .ok_or_else(|| format!("{name:?} has shape {shape:?}, larger than memory"))?;
    let offset = cursor.u64()?;
    let start =
        usize::try_from(offset).ok().filter(|start| start.is_multiple_of(alignment)).ok_or_else(
            || format!("{name:?} begins at {offset}, expected a multiple of {alignment}"),
        )?;
    let end = start
        .checked_add(bytes)
        .ok_or_else(|| format!("{name:?} ends behind any file: {bytes} bytes at {start}"))?;
    Ok(TensorInfo { name, shape, element, range: start..end })
}

/// Makes ranges count from the start of the file; they must lie in it and not touch each other.
fn place(
    tensors: &mut [TensorInfo],
    header: usize,
    file: usize,
    alignment: usize,
) -> Result<(), String> {
    let data = header.next_multiple_of(alignment);
    for tensor in tensors.iter_mut() {
        let end =
            tensor.range.end.checked_add(data).filter(|&end| end <= file).ok_or_else(|| {
                format!(
                    "truncated: {:?} should end {} bytes behind the header, the file has {}",
                    tensor.name,
                    tensor.range.end,
                    file.saturating_sub(data)
                )
            })?;
        tensor.range = tensor.range.start + data..end;
    }
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|tensor| tensor.range.start);
    for pair in order.windows(2) {
        if pair[0].range.end > pair[1].range.start {
            return Err(format!("{:?} and {:?} overlap", pair[0].name, pair[1].name));
        }
    }
    Ok(())
}
