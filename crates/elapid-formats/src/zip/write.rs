//! Writing: entries stored as they are, data at multiples of 64 bytes, zip64 fields where they are needed. The
//! same content gives the same bytes.

use std::io::{self, Write};

use flate2::Crc;

use super::{CENTRAL, ELSEWHERE, END, END_64, LOCAL, LOCATOR_64};

/// Data of an entry starts at a multiple of this.
const ALIGNMENT: u64 = 64;
/// 1980-01-01, the first day that a zip knows.
const DATE: u16 = 0x0021;
/// An extra field of no meaning, which readers skip: `FB`, as PyTorch pads.
const PADDING: u16 = 0x4246;

/// Shows the bytes of an entry in pieces; called twice, with the same result.
pub(crate) type Content<'a> =
    dyn Fn(&mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> + 'a;

/// An archive that is being written.
pub(crate) struct Writer<'a> {
    out: &'a mut dyn Write,
    position: u64,
    directory: Vec<u8>,
    entries: u64,
}

impl<'a> Writer<'a> {
    /// An archive with nothing in it.
    pub(crate) fn new(out: &'a mut dyn Write) -> Self {
        Self { out, position: 0, directory: Vec::new(), entries: 0 }
    }

    /// Adds an entry.
    ///
    /// # Errors
    /// Those of the content and the writer.
    pub(crate) fn add(&mut self, name: &str, content: &Content<'_>) -> io::Result<()> {
        let mut crc = Crc::new();
        let mut len = 0u64;
        content(&mut |piece| {
            crc.update(piece);
            len += piece.len() as u64;
            Ok(())
        })?;
        let offset = self.position;
        let wide = len >= u64::from(ELSEWHERE);
        let name_len = u16::try_from(name.len()).map_err(io::Error::other)?;

        // The local header, its extra fields long enough to end at a multiple of 64.
        let before = 30 + u64::from(name_len) + if wide { 20 } else { 0 } + 4;
        let padding = (ALIGNMENT - (offset + before) % ALIGNMENT) % ALIGNMENT;
        let mut header = Vec::new();
        header.extend(LOCAL.to_le_bytes());
        put_common(&mut header, wide, crc.sum(), len, name_len);
        header.extend((4 + padding as u16 + if wide { 20 } else { 0 }).to_le_bytes());
        header.extend(name.as_bytes());
        if wide {
            put_wide(&mut header, &[len, len]);
        }
        header.extend(PADDING.to_le_bytes());
        header.extend((padding as u16).to_le_bytes());
        header.resize(header.len() + padding as usize, b'Z');
        self.put(&header)?;
        content(&mut |piece| self.out.write_all(piece))?;
        self.position += len;

        let far = offset >= u64::from(ELSEWHERE);
        let directory = &mut self.directory;
        directory.extend(CENTRAL.to_le_bytes());
        directory.extend(if wide || far { 45u16 } else { 20 }.to_le_bytes());
        put_common(directory, wide, crc.sum(), len, name_len);
        let mut values = if wide { vec![len, len] } else { Vec::new() };
        values.extend(far.then_some(offset));
        let extra = if values.is_empty() { 0 } else { 4 + 8 * values.len() as u16 };
        directory.extend(extra.to_le_bytes());
        // No comment, disk 0, no attributes.
        directory.extend([0; 10]);
        directory.extend(if far { ELSEWHERE } else { offset as u32 }.to_le_bytes());
        directory.extend(name.as_bytes());
        if !values.is_empty() {
            put_wide(directory, &values);
        }
        self.entries += 1;
        Ok(())
    }

    /// Writes the directory.
    ///
    /// # Errors
    /// Those of the writer.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        let (start, size) = (self.position, self.directory.len() as u64);
        let directory = std::mem::take(&mut self.directory);
        self.put(&directory)?;
        let narrow = |value: u64| u32::try_from(value).unwrap_or(ELSEWHERE);
        let count = u16::try_from(self.entries).unwrap_or(u16::MAX);
        let mut end = Vec::new();
        if count == u16::MAX || narrow(start) == ELSEWHERE || narrow(size) == ELSEWHERE {
            let record = self.position;
            end.extend(END_64.to_le_bytes());
            end.extend(44u64.to_le_bytes());
            end.extend([45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            for value in [self.entries, self.entries, size, start] {
                end.extend(value.to_le_bytes());
            }
            end.extend(LOCATOR_64.to_le_bytes());
            end.extend(0u32.to_le_bytes());
            end.extend(record.to_le_bytes());
            end.extend(1u32.to_le_bytes());
        }
        end.extend(END.to_le_bytes());
        end.extend([0; 4]);
        end.extend(count.to_le_bytes());
        end.extend(count.to_le_bytes());
        end.extend(narrow(size).to_le_bytes());
        end.extend(narrow(start).to_le_bytes());
        end.extend([0; 2]);
        self.put(&end)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.position += bytes.len() as u64;
        self.out.write_all(bytes)
    }
}

/// What local header and directory have in common: version to length of the name.
fn put_common(to: &mut Vec<u8>, wide: bool, crc: u32, len: u64, name_len: u16) {
    to.extend(if wide { 45u16 } else { 20 }.to_le_bytes());
    // Names are UTF-8; stored; midnight.
    to.extend(0x0800u16.to_le_bytes());
    to.extend([0; 4]);
    to.extend(DATE.to_le_bytes());
    to.extend(crc.to_le_bytes());
    let narrow = if wide { ELSEWHERE } else { len as u32 };
    to.extend(narrow.to_le_bytes());
    to.extend(narrow.to_le_bytes());
    to.extend(name_len.to_le_bytes());
}

fn put_wide(to: &mut Vec<u8>, values: &[u64]) {
    to.extend(1u16.to_le_bytes());
    to.extend((8 * values.len() as u16).to_le_bytes());
    values.iter().for_each(|value| to.extend(value.to_le_bytes()));
}
