//! Measurements of `elapid bench` on a GPU: each figure beside the limit of the card that bounds it.
//!
//! `limits.rs` finds what the card can do at most, `sampling.rs` times work by events in the card's stream and makes
//! figures of both. The other files are the work: single kernels (`kernels.rs`), larger pieces of a model (`parts.rs`),
//! the scan at growing lengths, whole training steps, prefill and decode. Models get cheap values (`values.rs`): they do
//! not change the time. Kernels alone are measured in bf16, models in the type that was asked for.

mod decode;
mod inference;
mod kernels;
mod limits;
mod parts;
mod prefill;
mod sampling;
mod scaling;
mod table;
mod training;
mod values;

use anyhow::Result;
use elapid_ops::decode_step::Encoding;
use elapid_tensor::cuda::Gpu;
use elapid_tensor::{DType, Device};
use serde::Serialize;

use super::Subject;
use crate::output::bytes;
use inference::Inference;
use limits::{Limits, Rate};
use sampling::{Figure, Task, Times};
use scaling::Scaling;
use training::Training;

pub use training::ModelShape;

/// All that was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The card.
    device: DeviceReport,
    /// Type of the products in models.
    dtype: &'static str,
    /// What the card gives.
    limits: Vec<Rate>,
    /// One a task, in the order of measurement.
    figures: Vec<Figure>,
    /// The scan at growing lengths.
    scan_scaling: Vec<Scaling>,
    /// Training steps.
    training: Vec<Training>,
    /// Prefill and decode.
    inference: Option<Inference>,
}

/// The card, or its emulation.
#[derive(Debug, Serialize)]
struct DeviceReport {
    id: String,
    name: String,
    multiprocessors: usize,
    #[serde(flatten)]
    card: Option<CardReport>,
}

/// What only a card has.
#[derive(Debug, Serialize)]
struct CardReport {
    compute_capability: String,
    memory_bytes: usize,
    /// Before anything was measured.
    free_bytes: Option<usize>,
    /// The newest CUDA version that the driver knows.
    driver_cuda: String,
}

impl DeviceReport {
    fn of(gpu: &Gpu) -> Self {
        let card = gpu.card();
        Self {
            id: gpu.to_string(),
            name: card.map_or("emulated on the host", |card| card.name()).to_owned(),
            multiprocessors: gpu.multiprocessors(),
            card: card.map(|card| {
                let (major, minor) = card.capability();
                CardReport {
                    compute_capability: format!("{major}.{minor}"),
                    memory_bytes: card.total_memory(),
                    free_bytes: card.memory().ok().map(|(free, _)| free),
                    driver_cuda: card.driver_version(),
                }
            }),
        }
    }
}

/// What is asked for.
#[derive(Debug)]
pub struct Settings<'a> {
    /// What to measure.
    pub subjects: &'a [Subject],
    /// Tiny sizes, which tell that everything works but nothing about the card.
    pub quick: bool,
    /// Samples of every figure.
    pub repeats: usize,
    /// Type of the products in models.
    pub dtype: DType,
    /// Models to train, with their batches, or to decode or read prompts with; the usual ones if empty.
    pub models: &'a [ModelShape],
    /// Sequences of a decode step or that read prompts; the usual numbers if empty.
    pub batches: &'a [usize],
    /// Tokens of the prompts that are read, and after which decode steps go on; the usual ones if empty.
    pub prompts: &'a [usize],
    /// How decode steps keep weights; in every way if empty.
    pub weights: &'a [Encoding],
    /// How decode steps keep the recurrent state.
    pub state: DType,
}

/// Measurement under way.
struct Bench {
    gpu: Gpu,
    dtype: DType,
    quick: bool,
    repeats: usize,
    limits: Limits,
    figures: Vec<Figure>,
}

impl Bench {
    fn device(&self) -> Device {
        Device::Cuda(self.gpu.id())
    }

    /// Times `run`, which is given the number of the call.
    fn time(&self, run: impl FnMut(usize) -> Result<()>) -> Result<Times> {
        sampling::time(&self.gpu, self.repeats, self.quick, run)
    }

    /// Times a task and says so.
    fn measure(&mut self, task: Task, run: impl FnMut(usize) -> Result<()>) -> Result<()> {
        let times = self.time(run)?;
        self.add(Figure::new(task, times, &self.limits));
        Ok(())
    }

    fn add(&mut self, figure: Figure) {
        let (time, share) = (super::table::duration(figure.seconds), 100.0 * figure.share);
        let peak = figure.peak_bytes.map(|peak| format!(", peak {}", bytes(peak as u64)));
        let peak = peak.unwrap_or_default();
        eprintln!("  {} ({}): {time}, {share:.1} %{peak}", figure.name, figure.shape);
        self.figures.push(figure);
    }
}

/// Measures on a GPU.
///
/// # Errors
/// Those of the operations measured. A model that does not fit is no error.
pub fn run(gpu: &Gpu, settings: &Settings<'_>) -> Result<Report> {
    let Settings { subjects, quick, repeats, dtype, models, batches, prompts, weights, state } =
        *settings;
    let device = DeviceReport::of(gpu);
    eprintln!("limits of {}", device.name);
    let limits = Limits::measure(gpu, repeats, quick)?;
    let figures = Vec::new();
    let mut bench = Bench { gpu: gpu.clone(), dtype, quick, repeats, limits, figures };
    let wanted = |subject| subjects.contains(&subject);
    if wanted(Subject::Ops) {
        eprintln!("operations");
        kernels::run(&mut bench)?;
        parts::run(&mut bench)?;
    }
    let mut scan_scaling = Vec::new();
    if wanted(Subject::Scan) {
        eprintln!("scan at growing lengths");
        scan_scaling = scaling::run(&bench)?;
    }
    let mut training = Vec::new();
    if wanted(Subject::Train) {
        eprintln!("training in {dtype}");
        training = training::run(&bench, models)?;
    }
    let (mut decode, mut prefill) = (wanted(Subject::Decode), wanted(Subject::Prefill));
    if decode && dtype == DType::BF16 {
        eprintln!("decode steps");
        decode::run(&mut bench, models, batches, prompts, weights, state)?;
        decode = false;
    }
    if prefill && dtype == DType::BF16 {
        eprintln!("reading prompts");
        prefill::run(&mut bench, models, batches, prompts)?;
        prefill = false;
    }
    let inference = if decode || prefill {
        eprintln!("inference in {dtype}");
        Some(inference::run(&mut bench, decode, prefill)?)
    } else {
        None
    };
    Ok(Report {
        device,
        dtype: dtype.name(),
        limits: bench.limits.into_rates(),
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

    /// The card's name.
    pub fn device_name(&self) -> &str {
        &self.device.name
    }
}
