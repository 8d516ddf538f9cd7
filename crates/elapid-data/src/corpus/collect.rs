//! Collects cleaned documents up to a number of bytes.

use std::path::{Path, PathBuf};

use walkdir::WalkDir;
use xxhash_rust::xxh3::xxh3_64;

use super::Corpus;
use super::clean::Cleaner;
use crate::Documents;
use crate::source::FileBytes;

/// The most that one file may give, so that no long change log outweighs a hundred other files.
const MAX_DOCUMENT: usize = 128 << 10;
/// Less than this is no document.
const MIN_DOCUMENT: usize = 256;
/// Larger files are data or machine-made.
const MAX_FILE: u64 = 1 << 20;

/// The documents so far.
pub(super) struct Collector {
    cleaner: Cleaner,
    documents: Vec<Vec<u8>>,
    room: usize,
}

impl Collector {
    pub(super) fn new(max_bytes: usize) -> Self {
        Self { cleaner: Cleaner::default(), documents: Vec::new(), room: max_bytes }
    }

    /// True if no further document fits.
    pub(super) fn is_full(&self) -> bool {
        self.room < MIN_DOCUMENT
    }

    /// Adds the document of these sections, whatever is left of it after cleaning.
    pub(super) fn offer(&mut self, sections: &[String]) {
        let room = self.room.min(MAX_DOCUMENT);
        let text = self.cleaner.clean(sections, room);
        if text.len() >= MIN_DOCUMENT {
            self.room -= text.len();
            self.documents.push(text.into_bytes());
        }
    }

    pub(super) fn finish(self, source: &'static str, roots: Vec<PathBuf>) -> Corpus {
        let files = self.documents.len();
        let documents = Documents::from_memory(self.documents);
        let bytes = documents.bytes();
        Corpus { documents, source, roots, files, bytes }
    }
}

/// A file's text, if it can be read, is of moderate size, valid UTF-8, mostly ASCII (a model of a few
/// minutes learns one script) and free of control characters.
pub(super) fn read_text(path: &Path) -> Option<String> {
    if std::fs::metadata(path).ok()?.len() > MAX_FILE {
        return None;
    }
    let text = String::from_utf8(FileBytes::open(path).ok()?.to_vec()).ok()?.replace("\r\n", "\n");
    let is_control = |byte: u8| byte.is_ascii_control() && byte != b'\n' && byte != b'\t';
    let ascii = text.bytes().filter(u8::is_ascii).count();
    (ascii * 10 >= text.len() * 9 && !text.bytes().any(is_control)).then_some(text)
}

/// Files under `root` that `wanted` accepts by their path below it, in an order that mixes all folders
/// and depends on names only. What cannot be read is passed over.
pub(super) fn shuffled_files(root: &Path, wanted: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let mut files: Vec<(u64, PathBuf)> = WalkDir::new(root)
        .into_iter()
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_file())
        .filter_map(|entry| {
            let below = entry.path().strip_prefix(root).ok()?;
            let name = below.to_string_lossy().replace('\\', "/");
            wanted(below).then(|| (xxh3_64(name.as_bytes()), entry.into_path()))
        })
        .collect();
    files.sort();
    files.into_iter().map(|(_, path)| path).collect()
}
