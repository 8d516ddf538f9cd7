//! The header of a `.npy` file: a Python dict literal with exactly three keys.

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// Far more than a header of six axes needs.
const LARGEST: usize = 1 << 16;

/// What a `.npy` file says about its array.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// `<f4`, ...
    pub kind: String,
    /// The first axis is the fastest.
    pub fortran_order: bool,
    pub shape: Vec<usize>,
    /// Bytes before the data.
    pub len: usize,
}

impl Header {
    /// Reads magic, version and dict.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, String> {
        let rest = bytes.strip_prefix(MAGIC).ok_or("no .npy file: another start")?;
        let truncated = "truncated .npy header";
        let (version, rest) = rest.split_first_chunk::<2>().ok_or(truncated)?;
        let (size, before) = match version[0] {
            1 => {
                let size = rest.first_chunk::<2>().ok_or(truncated)?;
                (usize::from(u16::from_le_bytes(*size)), 10)
            }
            2 | 3 => {
                let size = rest.first_chunk::<4>().ok_or(truncated)?;
                (u32::from_le_bytes(*size) as usize, 12)
            }
            found => return Err(format!("version 1 to 3 of .npy expected, found {found}")),
        };
        if size > LARGEST {
            return Err(format!("a .npy header of {size} bytes, at most {LARGEST} are read"));
        }
        let len = before + size;
        let text = bytes.get(before..len).ok_or(truncated)?;
        let text = str::from_utf8(text).map_err(|_| "damaged .npy header: no text")?;
        let mut parser = Parser(text);
        parser
            .dict(len)
            .map_err(|what| format!("damaged .npy header: {what}, at {:?}", parser.rest()))
    }

    /// Version 1, padded so that the data starts at a multiple of 64.
    pub(super) fn write(kind: &str, shape: &[usize]) -> Vec<u8> {
        let extents: String = shape.iter().map(|extent| format!("{extent}, ")).collect();
        let extents = match shape {
            [_] => extents.trim_end(),
            _ => extents.trim_end_matches(", "),
        };
        let mut text =
            format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': ({extents}), }}");
        while !(10 + text.len() + 1).is_multiple_of(64) {
            text.push(' ');
        }
        text.push('\n');
        let mut header = MAGIC.to_vec();
        header.extend([1, 0]);
        header.extend((text.len() as u16).to_le_bytes());
        header.extend(text.as_bytes());
        header
    }
}

/// Just enough of Python's literals.
struct Parser<'a>(&'a str);

impl<'a> Parser<'a> {
    fn rest(&self) -> String {
        self.0.chars().take(20).collect()
    }

    fn try_take(&mut self, token: &str) -> bool {
        self.0 = self.0.trim_start();
        match self.0.strip_prefix(token) {
            Some(rest) => {
                self.0 = rest;
                true
            }
            None => false,
        }
    }

    fn take(&mut self, token: &str) -> Result<(), String> {
        if self.try_take(token) { Ok(()) } else { Err(format!("{token:?} expected")) }
    }

    fn text(&mut self) -> Result<&'a str, String> {
        let quote = if self.try_take("'") { '\'' } else { self.take("\"").map(|()| '"')? };
        let (text, rest) = self.0.split_once(quote).ok_or("a text has no end")?;
        self.0 = rest;
        Ok(text)
    }

    fn dict(&mut self, len: usize) -> Result<Header, String> {
        let (mut kind, mut order, mut shape) = (None, None, None);
        self.take("{")?;
        while !self.try_take("}") {
            let key = self.text()?;
            self.take(":")?;
            match key {
                "descr" if !self.0.trim_start().starts_with(['\'', '"']) => {
                    return Err("one element type expected".into());
                }
                "descr" => kind = Some(self.text()?.to_owned()),
                "fortran_order" if self.try_take("True") => order = Some(true),
                "fortran_order" => order = self.take("False").map(|()| Some(false))?,
                "shape" => shape = Some(self.shape()?),
                other => return Err(format!("unknown key {other:?}")),
            }
            if !self.try_take(",") {
                self.take("}")?;
                break;
            }
        }
        match (kind, order, shape) {
            (Some(kind), Some(fortran_order), Some(shape)) => {
                Ok(Header { kind, fortran_order, shape, len })
            }
            _ => Err("descr, fortran_order and shape expected".into()),
        }
    }

    fn shape(&mut self) -> Result<Vec<usize>, String> {
        let mut shape = Vec::new();
        self.take("(")?;
        while !self.try_take(")") {
            self.0 = self.0.trim_start();
            let end = self.0.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.0.len());
            let (digits, rest) = self.0.split_at(end);
            let extent = digits.parse().map_err(|_| "an extent that fits memory expected")?;
            self.0 = rest;
            shape.push(extent);
            if !self.try_take(",") {
                self.take(")")?;
                break;
            }
        }
        Ok(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(text: &str) -> Vec<u8> {
        let mut bytes = b"\x93NUMPY\x01\0".to_vec();
        bytes.extend((text.len() as u16).to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes
    }

    #[test]
    fn written_headers_are_read() {
        for shape in [&[][..], &[7], &[3, 4], &[1, 2, 3]] {
            let bytes = Header::write("<f4", shape);
            assert!(bytes.len().is_multiple_of(64));
            let header = Header::read(&bytes).unwrap();
            assert_eq!((header.kind.as_str(), header.fortran_order), ("<f4", false));
            assert_eq!((header.shape.as_slice(), header.len), (shape, bytes.len()));
        }
        assert!(String::from_utf8_lossy(&Header::write("<f4", &[7])).contains("'shape': (7,), }"));
        assert!(String::from_utf8_lossy(&Header::write("<f4", &[])).contains("'shape': (), }"));
    }

    #[test]
    fn other_writers_and_damage() {
        let header = with("{\"shape\":(2,3),\"fortran_order\":True,\"descr\":\"<f2\"}\n");
        let header = Header::read(&header).unwrap();
        assert!(header.fortran_order && header.shape == [2, 3] && header.kind == "<f2");
        for (text, word) in [
            ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': ()}", "one element type"),
            ("{'descr': '<f4', 'fortran_order': 3, 'shape': ()}", "False"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", "extent"),
            (
                "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,)}",
                "extent",
            ),
            ("{'descr': '<f4', 'shape': ()}", "fortran_order"),
            ("{'descr': '<f4", "no end"),
            ("__import__('os').system('x')", "expected"),
            ("", "expected"),
        ] {
            let error = Header::read(&with(text)).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        assert!(
            Header::read(b"\x93NUMPY\x02\0\xff\xff\xff\xff").unwrap_err().contains("4294967295")
        );
        assert!(Header::read(b"\x93NUMPY\x01\0\xff\0").unwrap_err().contains("truncated"));
    }
}
