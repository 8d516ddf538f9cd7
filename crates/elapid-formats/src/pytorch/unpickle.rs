//! The stack machine that a pickle is a program of, restricted to what builds tensors and plain containers.
//!
//! Protocols 2 to 5. A name that is not in the short list of [`Global`] is refused when it is asked for, so no
//! code can be called. The machine runs in a loop, never in itself; objects, stack and memo are bounded by the
//! number of bytes that were read, so memory stays within a small multiple of them.

use std::collections::HashMap;
use std::ops::Range;

use super::object::{Global, Object, Storage, StorageKind, TensorView, Value};

/// Objects, stack entries and memo entries that every pickle may have; beyond, one for every eight bytes.
const FREE: usize = 4096;

/// What a pickle built.
pub(super) struct Pickle<'a> {
    text: &'a [u8],
    objects: Vec<Object>,
    pub root: Value,
    /// Bytes read, up to and with the end.
    pub len: usize,
}

impl<'a> Pickle<'a> {
    /// Runs a pickle that starts at the first byte; what follows it is not looked at.
    ///
    /// # Errors
    /// What is damaged or refused, by its name.
    pub(super) fn read(text: &'a [u8]) -> Result<Self, String> {
        let mut machine = Machine::new(text);
        while !machine.step()? {}
        let root = machine.pop()?;
        Ok(Self { text, objects: machine.objects, root, len: machine.at })
    }

    pub(super) fn objects(&self) -> &[Object] {
        &self.objects
    }

    pub(super) fn object(&self, value: Value) -> Option<&Object> {
        match value {
            Value::Object(at) => self.objects.get(at as usize),
            _ => None,
        }
    }

    pub(super) fn text(&self, value: Value) -> Option<&'a str> {
        match self.object(value)? {
            Object::Text(range) => str::from_utf8(&self.text[range.clone()]).ok(),
            _ => None,
        }
    }

    /// The little-endian bytes of a large whole number.
    pub(super) fn long(&self, value: Value) -> Option<&'a [u8]> {
        match self.object(value)? {
            Object::Long(range) => Some(&self.text[range.clone()]),
            _ => None,
        }
    }

    pub(super) fn dict(&self, value: Value) -> Option<&[(Value, Value)]> {
        match self.object(value)? {
            Object::Dict(items) => Some(items),
            _ => None,
        }
    }

    pub(super) fn list(&self, value: Value) -> Option<&[Value]> {
        match self.object(value)? {
            Object::List(items) => Some(items),
            _ => None,
        }
    }

    /// The type of a value as Python names it.
    pub(super) fn kind(&self, value: Value) -> &'static str {
        match value {
            Value::None => "None",
            Value::Bool(_) => "bool",
            Value::Int(_) => "int",
            Value::Float => "float",
            Value::Object(_) => self.object(value).map_or("nothing", Object::kind),
        }
    }

    /// Refuses a container that is part of itself.
    pub(super) fn check_cycles(&self) -> Result<(), String> {
        // 0 not seen, 1 being walked, 2 done.
        let mut seen = vec![0u8; self.objects.len()];
        let mut walk: Vec<(Value, usize)> = vec![(self.root, 0)];
        while let Some((value, child)) = walk.pop() {
            let (Value::Object(at), Some(object)) = (value, self.object(value)) else { continue };
            let mark = &mut seen[at as usize];
            if child == 0 {
                match *mark {
                    2 => continue,
                    1 => return Err(format!("a {} contains itself", object.kind())),
                    _ => *mark = 1,
                }
            }
            let next = match object {
                Object::Tuple(items) => items.get(child).copied(),
                Object::List(items) => items.get(child).copied(),
                Object::Dict(items) => {
                    let pair = items.get(child / 2);
                    pair.map(|pair| if child.is_multiple_of(2) { pair.0 } else { pair.1 })
                }
                _ => None,
            };
            match next {
                None => seen[at as usize] = 2,
                Some(next) => {
                    walk.push((value, child + 1));
                    walk.push((next, 0));
                }
            }
        }
        Ok(())
    }
}

struct Machine<'a> {
    text: &'a [u8],
    at: usize,
    objects: Vec<Object>,
    stack: Vec<Value>,
    /// Heights of the stack where a mark stands.
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
}

impl<'a> Machine<'a> {
    fn new(text: &'a [u8]) -> Self {
        let (objects, stack, marks, memo) = Default::default();
        Self { text, at: 0, objects, stack, marks, memo }
    }

    fn take(&mut self, len: usize) -> Result<Range<usize>, String> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.text.len());
        let end = end.ok_or_else(|| {
            format!(
                "truncated pickle: {len} bytes wanted at byte {}, {} are left",
                self.at,
                self.text.len() - self.at
            )
        })?;
        let range = self.at..end;
        self.at = end;
        Ok(range)
    }

    /// A little-endian number of so many bytes.
    fn number(&mut self, bytes: usize) -> Result<u64, String> {
        let range = self.take(bytes)?;
        Ok(self.text[range].iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn length(&mut self, bytes: usize) -> Result<usize, String> {
        let number = self.number(bytes)?;
        usize::try_from(number).map_err(|_| format!("damaged pickle: a length of {number} bytes"))
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let rest = &self.text[self.at..];
        let end = rest
            .iter()
            .position(|&byte| byte == b'\n')
            .ok_or("truncated pickle: a name has no end")?;
        self.at += end + 1;
        str::from_utf8(&rest[..end]).map_err(|_| "damaged pickle: a name is no text".into())
    }

    fn bound(&self, count: usize, what: &str) -> Result<(), String> {
        if count > FREE + self.at / 8 {
            return Err(format!(
                "refused: the pickle has {count} {what} in its first {} bytes",
                self.at
            ));
        }
        Ok(())
    }

    fn push(&mut self, value: Value) -> Result<(), String> {
        self.stack.push(value);
        self.bound(self.stack.len(), "values on its stack")
    }

    fn make(&mut self, object: Object) -> Result<(), String> {
        self.bound(self.objects.len(), "objects")?;
        let at = u32::try_from(self.objects.len()).map_err(|_| "too many objects")?;
        self.objects.push(object);
        self.push(Value::Object(at))
    }

    fn pop(&mut self) -> Result<Value, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.pop() {
            Some(value) if self.stack.len() >= floor => Ok(value),
            _ => Err("damaged pickle: a value is taken from an empty stack".into()),
        }
    }

    fn top(&self) -> Result<Value, String> {
        self.stack.last().copied().ok_or_else(|| "damaged pickle: the stack is empty".into())
    }

    /// The values above the last mark.
    fn pop_mark(&mut self) -> Result<Vec<Value>, String> {
        let mark = self.marks.pop().ok_or("damaged pickle: no mark on the stack")?;
        if mark > self.stack.len() {
            return Err("damaged pickle: no mark on the stack".into());
        }
        Ok(self.stack.split_off(mark))
    }

    fn pop_many<const N: usize>(&mut self) -> Result<[Value; N], String> {
        let mut values = [Value::None; N];
        for value in values.iter_mut().rev() {
            *value = self.pop()?;
        }
        Ok(values)
    }

    fn object(&self, value: Value) -> Option<&Object> {
        match value {
            Value::Object(at) => self.objects.get(at as usize),
            _ => None,
        }
    }

    fn string(&self, value: Value) -> Option<&'a str> {
        match self.object(value)? {
            Object::Text(range) => str::from_utf8(&self.text[range.clone()]).ok(),
            _ => None,
        }
    }

    fn items(&self, value: Value) -> Option<&[Value]> {
        match self.object(value)? {
            Object::Tuple(items) => Some(items),
            Object::List(items) => Some(items),
            _ => None,
        }
    }

    fn memoize(&mut self, index: u64) -> Result<(), String> {
        let index = u32::try_from(index).map_err(|_| format!("damaged pickle: memo {index}"))?;
        self.memo.insert(index, self.top()?);
        self.bound(self.memo.len(), "entries in its memo")
    }

    fn recall(&mut self, index: u64) -> Result<(), String> {
        let found = u32::try_from(index).ok().and_then(|index| self.memo.get(&index)).copied();
        self.push(found.ok_or_else(|| format!("damaged pickle: nothing is in memo {index}"))?)
    }

    fn make_text(&mut self, len: usize) -> Result<(), String> {
        let range = self.take(len)?;
        if str::from_utf8(&self.text[range.clone()]).is_err() {
            return Err("damaged pickle: a text is not UTF-8".into());
        }
        self.make(Object::Text(range))
    }

    fn make_bytes(&mut self, len: usize) -> Result<(), String> {
        self.take(len)?;
        self.make(Object::Bytes)
    }

    fn make_long(&mut self, len: usize) -> Result<(), String> {
        let range = self.take(len)?;
        let bytes = &self.text[range.clone()];
        if len > 8 {
            return self.make(Object::Long(range));
        }
        let negative = bytes.last().is_some_and(|&byte| byte > 127);
        let start = if negative { -1i64 } else { 0 };
        let value = bytes.iter().rev().fold(start, |value, &byte| value << 8 | i64::from(byte));
        self.push(Value::Int(value))
    }

    fn extend_list(&mut self, items: &[Value]) -> Result<(), String> {
        let list = self.top()?;
        match self.object_mut(list) {
            Some(Object::List(list)) => list.extend_from_slice(items),
            _ => return Err("damaged pickle: items are added to what is no list".into()),
        }
        Ok(())
    }

    fn extend_dict(&mut self, items: &[Value]) -> Result<(), String> {
        let dict = self.top()?;
        let (pairs, rest) = items.as_chunks::<2>();
        match self.object_mut(dict) {
            Some(Object::Dict(dict)) if rest.is_empty() => {
                dict.extend(pairs.iter().map(|&[key, value]| (key, value)));
                Ok(())
            }
            _ => Err("damaged pickle: items are set in what is no dict".into()),
        }
    }

    fn object_mut(&mut self, value: Value) -> Option<&mut Object> {
        match value {
            Value::Object(at) => self.objects.get_mut(at as usize),
            _ => None,
        }
    }

    /// Runs one operation; true at the end.
    fn step(&mut self) -> Result<bool, String> {
        let code = self.take(1)?.start;
        match self.text[code] {
            b'.' => return Ok(true),
            0x80 => match self.number(1)? {
                2..=5 => {}
                found => return Err(format!("pickle protocol 2 to 5 expected, found {found}")),
            },
            // Frames only tell how much to read at once.
            0x95 => {
                self.take(8)?;
            }
            b'(' => {
                self.marks.push(self.stack.len());
                self.bound(self.marks.len(), "marks on its stack")?;
            }
            b'0' => {
                self.pop()?;
            }
            b'1' => drop(self.pop_mark()?),
            b'2' => self.push(self.top()?)?,
            b'N' => self.push(Value::None)?,
            0x88 => self.push(Value::Bool(true))?,
            0x89 => self.push(Value::Bool(false))?,
            b'J' => {
                let value = self.number(4)? as u32 as i32;
                self.push(Value::Int(value.into()))?;
            }
            b'K' => {
                let value = self.number(1)? as i64;
                self.push(Value::Int(value))?;
            }
            b'M' => {
                let value = self.number(2)? as i64;
                self.push(Value::Int(value))?;
            }
            0x8a => {
                let len = self.length(1)?;
                self.make_long(len)?;
            }
            0x8b => {
                let len = self.length(4)?;
                self.make_long(len)?;
            }
            b'G' => {
                self.take(8)?;
                self.push(Value::Float)?;
            }
            code @ (b'U' | 0x8c | b'T' | b'X' | 0x8d) => {
                let len = self.length(match code {
                    b'U' | 0x8c => 1,
                    b'T' | b'X' => 4,
                    _ => 8,
                })?;
                self.make_text(len)?;
            }
            code @ (b'C' | b'B' | 0x8e | 0x96) => {
                let len = self.length(match code {
                    b'C' => 1,
                    b'B' => 4,
                    _ => 8,
                })?;
                self.make_bytes(len)?;
            }
            b')' => self.make(Object::Tuple(Box::new([])))?,
            b't' => {
                let items = self.pop_mark()?;
                self.make(Object::Tuple(items.into()))?;
            }
            0x85 => {
                let items = self.pop_many::<1>()?;
                self.make(Object::Tuple(Box::new(items)))?;
            }
            0x86 => {
                let items = self.pop_many::<2>()?;
                self.make(Object::Tuple(Box::new(items)))?;
            }
            0x87 => {
                let items = self.pop_many::<3>()?;
                self.make(Object::Tuple(Box::new(items)))?;
            }
            b']' => self.make(Object::List(Vec::new()))?,
            b'l' => {
                let items = self.pop_mark()?;
                self.make(Object::List(items))?;
            }
            b'a' => {
                let item = self.pop()?;
                self.extend_list(&[item])?;
            }
            b'e' => {
                let items = self.pop_mark()?;
                self.extend_list(&items)?;
            }
            b'}' => self.make(Object::Dict(Vec::new()))?,
            b'd' => {
                let items = self.pop_mark()?;
                self.make(Object::Dict(Vec::new()))?;
                self.extend_dict(&items)?;
            }
            b's' => {
                let items = self.pop_many::<2>()?;
                self.extend_dict(&items)?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.extend_dict(&items)?;
            }
            b'q' => {
                let index = self.number(1)?;
                self.memoize(index)?;
            }
            b'r' => {
                let index = self.number(4)?;
                self.memoize(index)?;
            }
            0x94 => self.memoize(self.memo.len() as u64)?,
            b'h' => {
                let index = self.number(1)?;
                self.recall(index)?;
            }
            b'j' => {
                let index = self.number(4)?;
                self.recall(index)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)?;
            }
            0x93 => {
                let [module, name] = self.pop_many()?;
                match (self.string(module), self.string(name)) {
                    (Some(module), Some(name)) => self.global(module, name)?,
                    _ => return Err("damaged pickle: a name is no text".into()),
                }
            }
            b'R' => {
                let [function, arguments] = self.pop_many()?;
                self.call(function, arguments)?;
            }
            b'b' => {
                // The attributes of a state dict (`_metadata`) are of no use here.
                let state = self.pop()?;
                let dict = matches!(self.object(self.top()?), Some(Object::Dict(_)));
                if !dict || !matches!(self.object(state), Some(Object::Dict(_))) {
                    let found = self.object(self.top()?).map_or("a scalar", Object::kind);
                    return Err(format!("refused: the pickle sets the state of a {found}"));
                }
            }
            b'Q' => {
                let id = self.pop()?;
                self.storage(id)?;
            }
            b'i' => {
                let (module, name) = (self.line()?, self.line()?);
                return Err(refused(module, name));
            }
            code => return Err(unknown(code)),
        }
        Ok(false)
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), String> {
        let global = Global::find(module, name).ok_or_else(|| refused(module, name))?;
        self.make(Object::Global(global))
    }

    fn call(&mut self, function: Value, arguments: Value) -> Result<(), String> {
        let Some(&Object::Global(global)) = self.object(function) else {
            return Err("refused: the pickle calls what is no name".into());
        };
        let arguments = match self.object(arguments) {
            Some(Object::Tuple(items)) => items.clone(),
            _ => return Err("damaged pickle: the arguments of a call are no tuple".into()),
        };
        let wrong = || format!("damaged pickle: {global:?} with {} arguments", arguments.len());
        match (global, &*arguments) {
            (Global::OrderedDict, []) => self.make(Object::Dict(Vec::new())),
            (Global::OrderedDict, [pairs]) => {
                let pairs = self.items(*pairs).ok_or_else(wrong)?;
                let pair = |&pair| match self.items(pair) {
                    Some(&[key, value]) => Ok((key, value)),
                    _ => Err(wrong()),
                };
                let dict = pairs.iter().map(pair).collect::<Result<_, _>>()?;
                self.make(Object::Dict(dict))
            }
            (Global::Size, [items]) => {
                let items = self.items(*items).ok_or_else(wrong)?.into();
                self.make(Object::Tuple(items))
            }
            (Global::RebuildParameter, [data, ..]) => match self.object(*data) {
                Some(Object::Tensor(_)) => self.push(*data),
                _ => Err(wrong()),
            },
            (Global::RebuildTensor, [storage, offset, shape, strides, ..]) => {
                self.tensor([*storage, *offset, *shape, *strides], None)
            }
            (Global::RebuildTensorOfType, [storage, offset, shape, strides, _, _, dtype, ..]) => {
                let Some(&Object::Global(Global::Type(kind))) = self.object(*dtype) else {
                    return Err(wrong());
                };
                self.tensor([*storage, *offset, *shape, *strides], Some(kind))
            }
            _ => Err(wrong()),
        }
    }

    fn tensor(&mut self, parts: [Value; 4], kind: Option<StorageKind>) -> Result<(), String> {
        let [storage, offset, shape, strides] = parts;
        let Some(Object::Storage(storage)) = self.object(storage) else {
            return Err("damaged pickle: a tensor without a storage".into());
        };
        let sizes = |value, what: &str| -> Result<Vec<usize>, String> {
            let items =
                self.items(value).ok_or_else(|| format!("damaged pickle: {what} is no tuple"))?;
            items.iter().map(|&item| extent(item, what)).collect()
        };
        let view = TensorView {
            kind: kind.unwrap_or(storage.kind),
            storage: (**storage).clone(),
            offset: extent(offset, "offset")?,
            shape: sizes(shape, "shape")?,
            strides: sizes(strides, "strides")?,
        };
        self.make(Object::Tensor(Box::new(view)))
    }

    /// `("storage", type, key, location, elements)` and, in old files, a view of another storage.
    fn storage(&mut self, id: Value) -> Result<(), String> {
        let wrong = || "damaged pickle: a persistent id that is no storage".to_owned();
        let items = self.items(id).ok_or_else(wrong)?;
        let (&[tag, kind, key, _, len], rest) = items.split_first_chunk().ok_or_else(wrong)?;
        let Some(&Object::Global(Global::Type(kind))) = self.object(kind) else {
            return Err(wrong());
        };
        let key = self.string(key).filter(|_| self.string(tag) == Some("storage"));
        let offset = match rest.first() {
            None | Some(Value::None) => 0,
            Some(&view) => match self.items(view) {
                Some(&[_, offset, _]) => extent(offset, "offset of a storage")?,
                _ => return Err(wrong()),
            },
        };
        let storage = Storage {
            key: key.ok_or_else(wrong)?.to_owned(),
            kind,
            len: extent(len, "size of a storage")?,
            offset,
        };
        self.make(Object::Storage(Box::new(storage)))
    }
}

fn extent(value: Value, what: &str) -> Result<usize, String> {
    match value {
        Value::Int(number) => usize::try_from(number)
            .map_err(|_| format!("damaged pickle: {what} {number} is negative")),
        _ => Err(format!("damaged pickle: {what} is no whole number")),
    }
}

fn refused(module: &str, name: &str) -> String {
    let module: String = module.chars().take(80).collect();
    let name: String = name.chars().take(80).collect();
    format!(
        "refused: the pickle asks for {module}.{name}; only tensors and plain containers are read"
    )
}

/// An operation that is not carried out, by its name where it has one that says something.
fn unknown(code: u8) -> String {
    let name = match code {
        0x81 | 0x92 | b'o' => "making an object of a class (NEWOBJ)",
        0x82..=0x84 => "a registered extension (EXT)",
        0x8f..=0x91 => "a set",
        0x97 | 0x98 => "a buffer from outside (NEXT_BUFFER)",
        b'P' => "a persistent id of protocol 0",
        b'I' | b'L' | b'F' | b'S' | b'V' | b'g' | b'p' => "an operation of protocol 0",
        _ => return format!("damaged pickle: no operation has the code {code:#04x}"),
    };
    format!("refused: the pickle uses {name}; only tensors and plain containers are read")
}
