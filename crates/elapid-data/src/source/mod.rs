//! Sources: from paths and patterns to documents.
//!
//! A source is a list of files, folders and globs. Each file is one document, unless a separator is set,
//! which ends a document wherever it stands (it belongs to none). Plain files are mapped into memory, so
//! a corpus larger than the memory can be read; compressed ones are decompressed when they are opened.

mod bytes;
mod find;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::{Error, Result};
pub(crate) use bytes::FileBytes;

/// Where data comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SourceOptions {
    /// Files, folders (walked recursively, hidden entries left out) and globs (`*`, `?`, `[..]`, `{a,b}`,
    /// `**`). A file named twice is read once.
    pub paths: Vec<PathBuf>,
    /// Take only files with one of these extensions from folders and globs, without regard to case;
    /// `txt` takes `a.txt`, `a.txt.gz` and `a.txt.zst`. Empty: take all. A file named in full is always taken.
    pub extensions: Vec<String>,
    /// A byte string that ends a document within a file.
    pub separator: Option<Vec<u8>>,
}

impl SourceOptions {
    /// A source of these paths, without filter or separator.
    pub fn new(paths: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        Self { paths: paths.into_iter().map(Into::into).collect(), ..Self::default() }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Document {
    file: usize,
    bytes: Range<usize>,
}

/// Documents: non-empty byte strings in a fixed order. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Documents {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    files: Vec<FileBytes>,
    documents: Vec<Document>,
    bytes: u64,
}

impl Documents {
    /// Opens every file of a source, files in the order of the paths and by name within folders and globs.
    ///
    /// # Errors
    /// A path that does not exist, cannot be read or does not decompress; a folder or glob without files;
    /// an empty separator; no byte of data in all files together.
    pub fn load(options: &SourceOptions) -> Result<Self> {
        let paths = find::files(options)?;
        let files = paths.iter().map(|path| FileBytes::open(path)).collect::<Result<Vec<_>>>()?;
        let documents = Self::cut(files, options.separator.as_deref())?;
        if documents.is_empty() {
            return Err(Error::Empty { path: paths[0].clone(), files: paths.len() });
        }
        Ok(documents)
    }

    /// Documents from memory; empty ones are skipped, and there may be none.
    pub fn from_memory(documents: impl IntoIterator<Item = Vec<u8>>) -> Self {
        let files: Vec<_> = documents.into_iter().map(FileBytes::from_memory).collect();
        let documents = files
            .iter()
            .enumerate()
            .filter(|(_, file)| !file.is_empty())
            .map(|(file, bytes)| Document { file, bytes: 0..bytes.len() })
            .collect();
        Self::new(files, documents)
    }

    fn cut(files: Vec<FileBytes>, separator: Option<&[u8]>) -> Result<Self> {
        let mut documents = Vec::new();
        for (file, bytes) in files.iter().enumerate() {
            match separator {
                None => documents.push(Document { file, bytes: 0..bytes.len() }),
                Some([]) => {
                    return Err(Error::option("separator", "at least one byte", "an empty string"));
                }
                Some(separator) => {
                    let mut start = 0;
                    for end in occurrences(bytes, separator) {
                        documents.push(Document { file, bytes: start..end });
                        start = end + separator.len();
                    }
                    documents.push(Document { file, bytes: start..bytes.len() });
                }
            }
        }
        documents.retain(|document| !document.bytes.is_empty());
        Ok(Self::new(files, documents))
    }

    fn new(files: Vec<FileBytes>, documents: Vec<Document>) -> Self {
        let bytes = documents.iter().map(|document| document.bytes.len() as u64).sum();
        Self { inner: Arc::new(Inner { files, documents, bytes }) }
    }

    /// Number of documents.
    pub fn len(&self) -> usize {
        self.inner.documents.len()
    }

    /// True if there is no document.
    pub fn is_empty(&self) -> bool {
        self.inner.documents.is_empty()
    }

    /// Bytes of all documents together.
    pub fn bytes(&self) -> u64 {
        self.inner.bytes
    }

    /// Number of files that were opened, those without a document included.
    pub fn files(&self) -> usize {
        self.inner.files.len()
    }

    /// The bytes of document `index`.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Self::len).
    pub fn get(&self, index: usize) -> &[u8] {
        let document = &self.inner.documents[index];
        &self.inner.files[document.file][document.bytes.clone()]
    }

    /// The documents in order.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len()).map(|index| self.get(index))
    }

    /// A hash of document `index`: its length, its first and its last 64 KiB. A whole document is not
    /// read, so that a mapped corpus of any size opens at once.
    pub fn hash(&self, index: usize) -> u64 {
        const END: usize = 64 << 10;
        let bytes = self.get(index);
        if bytes.len() <= 2 * END {
            return xxh3_64(bytes);
        }
        let mut hash = Xxh3::new();
        hash.update(&(bytes.len() as u64).to_le_bytes());
        hash.update(&bytes[..END]);
        hash.update(&bytes[bytes.len() - END..]);
        hash.digest()
    }
}

/// Where `separator` (not empty) stands in `bytes`, without overlaps.
fn occurrences(bytes: &[u8], separator: &[u8]) -> Vec<usize> {
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(offset) =
        bytes.get(from..).and_then(|rest| rest.iter().position(|&byte| byte == separator[0]))
    {
        let at = from + offset;
        if bytes[at..].starts_with(separator) {
            found.push(at);
            from = at + separator.len();
        } else {
            from = at + 1;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn occurrences_of_a_separator() {
        assert_eq!(occurrences(b"a\0bc\0\0d", b"\0"), [1, 4, 5]);
        assert_eq!(occurrences(b"aaaa", b"aa"), [0, 2]);
        assert_eq!(occurrences(b"xab-ab-", b"ab-"), [1, 4]);
        assert!(occurrences(b"", b"\0").is_empty());
        assert!(occurrences(b"ab", b"abc").is_empty());
    }

    #[test]
    fn hash_sees_length_head_and_tail() {
        let long = vec![7u8; 200 << 10];
        let mut longer = long.clone();
        longer.push(7);
        let mut head = long.clone();
        head[5] = 0;
        let mut tail = long.clone();
        tail[(200 << 10) - 5] = 0;
        let documents = Documents::from_memory([long.clone(), longer, head, tail, long]);
        let hashes: Vec<_> = (0..5).map(|i| documents.hash(i)).collect();
        assert_eq!(hashes[0], hashes[4]);
        for other in 1..4 {
            assert_ne!(hashes[0], hashes[other]);
        }
    }
}
