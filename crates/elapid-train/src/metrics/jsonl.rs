//! The metrics file: JSON lines, appended as the run goes.
//!
//! Each record is one write of one whole line, so a killed run leaves at most one torn line at the
//! end. A resumed run cuts that and every record after the checkpoint's step, and then writes them
//! anew: but for timings the file equals that of an uninterrupted run.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::Record;
use crate::error::{Error, Result};

/// Appends records to a file.
#[derive(Debug)]
pub struct MetricsWriter {
    file: File,
    path: PathBuf,
}

impl MetricsWriter {
    /// Starts a file; an older one at the path is emptied.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        Ok(Self { file, path })
    }

    /// Continues a file from a checkpoint after `step` steps: later records and a torn last line
    /// are cut. A file that does not exist is started.
    ///
    /// # Errors
    /// The file cannot be read or written, or a whole line in it is not a record.
    pub fn resume(path: impl AsRef<Path>, step: u64) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::io("open", &path))?;
        let mut kept = 0u64;
        for_each_line(&mut BufReader::new(&file), &path, |record, length| {
            let keep = record.step() <= step;
            kept += if keep { length } else { 0 };
            keep
        })?;
        file.set_len(kept).map_err(Error::io("cut", &path))?;
        file.seek(SeekFrom::Start(kept)).map_err(Error::io("seek in", &path))?;
        Ok(Self { file, path })
    }

    /// Appends one record.
    ///
    /// # Errors
    /// The disk is full or the file has become unwritable.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let invalid = |e: serde_json::Error| Error::io("append to", &self.path)(e.into());
        let mut line = serde_json::to_vec(record).map_err(invalid)?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(Error::io("append to", &self.path))
    }

    /// Hands everything written to the disk; called before a checkpoint counts as saved, so that
    /// the file never ends before the step a run resumes from.
    ///
    /// # Errors
    /// The operating system could not write.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(Error::io("sync", &self.path))
    }
}

/// Reads all records of a metrics file, leaving out a torn last line.
///
/// # Errors
/// The file cannot be read, or a whole line in it is not a record.
pub fn read_metrics(path: impl AsRef<Path>) -> Result<Vec<Record>> {
    let path = path.as_ref();
    let file = File::open(path).map_err(Error::io("read", path))?;
    let mut records = Vec::new();
    for_each_line(&mut BufReader::new(file), path, |record, _| {
        records.push(record);
        true
    })?;
    Ok(records)
}

/// Calls `visit(record, bytes of its line)` for every whole line until it answers false.
fn for_each_line(
    reader: &mut impl BufRead,
    path: &Path,
    mut visit: impl FnMut(Record, u64) -> bool,
) -> Result<()> {
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        reader.read_until(b'\n', &mut line).map_err(Error::io("read", path))?;
        if line.last() != Some(&b'\n') {
            break;
        }
        let record = serde_json::from_slice(&line).map_err(|error| Error::MetricsLine {
            path: path.to_path_buf(),
            line: number,
            message: error.to_string(),
        })?;
        if !visit(record, line.len() as u64) {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{TrainRecord, ValidationRecord};
    use super::*;

    fn train(step: u64) -> Record {
        Record::Train(TrainRecord {
            step,
            tokens: step * 4096,
            loss: 5.0 / step as f64,
            bits_per_byte: Some(7.0 / step as f64),
            lr: 1e-3,
            grad_norm: 0.1,
            ..Default::default()
        })
    }

    fn validation(step: u64) -> Record {
        Record::Validation(ValidationRecord { step, loss: 2.5, ..Default::default() })
    }

    #[test]
    fn what_is_written_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let records = [train(1), train(2), validation(2), train(3)];
        let mut writer = MetricsWriter::create(&path).unwrap();
        records.iter().for_each(|r| writer.write(r).unwrap());
        writer.sync().unwrap();
        assert_eq!(read_metrics(&path).unwrap(), records);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(
            text.starts_with(r#"{"kind":"train","step":1,"tokens":4096,"loss":5.0,"#),
            "{text}"
        );
    }

    #[test]
    fn numbers_that_are_not_finite_are_null() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let record =
            TrainRecord { step: 1, loss: f64::NAN, grad_norm: f64::INFINITY, ..Default::default() };
        MetricsWriter::create(&path).unwrap().write(&Record::Train(record)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(r#""loss":null"#) && text.contains(r#""grad_norm":null"#), "{text}");
        match &read_metrics(&path).unwrap()[..] {
            [Record::Train(r)] => assert!(r.loss.is_nan() && r.grad_norm.is_nan() && r.lr == 0.0),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_resumed_file_equals_an_uninterrupted_one() {
        let folder = tempfile::tempdir().unwrap();
        let [whole, cut] = ["whole", "cut"].map(|name| folder.path().join(name));
        let records: Vec<Record> = (1..=9)
            .flat_map(|s| [Some(train(s)), (s % 3 == 0).then(|| validation(s))])
            .flatten()
            .collect();
        let mut writer = MetricsWriter::create(&whole).unwrap();
        records.iter().for_each(|r| writer.write(r).unwrap());
        // Killed in the middle of the line of step 8, resumed from the checkpoint of step 6.
        let mut writer = MetricsWriter::create(&cut).unwrap();
        records.iter().filter(|r| r.step() < 8).for_each(|r| writer.write(r).unwrap());
        writer.file.write_all(br#"{"kind":"train","st"#).unwrap();
        drop(writer);
        let mut writer = MetricsWriter::resume(&cut, 6).unwrap();
        records.iter().filter(|r| r.step() > 6).for_each(|r| writer.write(r).unwrap());
        assert_eq!(std::fs::read(&whole).unwrap(), std::fs::read(&cut).unwrap());
    }

    #[test]
    fn resuming_starts_a_missing_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        MetricsWriter::resume(&path, 5).unwrap().write(&train(6)).unwrap();
        assert_eq!(read_metrics(&path).unwrap(), [train(6)]);
    }

    #[test]
    fn a_foreign_line_is_named_and_the_file_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::create(&path).unwrap();
        writer.write(&train(1)).unwrap();
        writer.file.write_all(b"hello\n").unwrap();
        let before = std::fs::read(&path).unwrap();
        let error = MetricsWriter::resume(&path, 5).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl:2: not a metrics record"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }
}
