//! TensorBoard event files: TFRecord framing around hand-encoded `Event` messages.
//!
//! A record is its length (u64, little-endian), the masked CRC-32C of those eight bytes, the
//! payload, and the masked CRC-32C of the payload. The fields used here are, of `Event`: 1 wall_time
//! (double), 2 step (int64), 3 file_version (string), 5 summary, 7 session_log; of `Summary`: 1
//! value; of `Value`: 1 tag (string), 2 simple_value (float); of `SessionLog`: 1 status (START = 1).

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::Record;
use crate::error::{Error, Result};

const SESSION_START: u64 = 1;

/// Writes one event file.
#[derive(Debug)]
pub struct EventWriter {
    file: File,
    path: PathBuf,
}

impl EventWriter {
    /// Starts an event file in `folder` (created if need be). With `resumed_step`, TensorBoard is
    /// told to forget what earlier files of the folder say of later steps.
    ///
    /// # Errors
    /// The folder or file cannot be created or written.
    pub fn create(folder: impl AsRef<Path>, resumed_step: Option<u64>) -> Result<Self> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let (file, path) = create_file(folder)?;
        let mut writer = Self { file, path };
        let mut version = event_head(wall_time(), 0);
        put_bytes(&mut version, 3, b"brain.Event:2");
        writer.write_event(&version)?;
        if let Some(step) = resumed_step {
            // TensorBoard drops events from the step of a START on; those up to `step` stay valid.
            let mut start = event_head(wall_time(), step + 1);
            let mut log = Vec::new();
            put_varint_field(&mut log, 1, SESSION_START);
            put_bytes(&mut start, 7, &log);
            writer.write_event(&start)?;
        }
        Ok(writer)
    }

    /// The file being written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends named values of one step.
    ///
    /// # Errors
    /// The disk is full or the file has become unwritable.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut event = event_head(wall_time(), step);
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut entry = Vec::new();
            put_bytes(&mut entry, 1, tag.as_bytes());
            entry.push((2 << 3) | 5);
            entry.extend_from_slice(&(*value as f32).to_le_bytes());
            put_bytes(&mut summary, 1, &entry);
        }
        put_bytes(&mut event, 5, &summary);
        self.write_event(&event)
    }

    /// Appends a metrics record under the tags `train/...` and `validation/...`.
    ///
    /// # Errors
    /// As [`EventWriter::scalars`].
    pub fn record(&mut self, record: &Record) -> Result<()> {
        let mut values: Vec<(&str, f64)> = Vec::new();
        match record {
            Record::Train(r) => {
                values.push(("train/loss", r.loss));
                values.extend(r.bits_per_byte.map(|v| ("train/bits_per_byte", v)));
                values.push(("train/lr", r.lr));
                values.push(("train/grad_norm", r.grad_norm));
                values.push(("train/padding_rate", r.padding_rate));
                values.push(("train/tokens_per_s", r.tokens_per_s));
                values.extend(r.memory_bytes.map(|v| ("train/memory_bytes", v as f64)));
            }
            Record::Validation(r) => {
                values.push(("validation/loss", r.loss));
                values.extend(r.bits_per_byte.map(|v| ("validation/bits_per_byte", v)));
                values.extend(r.accuracy.map(|v| ("validation/accuracy", v)));
            }
        }
        self.scalars(record.step(), &values)
    }

    fn write_event(&mut self, event: &[u8]) -> Result<()> {
        let written = self.file.write_all(&frame(event));
        written.map_err(Error::io("append to", &self.path))
    }
}

/// Readers order the files of a folder by name, so the name starts with the time; process and
/// counter keep two runs of one second apart.
fn create_file(folder: &Path) -> Result<(File, PathBuf)> {
    let seconds = wall_time() as u64;
    let process = std::process::id();
    let mut count = 0u32;
    loop {
        let name = format!("events.out.tfevents.{seconds:010}.elapid.{process}.{count:03}");
        let path = folder.join(name);
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((file, path)),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && count < 999 => count += 1,
            Err(e) => return Err(Error::io("create", &path)(e)),
        }
    }
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// CRC-32C, rotated and offset so that a checksum of data that holds checksums stays sound.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn frame(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(payload.len() + 16);
    record.extend_from_slice(&length);
    record.extend_from_slice(&masked_crc(&length).to_le_bytes());
    record.extend_from_slice(payload);
    record.extend_from_slice(&masked_crc(payload).to_le_bytes());
    record
}

fn event_head(wall_time: f64, step: u64) -> Vec<u8> {
    let mut event = vec![(1 << 3) | 1];
    event.extend_from_slice(&wall_time.to_le_bytes());
    put_varint_field(&mut event, 2, step);
    event
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_varint_field(out: &mut Vec<u8>, field: u8, value: u64) {
    out.push(field << 3);
    put_varint(out, value);
}

fn put_bytes(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push((field << 3) | 2);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::super::{TrainRecord, ValidationRecord};
    use super::*;

    #[derive(Debug)]
    enum Field<'a> {
        Varint(u64),
        Fixed64([u8; 8]),
        Bytes(&'a [u8]),
        Fixed32([u8; 4]),
    }

    fn varint(data: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let (byte, rest) = data.split_first().unwrap();
            *data = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        value
    }

    fn fields(mut data: &[u8]) -> Vec<(u64, Field<'_>)> {
        let mut fields = Vec::new();
        while !data.is_empty() {
            let key = varint(&mut data);
            let field = match key & 7 {
                0 => Field::Varint(varint(&mut data)),
                1 => Field::Fixed64(data.split_off(..8).unwrap().try_into().unwrap()),
                2 => {
                    let length = varint(&mut data) as usize;
                    Field::Bytes(data.split_off(..length).unwrap())
                }
                5 => Field::Fixed32(data.split_off(..4).unwrap().try_into().unwrap()),
                other => panic!("wire type {other}"),
            };
            fields.push((key >> 3, field));
        }
        fields
    }

    /// Checks the framing and returns the payloads.
    fn payloads(mut data: &[u8]) -> Vec<&[u8]> {
        let mut found = Vec::new();
        while !data.is_empty() {
            let length = data.split_off(..8).unwrap();
            let crc = data.split_off(..4).unwrap();
            assert_eq!(crc, masked_crc(length).to_le_bytes());
            let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
            let payload = data.split_off(..length).unwrap();
            assert_eq!(data.split_off(..4).unwrap(), masked_crc(payload).to_le_bytes());
            found.push(payload);
        }
        found
    }

    #[test]
    fn checksums_match_published_vectors() {
        // RFC 3720, B.4.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c::crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        // The head of every event file: a 24-byte version record.
        let head = [24, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(masked_crc(&head).to_le_bytes(), [0xa3, 0x7f, 0x4b, 0x22]);
    }

    #[test]
    fn the_version_comes_first_and_scalars_follow() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(folder.path().join("events"), None).unwrap();
        let name = writer.path().file_name().unwrap().to_str().unwrap().to_string();
        assert!(name.starts_with("events.out.tfevents."), "{name}");
        writer.scalars(300, &[("train/loss", 1.5), ("train/lr", f64::NAN)]).unwrap();
        let bytes = std::fs::read(writer.path()).unwrap();
        let payloads = payloads(&bytes);
        assert_eq!(payloads.len(), 2);
        let version = fields(payloads[0]);
        assert!(matches!(version[2], (3, Field::Bytes(b"brain.Event:2"))), "{version:?}");
        let event = fields(payloads[1]);
        let [(1, Field::Fixed64(time)), (2, Field::Varint(300)), (5, Field::Bytes(summary))] =
            event[..]
        else {
            panic!("{event:?}");
        };
        assert!((f64::from_le_bytes(time) - wall_time()).abs() < 60.0);
        let values: Vec<(String, f32)> = fields(summary)
            .into_iter()
            .map(|(_, value)| match value {
                Field::Bytes(value) => match fields(value)[..] {
                    [(1, Field::Bytes(tag)), (2, Field::Fixed32(v))] => {
                        (String::from_utf8(tag.to_vec()).unwrap(), f32::from_le_bytes(v))
                    }
                    ref other => panic!("{other:?}"),
                },
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(values[0], ("train/loss".to_string(), 1.5));
        assert!(values[1].0 == "train/lr" && values[1].1.is_nan());
    }

    #[test]
    fn a_resumed_run_gets_its_own_file_and_purges_later_steps() {
        let folder = tempfile::tempdir().unwrap();
        let first = EventWriter::create(folder.path(), None).unwrap();
        let second = EventWriter::create(folder.path(), Some(41)).unwrap();
        assert!(first.path() < second.path());
        let bytes = std::fs::read(second.path()).unwrap();
        let start = fields(payloads(&bytes)[1]);
        assert!(matches!(start[1..], [(2, Field::Varint(42)), (7, Field::Bytes([8, 1]))]));
    }

    #[test]
    fn records_become_tags() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(folder.path(), None).unwrap();
        let train = TrainRecord { step: 7, memory_bytes: Some(1 << 30), ..Default::default() };
        writer.record(&Record::Train(train)).unwrap();
        let validation = ValidationRecord { step: 7, accuracy: Some(0.5), ..Default::default() };
        writer.record(&Record::Validation(validation)).unwrap();
        let bytes = std::fs::read(writer.path()).unwrap();
        let has = |payload: &[u8], tag: &str| {
            payload.windows(tag.len()).any(|window| window == tag.as_bytes())
        };
        let payloads = payloads(&bytes);
        assert!(has(payloads[1], "train/memory_bytes") && !has(payloads[1], "bits_per_byte"));
        assert!(has(payloads[2], "validation/accuracy"));
    }
}
