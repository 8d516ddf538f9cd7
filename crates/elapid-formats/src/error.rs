//! What can go wrong with files: the file, what was expected there, and what was found.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// A tensor of a file that does not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorProblem {
    /// The tensor's name in the file.
    pub name: String,
    /// What should be there.
    pub expected: String,
    /// What is there.
    pub found: String,
}

impl fmt::Display for TensorProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: expected {}, found {}", self.name, self.expected, self.found)
    }
}

/// What can go wrong with files.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file is damaged or not what its name says.
    #[error("{}: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A value of a configuration file makes no sense here.
    #[error("{}: {key}: expected {expected}, found {found}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is allowed.
        expected: String,
        /// What was found.
        found: String,
    },
    /// Tensors of a file do not fit the model.
    #[error("{} does not fit the model:{}", path.display(), problem_list(problems, *total))]
    Tensors {
        /// The file.
        path: PathBuf,
        /// The first problems.
        problems: Vec<TensorProblem>,
        /// Number of all problems.
        total: usize,
    },
    /// The file was written for another model, format or version.
    #[error("{}: {what}: expected {expected}, found {found}", path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// What is needed.
        expected: String,
        /// What the file has.
        found: String,
    },
    /// The hub has not what was asked for, or does not give it.
    #[error(transparent)]
    Hub(Box<crate::hub::HubError>),
    /// A model could not be built or visited.
    #[error(transparent)]
    Model(Box<elapid_models::Error>),
    /// A tensor could not be built or read.
    #[error(transparent)]
    Tensor(Box<elapid_tensor::Error>),
}

impl From<crate::hub::HubError> for Error {
    fn from(error: crate::hub::HubError) -> Self {
        Self::Hub(Box::new(error))
    }
}

impl From<elapid_models::Error> for Error {
    fn from(error: elapid_models::Error) -> Self {
        Self::Model(Box::new(error))
    }
}

impl From<elapid_tensor::Error> for Error {
    fn from(error: elapid_tensor::Error) -> Self {
        Self::Tensor(Box::new(error))
    }
}

fn problem_list(problems: &[TensorProblem], total: usize) -> String {
    let mut text: String = problems.iter().map(|problem| format!("\n  {problem}")).collect();
    if total > problems.len() {
        text += &format!("\n  and {} more", total - problems.len());
    }
    text
}

impl Error {
    /// A closure that turns a system error into [`Error::Io`].
    pub(crate) fn io<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Self + 'a {
        move |source| Self::Io { action, path: path.into(), source }
    }

    /// An [`Error::Format`].
    pub(crate) fn format(path: &Path, message: impl Into<String>) -> Self {
        Self::Format { path: path.into(), message: message.into() }
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
