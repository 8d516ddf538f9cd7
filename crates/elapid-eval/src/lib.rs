//! How well a model predicts: perplexity and bits per byte of a text, and how far another model (a quantised one)
//! is from it.
//!
//! A text is a list of [`Document`]s, none of which knows of the others. [`Reading`] says what a token is predicted
//! from: everything before it in its document, with the state carried through, or a sliding window. [`perplexity`]
//! and [`kl_divergence`] run any [`Runner`](elapid_infer::Runner) in constant memory.

mod divergence;
mod document;
mod error;
mod logits;
mod perplexity;
mod walk;

pub use divergence::{Divergence, kl_divergence};
pub use document::{Document, Tokens, words};
pub use error::{Error, Result};
pub use perplexity::{Perplexity, bits_per_byte, perplexity, word_perplexity};
pub use walk::{Options, Progress, Reading};
