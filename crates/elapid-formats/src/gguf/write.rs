//! Writing: header, then tensors one after the other, each at a multiple of the alignment.

use std::io::{self, Write};

use super::element::ElementType;
use super::read::{ALIGNMENT, MAGIC};
use super::value::{Array, Value};

const VERSION: u32 = 3;

/// A tensor that will be written.
#[derive(Debug, Clone)]
pub struct Planned {
    /// Its name in the file.
    pub name: String,
    /// Extents of the axes, the last running fastest.
    pub shape: Vec<usize>,
    /// The element type.
    pub element: ElementType,
    /// Bytes of all elements.
    pub bytes: u64,
}

/// Writes a file of version 3. `data` writes the bytes of the tensor of that number.
///
/// # Errors
/// Those of `out` and `data`, or if `data` wrote another number of bytes than planned.
pub fn write_gguf(
    out: &mut dyn Write,
    metadata: &[(String, Value)],
    tensors: &[Planned],
    mut data: impl FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let mut header = Vec::new();
    header.extend(MAGIC);
    header.extend(VERSION.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut header, key);
        put_value(&mut header, value);
    }
    let mut offset = 0u64;
    for tensor in tensors {
        put_text(&mut header, &tensor.name);
        header.extend((tensor.shape.len() as u32).to_le_bytes());
        for &extent in tensor.shape.iter().rev() {
            header.extend((extent as u64).to_le_bytes());
        }
        header.extend(tensor.element.number().to_le_bytes());
        header.extend(offset.to_le_bytes());
        offset = (offset + tensor.bytes).next_multiple_of(ALIGNMENT);
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
    out.write_all(&header)?;
    for (number, tensor) in tensors.iter().enumerate() {
        let mut counted = Counted { out: &mut *out, count: 0 };
        data(number, &mut counted)?;
        let count = counted.count;
        if count != tensor.bytes {
            let message =
                format!("{}: {count} bytes written, {} planned", tensor.name, tensor.bytes);
            return Err(io::Error::other(message));
        }
        let padding = count.next_multiple_of(ALIGNMENT) - count;
        out.write_all(&[0; ALIGNMENT as usize][..padding as usize])?;
    }
    Ok(())
}

struct Counted<'a> {
    out: &'a mut dyn Write,
    count: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.count += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    let kind = |out: &mut Vec<u8>, kind: u32| out.extend(kind.to_le_bytes());
    macro_rules! number {
        ($kind:expr, $value:expr) => {{
            kind(out, $kind);
            out.extend($value.to_le_bytes());
        }};
    }
    match value {
        Value::U8(value) => number!(0, value),
        Value::I8(value) => number!(1, value),
        Value::U16(value) => number!(2, value),
        Value::I16(value) => number!(3, value),
        Value::U32(value) => number!(4, value),
        Value::I32(value) => number!(5, value),
        Value::F32(value) => number!(6, value),
        Value::Bool(value) => number!(7, u8::from(*value)),
        Value::Text(text) => {
            kind(out, 8);
            put_text(out, text);
        }
        Value::Array(items) => {
            kind(out, 9);
            put_array(out, items);
        }
        Value::U64(value) => number!(10, value),
        Value::I64(value) => number!(11, value),
        Value::F64(value) => number!(12, value),
    }
}

fn put_array(out: &mut Vec<u8>, items: &Array) {
    let mut head = |kind: u32| {
        out.extend(kind.to_le_bytes());
        out.extend((items.len() as u64).to_le_bytes());
    };
    macro_rules! numbers {
        ($kind:expr, $items:expr) => {{
            head($kind);
            $items.iter().for_each(|item| out.extend(item.to_le_bytes()));
        }};
    }
    match items {
        Array::U8(items) => numbers!(0, items),
        Array::I8(items) => numbers!(1, items),
        Array::U16(items) => numbers!(2, items),
        Array::I16(items) => numbers!(3, items),
        Array::U32(items) => numbers!(4, items),
        Array::I32(items) => numbers!(5, items),
        Array::F32(items) => numbers!(6, items),
        Array::Bool(items) => {
            head(7);
            out.extend(items.iter().map(|&item| u8::from(item)));
        }
        Array::Text(items) => {
            head(8);
            items.iter().for_each(|item| put_text(out, item));
        }
        Array::U64(items) => numbers!(10, items),
        Array::I64(items) => numbers!(11, items),
        Array::F64(items) => numbers!(12, items),
    }
}
