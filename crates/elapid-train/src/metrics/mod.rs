//! What a run records: one JSON object a line for people and scripts, TensorBoard event files for
//! those who watch many runs, and the memory figure that both show.

pub mod jsonl;
pub mod memory;
pub mod tensorboard;

use serde::{Deserialize, Deserializer, Serialize};

/// One line of the metrics file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// After an optimizer step.
    Train(TrainRecord),
    /// After a validation.
    Validation(ValidationRecord),
}

impl Record {
    /// Optimizer steps done when the record was made.
    pub fn step(&self) -> u64 {
        match self {
            Self::Train(record) => record.step,
            Self::Validation(record) => record.step,
        }
    }
}

/// Figures of one optimizer step. Figures that are not finite are written as null.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainRecord {
    /// Optimizer steps done, this one included (so the first is 1).
    pub step: u64,
    /// Training tokens seen so far.
    pub tokens: u64,
    /// Mean cross-entropy of the step's tokens, in nats.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// The same in bits per byte of text; `None` where tokens are not text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
    /// Learning rate of the step.
    #[serde(deserialize_with = "null_is_nan")]
    pub lr: f64,
    /// Global gradient norm before clipping.
    #[serde(deserialize_with = "null_is_nan")]
    pub grad_norm: f64,
    /// Share of the batch's places that held no token.
    #[serde(deserialize_with = "null_is_nan")]
    pub padding_rate: f64,
    /// Real tokens per second of the step.
    #[serde(deserialize_with = "null_is_nan")]
    pub tokens_per_s: f64,
    /// Seconds of training so far, earlier parts of a resumed run included.
    #[serde(deserialize_with = "null_is_nan")]
    pub time_s: f64,
    /// Peak resident memory of the process in bytes, where the system tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
}

/// Figures of one validation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ValidationRecord {
    /// Optimizer steps done.
    pub step: u64,
    /// Training tokens seen so far.
    pub tokens: u64,
    /// Mean cross-entropy over the validation tokens, in nats.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// The same in bits per byte of text; `None` where tokens are not text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
    /// Share of right answers, for tasks that have answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Seconds that the validation took.
    #[serde(deserialize_with = "null_is_nan")]
    pub time_s: f64,
}

/// JSON has no NaN and no infinity; serde_json writes null for them, which comes back as NaN.
fn null_is_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}
