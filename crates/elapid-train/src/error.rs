//! The errors of this crate: one enum, each variant with what was expected and what was found.

use std::fmt;
use std::path::{Path, PathBuf};

/// What can go wrong while a run is configured, trained or recorded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be read, written, created or renamed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was attempted, as a verb: "read", "create", "append to".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A configuration is not TOML.
    #[error("{place}: not valid TOML: {message}")]
    Syntax {
        /// File and line, or the override.
        place: Place,
        /// The parser's explanation.
        message: String,
    },
    /// A configuration holds a table or key that does not exist.
    #[error("{place}: unknown key `{key}`{hint}")]
    UnknownKey {
        /// File and line, or the override.
        place: Place,
        /// Full path of the key, such as `optimizer.learning_rate`.
        key: String,
        /// The nearest valid key and the other keys of that table, ready to be appended.
        hint: String,
    },
    /// A configuration value has the wrong type or is out of range.
    #[error("{place}: `{key}`: expected {expected}, found {found}")]
    BadValue {
        /// File and line, or the override.
        place: Place,
        /// Full path of the key.
        key: String,
        /// The values that are allowed.
        expected: String,
        /// The value that was given.
        found: String,
    },
    /// A metrics file has a line that is not one of ours.
    #[error("{}:{line}: not a metrics record: {message}", path.display())]
    MetricsLine {
        /// The JSON lines file.
        path: PathBuf,
        /// One-based line number.
        line: usize,
        /// The parser's explanation.
        message: String,
    },
    /// A checkpoint is missing, cannot be used, or belongs to another run.
    #[error("{message}")]
    Checkpoint {
        /// The checkpoint and what is wrong with it.
        message: String,
    },
    /// Training broke down; the model and the last checkpoint are as before the step.
    #[error(
        "step {step}: {what}; first bad tensor: {first_bad}; {}",
        last_good.as_ref().map_or("no checkpoint was saved yet".into(), |path| format!(
            "the last good checkpoint is {}", path.display()
        ))
    )]
    Diverged {
        /// The step that failed, counted from 1.
        step: u64,
        /// Which figure went wrong.
        what: String,
        /// The first parameter, activation or gradient that is not finite.
        first_bad: String,
        /// The newest checkpoint.
        last_good: Option<PathBuf>,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(Box<elapid_tensor::Error>),
    /// The model failed.
    #[error(transparent)]
    Model(Box<elapid_models::Error>),
    /// The data failed.
    #[error(transparent)]
    Data(Box<elapid_data::Error>),
    /// A file could not be read or written.
    #[error(transparent)]
    Format(Box<elapid_formats::Error>),
    /// A plot could not be drawn.
    #[error("cannot plot {}: {message}", path.display())]
    Plot {
        /// The SVG file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
}

/// Errors of the other crates are boxed: this one is returned everywhere and should be small.
macro_rules! from_boxed {
    ($($variant:ident: $error:ty;)*) => {$(
        impl From<$error> for Error {
            fn from(error: $error) -> Self {
                Self::$variant(Box::new(error))
            }
        }
    )*};
}

from_boxed! {
    Tensor: elapid_tensor::Error;
    Model: elapid_models::Error;
    Data: elapid_data::Error;
    Format: elapid_formats::Error;
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Builds the closure that `map_err` wants for an operating-system error at `path`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}

/// Where a configuration value comes from, for error messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A line of a file, one-based; `None` when no line can be named.
    File(PathBuf, Option<usize>),
    /// An override `--set key=value`, as it was written.
    Override(String),
    /// No text at all: a configuration built in code, or a value that is missing everywhere.
    Nowhere,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path, Some(line)) => write!(f, "{}:{line}", path.display()),
            Self::File(path, None) => write!(f, "{}", path.display()),
            Self::Override(text) => write!(f, "--set {text}"),
            Self::Nowhere => write!(f, "configuration"),
        }
    }
}

impl From<elapid_tensor::cuda::GpuError> for Error {
    fn from(error: elapid_tensor::cuda::GpuError) -> Self {
        elapid_tensor::Error::from(error).into()
    }
}
