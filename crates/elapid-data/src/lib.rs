//! From bytes on disk to batches: sources, splits, packing, prefetch, synthetic tasks and baselines.
//!
//! The way of the data is [`Documents`] (files, folders, globs; one document a file or separator) →
//! [`Split`] into training and validation [`Span`]s → [`Loader`] (windows, shuffled and packed into
//! [`Batch`]es; its place in the stream is a [`Position`]) → [`Prefetch`]. [`Validation`] is the ordered
//! pass over what was held out. [`corpus`] finds text on the machine for a run without arguments,
//! [`baselines`] says what a loss in bits per byte is worth, and [`synthetic`] makes tasks of any length.
//!
//! ```
//! use elapid_data::{Documents, Loader, LoaderOptions, Split, SplitOptions, Validation};
//!
//! let documents = Documents::from_memory((0..40u8).map(|i| vec![i; 300]));
//! let split = Split::new(&documents, SplitOptions { fraction: 0.1, seed: 0 })?;
//! let mut loader = Loader::new(documents.clone(), split.train, LoaderOptions::new(4, 128))?;
//! let batch = loader.next_batch()?;
//! assert_eq!(batch.ids.len(), batch.sequences.tokens());
//!
//! // A saved place gives the same batches again.
//! let place = loader.position().clone();
//! let next = loader.next_batch()?;
//! loader.seek(&place)?;
//! assert_eq!(loader.next_batch()?, next);
//!
//! let validation = Validation::new(documents, split.validation, 128, 512, None)?;
//! assert_eq!(validation.batches().count(), 3);
//! # Ok::<(), elapid_data::Error>(())
//! ```

pub mod baselines;
mod batch;
pub mod corpus;
mod error;
mod loader;
mod packing;
mod prefetch;
mod shuffle;
mod source;
mod split;
pub mod synthetic;
mod validation;
mod windows;

pub use batch::{Batch, IGNORE};
pub use error::{Error, Result};
pub use loader::{Loader, LoaderOptions, Position};
pub use packing::{Packer, padding_rate};
pub use prefetch::Prefetch;
pub use source::{Documents, SourceOptions};
pub use split::{Span, Split, SplitOptions};
pub use validation::Validation;
