//! The format before PyTorch 1.6: five pickles (a magic number, a version, the machine's sizes, the object, the
//! keys of the storages), then for every key its number of elements and its bytes.

use std::collections::HashMap;

use super::object::{Object, StorageKind, Value};
use super::unpickle::Pickle;
use crate::Bytes;

/// 0x1950a86a20f9469cfc6c, little endian.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
const VERSION: i64 = 1001;

/// True if a file starts with the magic number, pickled.
pub(crate) fn is_legacy(file: &[u8]) -> bool {
    // Protocol, in newer ones a frame, then the number with its length.
    let start = &file[..file.len().min(32)];
    start.first() == Some(&0x80) && start.windows(MAGIC.len()).any(|window| window == MAGIC)
}

/// The object's pickle, and the bytes of every storage.
pub(super) fn open(file: &Bytes) -> Result<(Pickle<'_>, HashMap<String, Bytes>), String> {
    let mut at = 0;
    let mut next = |what: &str| -> Result<(Pickle<'_>, usize), String> {
        let pickle = Pickle::read(&file[at..]).map_err(|message| format!("{what}: {message}"))?;
        at += pickle.len;
        Ok((pickle, at))
    };
    let (magic, _) = next("magic number")?;
    if magic.long(magic.root) != Some(&MAGIC) {
        return Err("no PyTorch file: another magic number".into());
    }
    let (version, _) = next("version")?;
    if version.root != Value::Int(VERSION) {
        return Err(format!("expected version {VERSION} of the legacy format, found another"));
    }
    let (machine, _) = next("machine")?;
    let little =
        machine.dict(machine.root).into_iter().flatten().find_map(|&(key, value)| {
            (machine.text(key) == Some("little_endian")).then_some(value)
        });
    if little == Some(Value::Bool(false)) {
        return Err("byte order: expected little, found big".into());
    }
    let (object, _) = next("object")?;
    let (keys, mut at) = next("storage keys")?;

    let mut sizes: HashMap<&str, (StorageKind, usize)> = HashMap::new();
    for storage in object.storages() {
        let end = storage.offset.saturating_add(storage.len);
        let known = sizes.entry(&storage.key).or_insert((storage.kind, end));
        if known.0 != storage.kind {
            return Err(format!("storage {:?} has two element types", storage.key));
        }
        known.1 = known.1.max(end);
    }
    let mut storages = HashMap::new();
    let list = keys.list(keys.root).ok_or("storage keys: expected a list")?;
    for &key in list {
        let key = keys.text(key).ok_or("storage keys: expected texts")?;
        let truncated = || format!("truncated: storage {key:?} ends beyond the file");
        let &(kind, len) =
            sizes.get(key).ok_or_else(|| format!("storage {key:?} belongs to no tensor"))?;
        let count =
            file.get(at..).and_then(|rest| rest.first_chunk::<8>()).ok_or_else(truncated)?;
        let count = usize::try_from(u64::from_le_bytes(*count)).map_err(|_| truncated())?;
        if count < len {
            return Err(format!("storage {key:?}: expected {len} elements, found {count}"));
        }
        let start = at + 8;
        let end = count.checked_mul(kind.size()).and_then(|bytes| start.checked_add(bytes));
        let bytes = end.and_then(|end| file.slice(start..end)).ok_or_else(truncated)?;
        at = start + bytes.len();
        if storages.insert(key.to_owned(), bytes).is_some() {
            return Err(format!("storage {key:?} is there twice"));
        }
    }
    Ok((object, storages))
}

impl Pickle<'_> {
    /// Every storage that was built.
    fn storages(&self) -> impl Iterator<Item = &super::object::Storage> {
        self.objects().iter().filter_map(|object| match object {
            Object::Storage(storage) => Some(&**storage),
            _ => None,
        })
    }
}
