//! Reading: the central directory decides; every range is checked before it is believed, and no two entries
//! share bytes.

use std::io::Read;

use flate2::Crc;
use flate2::read::DeflateDecoder;

use super::{CENTRAL, ELSEWHERE, END, END_64, LOCAL, LOCATOR_64};
use crate::Bytes;

/// A compressed archive may grow to so many times the file's size.
const LARGEST_GROWTH: u64 = 8;

/// One file of an archive.
#[derive(Debug)]
pub(crate) struct Entry {
    pub name: String,
    deflated: bool,
    crc: u32,
    /// The bytes in the archive.
    stored: Bytes,
    /// Bytes when unpacked.
    len: u64,
}

/// An open archive.
pub(crate) struct Archive {
    pub entries: Vec<Entry>,
    growth: u64,
}

impl Archive {
    /// Reads the directory of an archive.
    ///
    /// # Errors
    /// What contradicts itself, naming the entry.
    pub(crate) fn open(file: &Bytes) -> Result<Self, String> {
        let directory = Directory::find(file)?;
        // An entry of the directory has 46 bytes at least.
        if directory.entries > directory.bytes.len() as u64 / 46 {
            return Err(format!(
                "damaged zip: {} entries cannot be listed in {} bytes",
                directory.entries,
                directory.bytes.len()
            ));
        }
        let mut entries: Vec<Entry> = Vec::new();
        let mut ranges = Vec::new();
        let mut fields = Fields(&directory.bytes);
        for _ in 0..directory.entries {
            let (entry, range) = read_entry(file, &mut fields)?;
            ranges.push((range, entries.len()));
            entries.push(entry);
        }
        ranges.sort_unstable_by_key(|(range, _)| (range.start, range.end));
        for pair in ranges.windows(2) {
            if pair[0].0.end > pair[1].0.start {
                let (a, b) = (&entries[pair[0].1].name, &entries[pair[1].1].name);
                return Err(format!("damaged zip: entries {a:?} and {b:?} overlap"));
            }
        }
        let mut names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("damaged zip: two entries are named {:?}", pair[0]));
        }
        Ok(Self { entries, growth: LARGEST_GROWTH * file.len() as u64 + 1024 })
    }

    /// The bytes of an entry: a part of the file if it is stored as it is, else unpacked and verified.
    ///
    /// # Errors
    /// If it is damaged, or all that is unpacked has more than eight times the file's size.
    pub(crate) fn unpack(&mut self, index: usize) -> Result<Bytes, String> {
        let entry = &self.entries[index];
        let name = &entry.name;
        if !entry.deflated {
            return Ok(entry.stored.clone());
        }
        self.growth = self.growth.checked_sub(entry.len).ok_or_else(|| {
            format!(
                "{name:?} unpacks to {} bytes: the archive would grow to more than {LARGEST_GROWTH} times \
                 its size",
                entry.len
            )
        })?;
        let mut bytes = Vec::new();
        let limit = entry.len + 1;
        DeflateDecoder::new(&*entry.stored)
            .take(limit)
            .read_to_end(&mut bytes)
            .map_err(|error| format!("{name:?} cannot be unpacked: {error}"))?;
        let mut crc = Crc::new();
        crc.update(&bytes);
        if bytes.len() as u64 != entry.len || crc.sum() != entry.crc {
            return Err(format!("damaged zip: {name:?} does not unpack to what was packed"));
        }
        Ok(bytes.into())
    }
}

/// The list of entries at the end of an archive.
struct Directory {
    bytes: Bytes,
    entries: u64,
}

impl Directory {
    fn find(file: &Bytes) -> Result<Self, String> {
        // The end record has 22 bytes and a comment of up to 65535.
        let last = file.len().checked_sub(22).ok_or("truncated zip: no end of the directory")?;
        let first = last.saturating_sub(usize::from(u16::MAX));
        let start = (first..=last)
            .rev()
            .find(|&at| {
                file[at..].starts_with(&END.to_le_bytes())
                    && usize::from(u16::from_le_bytes([file[at + 20], file[at + 21]]))
                        == file.len() - at - 22
            })
            .ok_or("truncated zip: no end of the directory")?;
        let mut fields = Fields(&file[start + 4..]);
        let disks = (fields.u16()?, fields.u16()?);
        let counts = (fields.u16()?, fields.u16()?);
        let (size, offset) = (fields.u32()?, fields.u32()?);
        let mut found = (u64::from(counts.1), u64::from(size), u64::from(offset));
        let wide = counts.1 == u16::MAX || size == ELSEWHERE || offset == ELSEWHERE;
        let locator = start.checked_sub(20).map(|at| &file[at..start]);
        let locator = locator.filter(|bytes| bytes.starts_with(&LOCATOR_64.to_le_bytes()));
        match locator {
            Some(locator) => found = wide_directory(file, locator)?,
            None if wide => return Err("damaged zip: no zip64 end of the directory".into()),
            None if disks != (0, 0) || counts.0 != counts.1 => {
                return Err("a zip of several disks is not read".into());
            }
            None => {}
        }
        let (entries, size, offset) = found;
        let bytes = part(file, offset, size).ok_or_else(|| {
            format!("truncated zip: the directory should be {size} bytes at {offset}")
        })?;
        Ok(Self { bytes, entries })
    }
}

/// Entries, size and offset of the directory of a zip64 archive.
fn wide_directory(file: &Bytes, locator: &[u8]) -> Result<(u64, u64, u64), String> {
    let mut fields = Fields(&locator[4..]);
    let _disk = fields.u32()?;
    let record = part(file, fields.u64()?, 56)
        .filter(|bytes| bytes.starts_with(&END_64.to_le_bytes()))
        .ok_or("damaged zip: the zip64 end of the directory is not where it should be")?;
    let mut fields = Fields(&record[4..]);
    let (_size, _versions) = (fields.u64()?, fields.u32()?);
    let disks = (fields.u32()?, fields.u32()?);
    let entries = (fields.u64()?, fields.u64()?);
    if disks != (0, 0) || entries.0 != entries.1 {
        return Err("a zip of several disks is not read".into());
    }
    Ok((entries.1, fields.u64()?, fields.u64()?))
}

/// An entry of the directory and the range of its bytes, header included.
fn read_entry(
    file: &Bytes,
    fields: &mut Fields<'_>,
) -> Result<(Entry, std::ops::Range<u64>), String> {
    if fields.u32()? != CENTRAL {
        return Err("damaged zip: no entry where the directory should have one".into());
    }
    let _versions = fields.u32()?;
    let (flags, method) = (fields.u16()?, fields.u16()?);
    let _time = fields.u32()?;
    let crc = fields.u32()?;
    let (mut packed, mut len) = (u64::from(fields.u32()?), u64::from(fields.u32()?));
    let (name_len, extra_len, comment_len) = (fields.u16()?, fields.u16()?, fields.u16()?);
    let _disk_and_attributes = fields.take(8)?;
    let mut offset = u64::from(fields.u32()?);
    let name = String::from_utf8_lossy(fields.take(name_len.into())?).into_owned();
    let mut extra = Fields(fields.take(extra_len.into())?);
    fields.take(comment_len.into())?;
    while extra.0.len() >= 4 {
        let (kind, size) = (extra.u16()?, extra.u16()?);
        let mut wide = Fields(
            extra.take(size.into()).map_err(|_| format!("damaged zip: extra field of {name:?}"))?,
        );
        if kind == 1 {
            for value in [&mut len, &mut packed, &mut offset] {
                if *value == u64::from(ELSEWHERE) {
                    *value = wide.u64()?;
                }
            }
        }
    }
    if flags & 1 != 0 {
        return Err(format!("zip entry {name:?} is encrypted"));
    }
    if !matches!(method, 0 | 8) {
        return Err(format!(
            "zip entry {name:?} is packed by method {method}; only stored and deflated ones are read"
        ));
    }
    if method == 0 && packed != len {
        return Err(format!(
            "damaged zip: {name:?} is stored but has two lengths, {packed} and {len}"
        ));
    }
    let outside = || format!("truncated zip: {name:?} lies outside the file");
    let header = part(file, offset, 30).ok_or_else(outside)?;
    if !header.starts_with(&LOCAL.to_le_bytes()) {
        return Err(format!("damaged zip: no entry {name:?} at offset {offset}"));
    }
    let mut local = Fields(&header[26..]);
    let start = offset + 30 + u64::from(local.u16()?) + u64::from(local.u16()?);
    let stored = part(file, start, packed).ok_or_else(outside)?;
    let end = start + packed;
    Ok((Entry { name, deflated: method == 8, crc, stored, len }, offset..end))
}

/// A part of the file; none if it ends before.
fn part(file: &Bytes, start: u64, len: u64) -> Option<Bytes> {
    let end = usize::try_from(start.checked_add(len)?).ok()?;
    file.slice(usize::try_from(start).ok()?..end)
}

/// Reads little-endian fields one after the other.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let (head, rest) = self
            .0
            .split_at_checked(len)
            .ok_or("truncated zip: the directory ends within an entry")?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u16(&mut self) -> Result<u16, String> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }
}
