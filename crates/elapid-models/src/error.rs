//! What can go wrong with models.

/// What can go wrong with models.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// An operation failed.
    #[error(transparent)]
    Tensor(#[from] elapid_tensor::Error),
    /// A configuration value makes no sense.
    #[error("{key}: expected {expected}, found {found}")]
    Config {
        /// The configuration key.
        key: &'static str,
        /// What is allowed.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A state does not fit the model or the batch.
    #[error("state: {0}")]
    State(String),
    /// A preset's name is unknown.
    #[error("unknown model {name:?}, expected one of {known}")]
    UnknownPreset {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: String,
    },
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
