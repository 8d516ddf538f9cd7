//! What can go wrong while evaluating.

/// What can go wrong while evaluating.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The model refused or failed.
    #[error(transparent)]
    Infer(#[from] elapid_infer::Error),
    /// The division of the tokens failed.
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
    /// A token id is outside the vocabulary.
    #[error(
        "token {token} at place {place} of document {document}: the vocabulary has {vocabulary} tokens"
    )]
    Token {
        /// Index of the document.
        document: usize,
        /// Index in the document.
        place: usize,
        /// The id.
        token: u32,
        /// Number of tokens of the model.
        vocabulary: usize,
    },
    /// No token has one before it.
    #[error("{documents} document(s) with {tokens} token(s) in all: nothing can be predicted")]
    Nothing {
        /// Number of documents.
        documents: usize,
        /// Their tokens.
        tokens: u64,
    },
    /// The model's output is no distribution, or gives a token that came no probability at all.
    #[error(
        "the {what} of token {place} of document {document} is {value}: \
         the model's weights are damaged, or their type is too coarse"
    )]
    NotFinite {
        /// What was computed.
        what: &'static str,
        /// Index of the document.
        document: usize,
        /// Index of the predicted token in the document.
        place: usize,
        /// NaN or an infinity.
        value: f64,
    },
    /// Two models cannot be compared.
    #[error("the models have {original} and {other} tokens, expected the same vocabulary")]
    Vocabularies {
        /// Tokens of the one.
        original: usize,
        /// Tokens of the other.
        other: usize,
    },
    /// The receiver of the progress asked to stop.
    #[error("interrupted")]
    Interrupted,
}

// Boxed, because results are returned often and errors are not.
impl From<elapid_tensor::Error> for Error {
    fn from(error: elapid_tensor::Error) -> Self {
        Self::Tensor(Box::new(error))
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
