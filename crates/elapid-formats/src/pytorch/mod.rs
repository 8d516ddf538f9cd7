//! PyTorch's `.bin`, `.pt` and `.pth` files: a pickled dict of tensors and the bytes of their storages, in a zip
//! archive (since PyTorch 1.6) or one after the other (before).
//!
//! The pickle is run by a machine that knows tensors and plain containers only ([`unpickle`]). Tensors are parts of
//! the memory map where they lie contiguous; shared storages stay shared.

mod legacy;
mod object;
mod unpickle;
mod write;

use std::collections::HashMap;
use std::path::Path;

use self::object::{Object, StorageKind, TensorView, Value};
use self::unpickle::Pickle;
use crate::model_source::{Contents, floats, not_floats};
use crate::strided::View;
use crate::zip::Archive;
use crate::{Bytes, Error, Result, StoredTensor};

pub(crate) use legacy::is_legacy;
pub(crate) use write::{Tensor, write_state_dict};

/// A pickle's share of a zip archive may not be larger: it only names tensors.
const LARGEST_PICKLE: usize = 64 << 20;
/// Tensors that share storages may together have so many times the file's size.
const LARGEST_GROWTH: usize = 4;
/// Where a training checkpoint keeps its state dict.
const WRAPPERS: [&str; 4] = ["state_dict", "model_state_dict", "model", "module"];

/// The pickle of an archive, if it is one of PyTorch.
fn pickle_entry(archive: &Archive) -> Option<usize> {
    archive.entries.iter().position(|entry| {
        entry.name == "data.pkl"
            || entry.name.split_once('/').is_some_and(|(_, name)| name == "data.pkl")
    })
}

/// True if an archive is one of PyTorch.
pub(crate) fn is_archive(archive: &Archive) -> bool {
    pickle_entry(archive).is_some()
}

/// Reads the tensors of a zip archive.
///
/// # Errors
/// That name the entry, the tensor or what the pickle asks for.
pub(crate) fn read_archive(path: &Path, file: &Bytes, mut archive: Archive) -> Result<Contents> {
    let damaged = |message: String| Error::format(path, message);
    let at = pickle_entry(&archive).ok_or_else(|| damaged("has no data.pkl".into()))?;
    let prefix = archive.entries[at].name.trim_end_matches("data.pkl").to_owned();
    let by_name: HashMap<String, usize> =
        archive.entries.iter().enumerate().map(|(i, entry)| (entry.name.clone(), i)).collect();
    if let Some(&order) = by_name.get(&format!("{prefix}byteorder")) {
        let order = archive.unpack(order).map_err(damaged)?;
        if &*order != b"little" {
            let found = String::from_utf8_lossy(&order[..order.len().min(20)]).into_owned();
            return Err(damaged(format!("byte order: expected little, found {found:?}")));
        }
    }
    let text = archive.unpack(at).map_err(damaged)?;
    if text.len() > LARGEST_PICKLE {
        return Err(damaged(format!(
            "data.pkl has {} bytes, at most {LARGEST_PICKLE} are read",
            text.len()
        )));
    }
    let pickle = Pickle::read(&text).map_err(|message| damaged(format!("data.pkl: {message}")))?;
    let mut opened: HashMap<usize, Bytes> = HashMap::new();
    let mut storage = |key: &str| {
        let name = format!("{prefix}data/{key}");
        let index = *by_name.get(&name).ok_or_else(|| format!("has no entry {name:?}"))?;
        match opened.get(&index) {
            Some(bytes) => Ok(bytes.clone()),
            None => Ok(opened.entry(index).or_insert(archive.unpack(index)?).clone()),
        }
    };
    state_dict(path, &pickle, file.len(), &mut storage)
}

/// Reads the tensors of a file of the format before PyTorch 1.6.
///
/// # Errors
/// As [`read_archive`].
pub(crate) fn read_legacy(path: &Path, file: &Bytes) -> Result<Contents> {
    let damaged = |message: String| Error::format(path, message);
    let (pickle, storages) = legacy::open(file).map_err(damaged)?;
    let mut storage =
        |key: &str| storages.get(key).cloned().ok_or_else(|| format!("has no storage {key:?}"));
    state_dict(path, &pickle, file.len(), &mut storage)
}

/// The tensors of the dict that a pickle built.
fn state_dict(
    path: &Path,
    pickle: &Pickle<'_>,
    file_len: usize,
    storage: &mut dyn FnMut(&str) -> Result<Bytes, String>,
) -> Result<Contents> {
    let damaged = |message: String| Error::format(path, message);
    pickle.check_cycles().map_err(damaged)?;
    let Some(mut items) = pickle.dict(pickle.root) else {
        let found = pickle.kind(pickle.root);
        return Err(damaged(format!("expected a dict of tensors, found a {found}")));
    };
    let is_tensor = |value| matches!(pickle.object(value), Some(Object::Tensor(_)));
    if !items.iter().any(|&(_, value)| is_tensor(value)) {
        let wrapped = WRAPPERS.iter().find_map(|wrapper| {
            let found = items.iter().find(|(key, _)| pickle.text(*key) == Some(wrapper))?;
            pickle.dict(found.1)
        });
        items = wrapped.unwrap_or(items);
    }
    let mut tensors: Vec<(String, StoredTensor)> = Vec::new();
    let mut total = 0usize;
    for &(key, value) in items {
        let name = pickle.text(key).ok_or_else(|| {
            damaged(format!("expected names of tensors, found a {} as a key", pickle.kind(key)))
        })?;
        let Some(Object::Tensor(view)) = pickle.object(value) else {
            let found = pickle.kind(value);
            return Err(damaged(format!("{name}: expected a tensor, found a {found}")));
        };
        let StorageKind::Known(dtype) = view.kind else {
            return Err(not_floats(path, name, &view.shape, view.kind.name()));
        };
        let wrong = |message: String| damaged(format!("{name}: {message}"));
        let bytes = view_bytes(view, dtype, storage).map_err(wrong)?;
        total = total.saturating_add(bytes.len());
        if total > LARGEST_GROWTH * file_len {
            return Err(wrong(format!(
                "tensors up to this one have {total} bytes together, the file {file_len}"
            )));
        }
        let tensor = floats(dtype, view.shape.clone(), bytes)
            .ok_or_else(|| not_floats(path, name, &view.shape, &dtype.name().to_uppercase()))?;
        tensors.push((name.to_owned(), tensor.map_err(wrong)?));
    }
    Ok(Contents { tensors, metadata: Default::default(), config: None })
}

/// The elements of a tensor, in order.
fn view_bytes(
    view: &TensorView,
    dtype: elapid_tensor::DType,
    storage: &mut dyn FnMut(&str) -> Result<Bytes, String>,
) -> Result<Bytes, String> {
    let held = &view.storage;
    let all = storage(&held.key)?;
    let size = held.kind.size();
    let range = held
        .offset
        .checked_mul(size)
        .and_then(|start| Some(start..start.checked_add(held.len.checked_mul(size)?)?));
    let bytes = range.and_then(|range| all.slice(range)).ok_or_else(|| {
        format!(
            "storage {:?} should have {} elements of {size} bytes, {} bytes are there",
            held.key,
            held.len,
            all.len()
        )
    })?;
    View { offset: view.offset, shape: view.shape.clone(), strides: view.strides.clone() }
        .of(&bytes, dtype)
}

/// Runs a pickle and looks at what it built, as reading a file does; for tests of the machine alone.
///
/// # Errors
/// What is damaged or refused.
pub fn check_pickle(text: &[u8]) -> Result<(), String> {
    let pickle = Pickle::read(text)?;
    pickle.check_cycles()?;
    match pickle.root {
        Value::Object(_) => Ok(()),
        _ => Err(format!("expected a container, found a {}", pickle.kind(pickle.root))),
    }
}
