//! Measurements of `elapid bench`: each figure beside the limit of the machine that bounds it.
//!
//! `limits.rs` finds what the machine can do at most (with the loops of `loops.rs`), `sampling.rs` times a piece
//! of work in turn with the limits that matter to it and makes a figure of both. The other files are the
//! work: single operations, the scan at growing lengths, a training step, prefill and decode. `gpu/` is the
//! same for a GPU.

pub mod gpu;
mod inference;
mod inputs;
mod limits;
mod loops;
mod operations;
mod sampling;
mod scaling;
mod table;
mod training;

use anyhow::Result;
use clap::ValueEnum;
use serde::Serialize;

use inference::Inference;
pub use inference::Settings as InferenceSettings;
use limits::{Meter, Survey};
use sampling::{Figure, Task};
use scaling::Scaling;
use training::Training;

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// Single operations, forward and backward, at the shapes of the training step
    Ops,
    /// The selective scan at growing lengths
    Scan,
    /// Generating token by token
    Decode,
    /// Reading a prompt
    Prefill,
    /// A training step
    Train,
}

/// All that was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What the machine gives, at the start and at the end.
    pub limits: Vec<Survey>,
    /// Bytes that a sample of the memory's rate read.
    pub memory_sample_bytes: usize,
    /// One a task, in the order of measurement.
    pub figures: Vec<Figure>,
    /// The scan at growing lengths.
    pub scan_scaling: Option<Scaling>,
    /// The training step.
    pub training: Option<Training>,
    /// Prefill and decode: one for each model and kind of weights.
    pub inference: Vec<Inference>,
}

/// Measurement under way.
struct Bench {
    meter: Meter,
    quick: bool,
    repeats: usize,
    figures: Vec<Figure>,
}

impl Bench {
    /// Measures a task (see [`sampling::measure`]) and says so.
    fn measure<P, R>(
        &mut self,
        task: Task,
        prepare: impl FnMut() -> Result<P>,
        run: impl FnMut(P) -> Result<R>,
    ) -> Result<()> {
        let figure = sampling::measure(&mut self.meter, self.repeats, task, prepare, run)?;
        eprintln!("  {}: {}", figure.name, table::duration(figure.seconds));
        self.figures.push(figure);
        Ok(())
    }
}

/// Measures `subjects` with `threads` threads, every figure `repeats` times, prefill and decode as `settings` say.
/// `quick` takes tiny sizes, which tell that
/// everything works but little about the machine.
///
/// # Errors
/// Those of the operations measured.
pub fn run(
    subjects: &[Subject],
    quick: bool,
    repeats: usize,
    threads: usize,
    free_bytes: Option<u64>,
    settings: &InferenceSettings,
) -> Result<Report> {
    // Far more than the last cache, and a modest part of what is free.
    let bytes = if quick { 128 << 20 } else { 1 << 30 };
    let bytes = free_bytes.map_or(bytes, |free| bytes.min(free as usize / 8)).max(16 << 20);
    let seconds = if quick { 2e-3 } else { 20e-3 };
    let mut bench =
        Bench { meter: Meter::new(threads, bytes, seconds), quick, repeats, figures: Vec::new() };
    eprintln!("limits of the machine");
    let mut limits = bench.meter.survey(repeats);
    let wanted = |subject| subjects.contains(&subject);

    // Training first, while the process has used no other memory.
    let training = if wanted(Subject::Train) {
        eprintln!("training");
        Some(training::run(&mut bench)?)
    } else {
        None
    };
    if wanted(Subject::Ops) {
        eprintln!("operations");
        operations::run(&mut bench)?;
    }
    let scan_scaling = if wanted(Subject::Scan) {
        eprintln!("scan at growing lengths");
        Some(scaling::run(&bench)?)
    } else {
        None
    };
    elapid_tensor::memory::trim();
    let (decode, prefill) = (wanted(Subject::Decode), wanted(Subject::Prefill));
    let inference = if decode || prefill {
        eprintln!("inference");
        inference::run(&mut bench, decode, prefill, threads, settings)?
    } else {
        Vec::new()
    };
    bench.meter.survey_again(&mut limits);
    Ok(Report {
        limits,
        memory_sample_bytes: bench.meter.bytes(),
        figures: bench.figures,
        scan_scaling,
        training,
        inference,
    })
}

impl Report {
    /// The report for people.
    pub fn to_text(&self) -> String {
        table::text(self)
    }
}
