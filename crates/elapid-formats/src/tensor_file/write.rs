//! Writing: one tensor after the other, converted in small pieces.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use elapid_tensor::{DType, Device, Tensor, bf16, f16};
use serde_json::{Map, Value, json};

use crate::outgoing::Outgoing;
use crate::{Result, atomic};

/// Text values in the header.
pub(crate) type Metadata = BTreeMap<String, String>;

/// One tensor to be written.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Its name in the file.
    pub name: String,
    /// Its shape in the file; as many elements as the tensor.
    pub shape: Vec<usize>,
    /// Its type in the file: the tensor's own, or bf16 or f16 for an f32 tensor.
    pub dtype: DType,
    /// The values.
    pub values: Values,
}

/// Where the values of a tensor come from.
#[derive(Debug)]
pub(crate) enum Values {
    /// A tensor in memory.
    Tensor(Tensor),
    /// A tensor of another file.
    Stored(Outgoing),
}

impl Entry {
    /// A tensor under its own shape and type.
    pub(crate) fn new(name: impl Into<String>, tensor: &Tensor) -> Self {
        Self {
            name: name.into(),
            shape: tensor.shape().to_vec(),
            dtype: tensor.dtype(),
            values: Values::Tensor(tensor.detach()),
        }
    }

    /// A tensor of another file under its name and shape.
    pub(crate) fn stored(from: Outgoing) -> Self {
        Self {
            name: from.name.clone(),
            shape: from.tensor.shape.clone(),
            dtype: from.dtype(),
            values: Values::Stored(from),
        }
    }
}

/// Writes named tensors of any types to a file, atomically.
///
/// # Errors
/// [`crate::Error::Io`]; an old file is then untouched.
pub fn save_tensors<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    metadata: impl IntoIterator<Item = (&'a str, String)>,
) -> Result<()> {
    let entries: Vec<Entry> =
        tensors.into_iter().map(|(name, tensor)| Entry::new(name, tensor)).collect();
    let metadata = metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    atomic::write_file(path, |out| write_tensors(out, &metadata, entries))
}

/// Writes header and data. Wider types come first so that all data is aligned, then names in order.
pub(crate) fn write_tensors(
    out: &mut dyn Write,
    metadata: &Metadata,
    mut entries: Vec<Entry>,
) -> io::Result<()> {
    entries.sort_by(|a, b| b.dtype.size().cmp(&a.dtype.size()).then_with(|| a.name.cmp(&b.name)));
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!(metadata));
    let mut offset = 0;
    for entry in &entries {
        let end = offset + entry.shape.iter().product::<usize>() * entry.dtype.size();
        let dtype = entry.dtype.name().to_ascii_uppercase();
        let info = json!({ "dtype": dtype, "shape": entry.shape, "data_offsets": [offset, end] });
        if header.insert(entry.name.clone(), info).is_some() {
            return Err(io::Error::other(format!("two tensors are named {:?}", entry.name)));
        }
        offset = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for entry in entries {
        write_values(out, &entry)?;
    }
    Ok(())
}

fn write_values(out: &mut dyn Write, entry: &Entry) -> io::Result<()> {
    let tensor = match &entry.values {
        Values::Tensor(tensor) => tensor,
        Values::Stored(from) => return from.pieces(&mut |piece| out.write_all(piece)),
    };
    let (from, to) = (tensor.dtype(), entry.dtype);
    if from == to {
        return tensor_bytes(tensor, |bytes| out.write_all(bytes))?;
    }
    let tensor = tensor.to(Device::Cpu).and_then(|tensor| tensor.contiguous());
    let tensor = tensor.map_err(io::Error::other)?;
    match (from, to) {
        (DType::F32, DType::BF16) => {
            convert(out, &tensor, |value| bf16::from_f32(value).to_le_bytes())
        }
        (DType::F32, DType::F16) => {
            convert(out, &tensor, |value| f16::from_f32(value).to_le_bytes())
        }
        _ => Err(io::Error::other(format!("{}: cannot write {from} as {to}", entry.name))),
    }
}

fn convert(
    out: &mut dyn Write,
    tensor: &Tensor,
    encode: impl Fn(f32) -> [u8; 2],
) -> io::Result<()> {
    let mut piece = Vec::with_capacity(2 << 15);
    for values in tensor.data::<f32>().map_err(io::Error::other)?.chunks(1 << 15) {
        piece.clear();
        piece.extend(values.iter().flat_map(|&value| encode(value)));
        out.write_all(&piece)?;
    }
    Ok(())
}

/// Shows a tensor's elements as little-endian bytes, in order.
pub(crate) fn tensor_bytes<R>(tensor: &Tensor, f: impl FnOnce(&[u8]) -> R) -> io::Result<R> {
    let tensor = tensor.detach().to(Device::Cpu).and_then(|tensor| tensor.contiguous());
    let tensor = tensor.map_err(io::Error::other)?;
    let bytes: Result<&[u8], elapid_tensor::Error> = match tensor.dtype() {
        DType::F32 => tensor.data::<f32>().map(bytemuck::cast_slice),
        DType::BF16 => tensor.data::<bf16>().map(bytemuck::cast_slice),
        DType::F16 => tensor.data::<f16>().map(bytemuck::cast_slice),
        DType::F64 => tensor.data::<f64>().map(bytemuck::cast_slice),
        DType::I64 => tensor.data::<i64>().map(bytemuck::cast_slice),
        DType::I32 => tensor.data::<i32>().map(bytemuck::cast_slice),
        DType::U32 => tensor.data::<u32>().map(bytemuck::cast_slice),
        DType::U8 => tensor.data::<u8>(),
    };
    let bytes = bytes.map_err(io::Error::other)?;
    if cfg!(target_endian = "big") {
        let mut swapped = bytes.to_vec();
        swapped.chunks_exact_mut(tensor.dtype().size()).for_each(<[u8]>::reverse);
        return Ok(f(&swapped));
    }
    Ok(f(bytes))
}
