//! Numbers and texts from the front of a file, never past its end, and no larger in memory than there.

use super::value::{Array, Value};

/// What is left of the file, and how far it has been read.
pub(super) struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

/// Bytes that an array's item of the type has at least; none for types that arrays may not have.
fn item_size(kind: u32) -> Option<usize> {
    Some(match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        _ => return None,
    })
}

impl<'a> Cursor<'a> {
    pub(super) fn new(file: &'a [u8]) -> Self {
        Self { file, at: 0 }
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    pub(super) fn left(&self) -> usize {
        self.file.len() - self.at
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let bytes =
            self.file.get(self.at..).and_then(|rest| rest.get(..count)).ok_or_else(|| {
                format!(
                    "truncated: {count} bytes expected at byte {}, {} are left",
                    self.at,
                    self.left()
                )
            })?;
        self.at += count;
        Ok(bytes)
    }

    pub(super) fn fixed<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let bytes = self.take(N)?;
        Ok(std::array::from_fn(|i| bytes[i]))
    }

    pub(super) fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.fixed()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.fixed()?))
    }

    /// A number of items that have at least `size` bytes each.
    pub(super) fn count(&mut self, what: &str, size: usize) -> Result<usize, String> {
        self.count_of(|| what.to_owned(), size)
    }

    fn count_of(&mut self, what: impl Fn() -> String, size: usize) -> Result<usize, String> {
        let count = self.u64()?;
        let most = self.left() / size;
        usize::try_from(count).ok().filter(|&count| count <= most).ok_or_else(|| {
            let what = what();
            format!("absurd number of {what}: {count}, the rest of the file holds {most} at most")
        })
    }

    pub(super) fn text(&mut self, what: &str) -> Result<&'a str, String> {
        let at = self.at;
        let length = self.count_of(|| format!("bytes of {what}"), 1)?;
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes)
            .map_err(|error| format!("{what} at byte {at} is no UTF-8: {error}"))
    }

    /// A value and its type before it.
    pub(super) fn value(&mut self, key: &str) -> Result<Value, String> {
        let kind = self.u32()?;
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.fixed()?)),
            1 => Value::I8(i8::from_le_bytes(self.fixed()?)),
            2 => Value::U16(u16::from_le_bytes(self.fixed()?)),
            3 => Value::I16(i16::from_le_bytes(self.fixed()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.fixed()?)),
            6 => Value::F32(f32::from_le_bytes(self.fixed()?)),
            7 => Value::Bool(self.truth(key)?),
            8 => Value::Text(self.text(&format!("the value of {key:?}"))?.to_owned()),
            9 => Value::Array(self.array(key)?),
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.fixed()?)),
            12 => Value::F64(f64::from_le_bytes(self.fixed()?)),
            other => return Err(format!("{key:?} has the unknown type {other}")),
        })
    }

    fn truth(&mut self, key: &str) -> Result<bool, String> {
        match self.fixed::<1>()?[0] {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(format!("{key:?}: expected 0 or 1 for a truth value, found {other}")),
        }
    }

    fn array(&mut self, key: &str) -> Result<Array, String> {
        let kind = self.u32()?;
        let size = match (kind, item_size(kind)) {
            (9, _) => return Err(format!("{key:?} is an array of arrays, which is not supported")),
            (_, Some(size)) => size,
            (other, None) => {
                return Err(format!("{key:?} is an array of the unknown type {other}"));
            }
        };
        let count = self.count(&format!("items of {key:?}"), size)?;
        Ok(match kind {
            0 => Array::U8(self.take(count)?.to_vec()),
            1 => Array::I8(self.numbers(count, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(count, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(count, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(count, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(count, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(count, f32::from_le_bytes)?),
            7 => Array::Bool((0..count).map(|_| self.truth(key)).collect::<Result<_, _>>()?),
            8 => {
                let what = format!("an item of {key:?}");
                let items = (0..count).map(|_| self.text(&what));
                Array::Text(items.collect::<Result<_, _>>()?)
            }
            10 => Array::U64(self.numbers(count, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(count, i64::from_le_bytes)?),
            _ => Array::F64(self.numbers(count, f64::from_le_bytes)?),
        })
    }

    fn numbers<T, const N: usize>(
        &mut self,
        count: usize,
        number: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, String> {
        let bytes = self.take(count * N)?;
        Ok(bytes.as_chunks::<N>().0.iter().map(|chunk| number(*chunk)).collect())
    }
}
