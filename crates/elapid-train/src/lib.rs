//! The training loop: configuration, schedules, metrics, exact resume.
//!
//! [`config`] reads one TOML file a run, [`schedule`] gives the learning rate of a step, [`metrics`]
//! records what happens, [`progress`] shows it while it happens and [`plot`] draws it afterwards.

pub mod config;
mod diagnose;
pub mod error;
pub mod evaluate;
mod feed;
pub mod metrics;
pub mod optimizer;
pub mod plot;
pub mod progress;
pub mod schedule;
pub mod trainer;

pub use elapid_data::SourceOptions;
pub use error::{Error, Result};
pub use feed::{Dataset, Feed, Synthetic};
