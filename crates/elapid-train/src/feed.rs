//! What a run trains and validates on: bytes of files, or a synthetic task drawn afresh.
//!
//! A feed hands out batches with the place that follows each, a JSON value that a checkpoint keeps; a feed
//! that is opened at a place goes on exactly as the one that gave it.

use std::fmt;

use elapid_data::synthetic::{InductionHeads, SelectiveCopying};
use elapid_data::{
    Batch, Documents, Loader, LoaderOptions, Position, Prefetch, SourceOptions, Span, Split,
    SplitOptions, Validation,
};
use serde_json::Value;

use crate::config::{Packing, RunConfig, SyntheticConfig, SyntheticTask};
use crate::error::{Error, Result};

/// Batches that wait ready-made.
const PREFETCH: usize = 4;
/// The seed of validation samples is this far from the run's, so no training sample is validated on.
const VALIDATION_SEED: u64 = 0x5641_4C49;

/// Training batches in order.
pub struct Feed {
    items: Prefetch<(Batch, Value)>,
}

impl Feed {
    /// The next batch and the place after it.
    ///
    /// # Errors
    /// The data fails to be read.
    pub fn next_batch(&mut self) -> Result<(Batch, Value)> {
        let item = self.items.next_item()?;
        item.ok_or_else(|| Error::Checkpoint { message: "the data ended".into() })
    }
}

/// The data of a run: documents, or a task.
pub enum Dataset {
    /// Bytes.
    Bytes {
        /// All that `data.paths` gave.
        documents: Documents,
        /// The part of it that is trained on.
        train: Vec<Span>,
        /// The training loader, at its beginning.
        loader: Box<Loader>,
        /// The held-out windows; none if nothing is held out.
        validation: Option<Validation>,
        /// Bytes of the training part.
        train_bytes: u64,
        /// Bytes of the validation part.
        validation_bytes: u64,
    },
    /// A synthetic task.
    Synthetic(Synthetic),
}

/// A synthetic task and the sizes of its batches.
#[derive(Debug, Clone)]
pub struct Synthetic {
    config: SyntheticConfig,
    batch_size: usize,
    seed: u64,
}

impl Dataset {
    /// Opens the data that a configuration names.
    ///
    /// # Errors
    /// Data that is missing, unreadable or too small.
    pub fn open(config: &RunConfig) -> Result<Self> {
        let data = &config.data;
        let context = config.sequence_tokens();
        let batch_tokens = config.tokens_per_batch();
        if let Some(task) = &data.synthetic {
            return Ok(Self::Synthetic(Synthetic {
                config: task.clone(),
                batch_size: (batch_tokens / context).max(1),
                seed: config.train.seed,
            }));
        }
        let source = |paths: &[String]| SourceOptions {
            paths: paths.iter().map(Into::into).collect(),
            extensions: data.extensions.clone(),
            separator: data.separator.as_ref().map(|text| text.clone().into_bytes()),
        };
        let documents = Documents::load(&source(&data.paths))?;
        let held_out = match data.validation_paths.as_slice() {
            [] => None,
            paths => Some(Documents::load(&source(paths))?),
        };
        Self::from_documents(config, documents, held_out)
    }

    /// The same for documents that are in memory; without `held_out`, part of them is held out.
    ///
    /// # Errors
    /// Documents that are too small.
    pub fn from_documents(
        config: &RunConfig,
        documents: Documents,
        held_out: Option<Documents>,
    ) -> Result<Self> {
        let data = &config.data;
        let seed = config.train.seed;
        let (train, validation) = match held_out {
            Some(other) => {
                let spans = Split::whole(&other);
                (Split::whole(&documents), Some((other, spans)))
            }
            None => {
                let options = SplitOptions { fraction: data.validation_fraction, seed };
                let split = Split::new(&documents, options)?;
                let held =
                    (!split.validation.is_empty()).then(|| (documents.clone(), split.validation));
                (split.train, held)
            }
        };
        let train_bytes = train.iter().map(|span| span.len() as u64).sum();
        let options = LoaderOptions {
            batch_tokens: config.tokens_per_batch(),
            window: match data.packing {
                Packing::None => 1,
                Packing::Greedy => data.packing_window,
            },
            carry_state: data.carry_state,
            seed,
            ..LoaderOptions::new(1, data.context)
        };
        let loader = Box::new(Loader::new(documents.clone(), train.clone(), options)?);
        let most = config.train.validation_tokens;
        let validation = validation
            .map(|(documents, spans)| {
                let tokens = config.tokens_per_batch().max(data.context);
                Validation::new(documents, spans, data.context, tokens, (most > 0).then_some(most))
            })
            .transpose()?;
        let validation_bytes =
            validation.iter().flat_map(Validation::spans).map(|span| span.len() as u64).sum();
        Ok(Self::Bytes { documents, train, loader, validation, train_bytes, validation_bytes })
    }

    /// Tokens of one pass over the training data; none for a task without end.
    pub fn epoch_tokens(&self) -> Option<u64> {
        match self {
            Self::Bytes { train_bytes, .. } => Some(*train_bytes),
            Self::Synthetic(_) => None,
        }
    }

    /// True if tokens are bytes of text, so that bits per byte mean something.
    pub fn is_text(&self) -> bool {
        matches!(self, Self::Bytes { .. })
    }

    /// Starts the feed at its beginning, or at a place that a feed of the same data gave.
    ///
    /// # Errors
    /// The place belongs to other data.
    pub fn feed(&self, place: Option<&Value>) -> Result<Feed> {
        let malformed = |error: serde_json::Error| Error::Checkpoint {
            message: format!("the place in the data cannot be read: {error}"),
        };
        let items = match self {
            Self::Bytes { loader, .. } => {
                let mut loader = loader.clone();
                if let Some(place) = place {
                    let position =
                        serde_json::from_value::<Position>(place.clone()).map_err(malformed)?;
                    loader.seek(&position).map_err(|error| match error {
                        elapid_data::Error::OtherData { .. } => Error::Checkpoint {
                            message:
                                "the training data is not that of the run: data.paths, or the \
                                      content of the files, has changed since it began"
                                    .into(),
                        },
                        other => other.into(),
                    })?;
                }
                Prefetch::spawn(PREFETCH, move || {
                    let batch = loader.next_batch()?;
                    // A struct of numbers always is a JSON value.
                    let place = serde_json::to_value(loader.position()).unwrap_or_default();
                    Ok(Some((batch, place)))
                })?
            }
            Self::Synthetic(task) => {
                let mut step = match place {
                    Some(place) => serde_json::from_value(place.clone()).map_err(malformed)?,
                    None => 0u64,
                };
                let task = task.clone();
                Prefetch::spawn(PREFETCH, move || {
                    let batch = task.batch(task.config.length, task.seed, step, task.batch_size)?;
                    step += 1;
                    Ok(Some((batch, Value::from(step))))
                })?
            }
        };
        Ok(Feed { items })
    }
}

impl fmt::Display for Synthetic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.config.task {
            SyntheticTask::InductionHeads => "induction heads",
            SyntheticTask::SelectiveCopying => "selective copying",
        };
        write!(f, "{name}, length {}, drawn afresh at every step", self.config.length)
    }
}

impl Synthetic {
    /// Lengths to validate on.
    pub fn lengths(&self) -> Vec<usize> {
        match self.config.eval_lengths.as_slice() {
            [] => vec![self.config.length],
            lengths => lengths.to_vec(),
        }
    }

    /// Fresh samples to validate on at each length.
    pub fn eval_samples(&self) -> usize {
        self.config.eval_samples
    }

    /// Validation samples `first .. first + count` at a length; never a training sample.
    ///
    /// # Errors
    /// Sizes that the task refuses.
    pub fn validation(&self, length: usize, first: u64, count: usize) -> Result<Batch> {
        Ok(self.batch(length, self.seed ^ VALIDATION_SEED, first, count)?)
    }

    fn batch(
        &self,
        length: usize,
        seed: u64,
        step: u64,
        size: usize,
    ) -> elapid_data::Result<Batch> {
        let SyntheticConfig { task, vocab_size, memorize, .. } = self.config;
        match task {
            SyntheticTask::InductionHeads => {
                InductionHeads::new(vocab_size, length, seed)?.batch(step, size)
            }
            SyntheticTask::SelectiveCopying => {
                SelectiveCopying::new(vocab_size, length, memorize, seed)?.batch(step, size)
            }
        }
    }
}
