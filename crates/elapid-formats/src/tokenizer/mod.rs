//! Text to token ids and back: any `tokenizer.json`, plain bytes, or the vocabulary inside a GGUF file.
//!
//! The algorithms are those of the crate `tokenizers`. What is here: where a model's tokenizer is found
//! ([`Tokenizer::find`]), which tokens end a sequence ([`end_of_sequence`]), the way from GGUF's lists to a
//! tokenizer and back ([`Vocabulary`]), and decoding one token at a time ([`Detokenizer`]).

mod bpe;
mod bytes;
mod file;
mod find;
mod parts;
mod stream;
mod vocabulary;

use std::cell::Cell;
use std::fmt;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokenizers::DecoderWrapper;

pub use find::{LOOKED_FOR, end_of_sequence};
pub use stream::Detokenizer;
pub use vocabulary::{TokenKind, Vocabulary};

use crate::{Error, Result};

/// The file name of a model folder's tokenizer.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// The largest published ones have some tens of megabytes.
const LARGEST: u64 = 256 << 20;
/// Characters of an error that are shown.
const LONGEST_REASON: usize = 400;

/// Text to token ids and back. A clone shares the tables.
#[derive(Clone)]
pub struct Tokenizer(Kind);

#[derive(Clone)]
enum Kind {
    Bytes,
    Subwords(Arc<Subwords>),
}

struct Subwords {
    /// Where it came from, for errors.
    source: PathBuf,
    inner: tokenizers::Tokenizer,
    /// Tokens are sequences of bytes in the byte-level alphabet, so each can be decoded by itself.
    byte_level: bool,
    /// What the vocabulary itself says about the end of a text (GGUF).
    end_of_sequence: Vec<u32>,
}

impl Tokenizer {
    /// A token is a byte.
    pub fn bytes() -> Self {
        Self(Kind::Bytes)
    }

    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// If there is no such file, or it describes no tokenizer that is known.
    pub fn open(path: &Path) -> Result<Self> {
        let file = crate::tensor_file::open_regular(path)?;
        let mut text = Vec::new();
        file.take(LARGEST + 1).read_to_end(&mut text).map_err(Error::io("read", path))?;
        if text.len() as u64 > LARGEST {
            return Err(Error::format(path, format!("larger than {LARGEST} bytes")));
        }
        Self::from_json(path, &text)
    }

    /// A tokenizer from the text of a `tokenizer.json`; `source` is for errors. Its padding and truncation,
    /// which are for training of other models, are left out.
    ///
    /// # Errors
    /// If it describes no tokenizer that is known.
    pub fn from_json(source: &Path, text: &[u8]) -> Result<Self> {
        Self::build(source, guarded(|| file::read(text)), Vec::new())
    }

    fn build(
        source: &Path,
        inner: tokenizers::Result<tokenizers::Tokenizer>,
        end_of_sequence: Vec<u32>,
    ) -> Result<Self> {
        let refuse = |error: tokenizers::Error| {
            // Errors may quote the file.
            let error: String = error.to_string().chars().take(LONGEST_REASON).collect();
            Error::format(source, format!("no usable tokenizer: {error}"))
        };
        let mut inner = inner.map_err(refuse)?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(refuse)?;
        let byte_level = matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let source = source.to_path_buf();
        Ok(Self(Kind::Subwords(Arc::new(Subwords { source, inner, byte_level, end_of_sequence }))))
    }

    /// True if a token is a byte.
    pub fn is_bytes(&self) -> bool {
        matches!(self.0, Kind::Bytes)
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        match &self.0 {
            Kind::Bytes => 256,
            Kind::Subwords(own) => {
                own.inner.get_vocab(true).values().max().map_or(0, |&last| last as usize + 1)
            }
        }
    }

    /// The ids of a text. `add_special` adds what the tokenizer puts around a whole text, often nothing.
    ///
    /// # Errors
    /// If the tokenizer cannot encode it.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        match &self.0 {
            Kind::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Kind::Subwords(own) => match guarded(|| own.inner.encode_fast(text, add_special)) {
                Ok(encoding) => Ok(encoding.get_ids().to_vec()),
                Err(error) => {
                    Err(Error::format(&own.source, format!("the text cannot be encoded: {error}")))
                }
            },
        }
    }

    /// [`Tokenizer::encode`] of bytes that may be no text, which only byte models read.
    ///
    /// # Errors
    /// Also if the bytes are not UTF-8 and the tokens are not bytes.
    pub fn encode_bytes(&self, bytes: &[u8], add_special: bool) -> Result<Vec<u32>> {
        match &self.0 {
            Kind::Bytes => Ok(bytes.iter().copied().map(u32::from).collect()),
            Kind::Subwords(own) => match std::str::from_utf8(bytes) {
                Ok(text) => self.encode(text, add_special),
                Err(error) => Err(Error::format(
                    &own.source,
                    format!("this tokenizer reads UTF-8 text: {error}"),
                )),
            },
        }
    }

    /// The text of ids. Bytes that are no characters become U+FFFD; ids without a token give nothing.
    /// `skip_special` leaves out tokens that are marks, not text.
    ///
    /// # Errors
    /// If the tokenizer cannot decode them.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        match &self.0 {
            Kind::Bytes => {
                let bytes: Vec<u8> = ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Kind::Subwords(own) => own.decode(ids, skip_special).map_err(|error| {
                Error::format(&own.source, format!("the tokens cannot be decoded: {error}"))
            }),
        }
    }

    /// Decodes one token after the other. Marks that are not text are left out. Decoders that treat the
    /// first token of a text differently are told which tokens stand `before`.
    pub fn detokenizer(&self, before: &[u32]) -> Detokenizer {
        Detokenizer::new(self.clone(), before)
    }

    /// The id of a token as it is written in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        match &self.0 {
            Kind::Bytes => match *token.as_bytes() {
                [byte] => Some(byte.into()),
                _ => None,
            },
            Kind::Subwords(own) => own.inner.token_to_id(token),
        }
    }

    /// Where it was read from; none for bytes.
    pub fn source(&self) -> Option<&Path> {
        match &self.0 {
            Kind::Bytes => None,
            Kind::Subwords(own) => Some(&own.source),
        }
    }
}

impl Subwords {
    fn decode(&self, ids: &[u32], skip_special: bool) -> tokenizers::Result<String> {
        guarded(|| self.inner.decode(ids, skip_special))
    }

    /// True for a mark that is not text.
    fn is_special(&self, token: &str) -> bool {
        self.inner.get_added_vocabulary().is_special_token(token)
    }
}

/// The library takes for granted that the rules of a file fit each other and every text, and panics where they do not
/// (a compiled table of characters that points outside of itself, say). That is an error of the file.
fn guarded<R>(work: impl FnOnce() -> tokenizers::Result<R>) -> tokenizers::Result<R> {
    let outer = GUARDED.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(outer);
    outcome.unwrap_or_else(|_| Err("its rules do not fit each other, or not this text".into()))
}

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic of this thread now would become an error of a tokenizer's file: for panic hooks, which need say nothing.
pub fn is_guarded() -> bool {
    GUARDED.get()
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.source() {
            None => f.write_str("Tokenizer(bytes)"),
            Some(source) => write!(f, "Tokenizer({})", source.display()),
        }
    }
}
