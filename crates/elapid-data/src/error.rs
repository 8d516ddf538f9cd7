//! The one error type of the data layer: which path or option, what was expected, what was found.

use std::io;
use std::path::PathBuf;

/// What can go wrong between a path on disk and a batch.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The list of inputs is empty.
    #[error("no data given: expected at least one file, folder or glob")]
    NoInput,
    /// A named file or folder does not exist.
    #[error("{}: no such file or folder", path.display())]
    NotFound {
        /// The path as it was given.
        path: PathBuf,
    },
    /// A file or folder cannot be read.
    #[error("{}: cannot be read: {source}", path.display())]
    Unreadable {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A path names a device or a socket.
    #[error("{}: neither a file nor a folder", path.display())]
    NotAFile {
        /// The path as it was given.
        path: PathBuf,
    },
    /// A compressed file does not decompress.
    #[error("{}: not a whole {format} file: {source}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// `gzip` or `zstd`, by the file's extension.
        format: &'static str,
        /// What the decompressor said.
        source: io::Error,
    },
    /// A pattern is not a valid glob.
    #[error("{pattern:?} is not a valid glob: {source}")]
    InvalidGlob {
        /// The pattern as it was given.
        pattern: String,
        /// What is wrong with it.
        source: globset::Error,
    },
    /// A glob matches nothing.
    #[error("no file matches {pattern:?}{filter}")]
    NoMatch {
        /// The pattern as it was given.
        pattern: String,
        /// The extensions filter in words, empty if there is none.
        filter: String,
    },
    /// A folder holds no file.
    #[error("{}: no file in this folder{filter}", path.display())]
    EmptyFolder {
        /// The folder.
        path: PathBuf,
        /// The extensions filter in words, empty if there is none.
        filter: String,
    },
    /// Every file is empty.
    #[error("{files} file(s) read and not one byte of data in them, the first is {}", path.display())]
    Empty {
        /// The first of the files.
        path: PathBuf,
        /// How many files were read.
        files: usize,
    },
    /// There are bytes, but no document is long enough to predict one byte from another.
    #[error(
        "{part}: {documents} document(s) of {bytes} byte(s) in all, expected one with at least 2 bytes"
    )]
    TooSmall {
        /// Training or validation.
        part: &'static str,
        /// How many documents there are.
        documents: usize,
        /// Their bytes together.
        bytes: u64,
    },
    /// An option has a value out of its range.
    #[error("{option} = {got}, expected {expected}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// The range.
        expected: String,
        /// The value.
        got: String,
    },
    /// A saved position belongs to other data or other options.
    #[error(
        "the saved data position belongs to other data or options (fingerprint {got:016x}, expected {expected:016x})"
    )]
    OtherData {
        /// The loader's own fingerprint.
        expected: u64,
        /// The fingerprint in the position.
        got: u64,
    },
    /// A saved position contradicts itself.
    #[error("the saved data position is damaged: {0}")]
    BadPosition(String),
    /// No text was found on this machine.
    #[error(
        "found only {found} bytes of text on this machine (looked in {looked}); pass --data PATH with a text file or a folder"
    )]
    NoCorpus {
        /// The places, in words.
        looked: String,
        /// Bytes found there.
        found: u64,
    },
    /// The prefetch thread panicked.
    #[error("the prefetch thread panicked: {0}")]
    Panicked(String),
    /// The prefetch thread could not be started.
    #[error("the prefetch thread could not be started: {0}")]
    Thread(io::Error),
    /// A compressor failed.
    #[error("{format} compression failed: {source}")]
    Compression {
        /// `gzip` or `zstd`.
        format: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// A ragged batch could not be described.
    #[error(transparent)]
    Tensor(#[from] elapid_tensor::Error),
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Option`].
    pub(crate) fn option(
        option: &'static str,
        expected: impl Into<String>,
        got: impl ToString,
    ) -> Self {
        Error::Option { option, expected: expected.into(), got: got.to_string() }
    }
}
