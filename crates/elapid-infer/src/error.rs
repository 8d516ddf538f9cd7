//! What can go wrong while generating.

/// What can go wrong while generating.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The model or its state refused.
    #[error(transparent)]
    Model(Box<elapid_models::Error>),
    /// An operation failed.
    #[error(transparent)]
    Tensor(Box<elapid_tensor::Error>),
    /// An option has a value that makes no sense.
    #[error("{name}: expected {expected}, found {found}")]
    Option {
        /// The option.
        name: &'static str,
        /// What is allowed.
        expected: &'static str,
        /// What was given.
        found: String,
    },
    /// A parameter cannot be used.
    #[error("{name}: expected {expected}, found {found}")]
    Weight {
        /// Its name in the Hugging Face layout.
        name: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A model's files.
    #[error(transparent)]
    Format(std::sync::Arc<elapid_formats::Error>),
    /// A model computes something else on its device than in the reference.
    #[error(
        "self-check: {tensor} is wrong where the model is: at {place} expected {expected}, found {found}"
    )]
    SelfCheck {
        /// The weight that is damaged or whose kernel is wrong.
        tensor: String,
        /// The activation and the index in it.
        place: String,
        /// The reference.
        expected: f64,
        /// What was computed.
        found: f64,
    },
    /// There is nothing to predict a first token from.
    #[error("the prompt of sequence {sequence} is empty: at least one token is needed")]
    EmptyPrompt {
        /// Index of the request.
        sequence: usize,
    },
    /// A token id is outside the vocabulary.
    #[error(
        "token {token} at place {place} of sequence {sequence}: the vocabulary has {vocabulary} tokens"
    )]
    Token {
        /// Index of the request.
        sequence: usize,
        /// Index in the prompt.
        place: usize,
        /// The id.
        token: u32,
        /// Number of tokens of the model.
        vocabulary: usize,
    },
    /// As many requests wait as may.
    #[error("{limit} requests are waiting, which is the limit: try again once some have ended")]
    QueueFull {
        /// Requests that may wait.
        limit: usize,
    },
    /// The model's output cannot be sampled from.
    #[error(
        "the logit of token {token} at position {position} is {value}: the model's weights or state are damaged"
    )]
    Logits {
        /// The first such token.
        token: u32,
        /// Position of the token to be sampled.
        position: u64,
        /// NaN or an infinity.
        value: f32,
    },
}

impl From<elapid_formats::Error> for Error {
    fn from(error: elapid_formats::Error) -> Self {
        Self::Format(std::sync::Arc::new(error))
    }
}

// Boxed, because results are returned often and errors are not.
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

impl From<elapid_tensor::cuda::GpuError> for Error {
    fn from(error: elapid_tensor::cuda::GpuError) -> Self {
        elapid_tensor::Error::from(error).into()
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
