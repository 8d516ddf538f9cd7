//! NVIDIA GPUs and the libraries that they need, found and missing.

use elapid_tensor::cuda::libraries::{Found, libraries};
use elapid_tensor::cuda::{Card, Gpu};
use serde::Serialize;

use crate::output::{Table, bytes};

/// What there is.
#[derive(Debug, Serialize)]
pub struct Gpus {
    pub libraries: Vec<Library>,
    pub cards: Vec<CardReport>,
    /// Why no card could be asked, if so.
    pub problem: Option<String>,
}

/// A library that is looked for at run time.
#[derive(Debug, Serialize)]
pub struct Library {
    pub name: &'static str,
    pub path: Option<String>,
    /// What is wrong with it and what to do.
    pub problem: Option<String>,
}

/// One card.
#[derive(Debug, Serialize)]
pub struct CardReport {
    pub device: String,
    pub name: String,
    pub compute_capability: String,
    pub multiprocessors: usize,
    pub memory_bytes: usize,
    pub free_bytes: Option<usize>,
    /// The newest CUDA version that the driver knows.
    pub driver_cuda: String,
}

impl Gpus {
    /// Asks.
    pub fn find() -> Self {
        let found = libraries();
        let libraries = [&found.driver, &found.nvrtc, &found.cublaslt].map(Library::new).into();
        let mut cards = Vec::new();
        let mut problem = None;
        match Card::count() {
            Ok(count) => {
                for ordinal in 0..count {
                    match Gpu::open(ordinal as u16) {
                        Ok(gpu) => cards.extend(gpu.card().map(|card| CardReport::new(&gpu, card))),
                        Err(error) => problem = Some(error.to_string()),
                    }
                }
            }
            Err(error) => problem = Some(error.to_string()),
        }
        Self { libraries, cards, problem }
    }

    /// Adds the rows for people.
    pub fn rows(&self, table: &mut Table) {
        for card in &self.cards {
            let free = card.free_bytes.map_or("unknown".into(), |free| bytes(free as u64));
            table.row(
                &card.device,
                format!(
                    "{}, compute capability {}, {} multiprocessors, {} ({free} free), driver for CUDA {}",
                    card.name,
                    card.compute_capability,
                    card.multiprocessors,
                    bytes(card.memory_bytes as u64),
                    card.driver_cuda
                ),
            );
        }
        if self.cards.is_empty() {
            table.row("gpu", self.problem.as_deref().unwrap_or("no NVIDIA GPU was found"));
        }
        // Without a driver the other libraries are of no use, and their absence no news.
        if self.libraries.first().is_some_and(|driver| driver.path.is_some()) {
            for library in &self.libraries {
                let path = library.path.as_deref().unwrap_or_default();
                table.row(library.name, library.problem.as_deref().unwrap_or(path));
            }
        }
    }
}

impl Library {
    fn new(found: &Found) -> Self {
        Self {
            name: found.name,
            path: found.path.as_ref().map(|path| path.display().to_string()),
            problem: found.check().err().map(|error| error.to_string()),
        }
    }
}

impl CardReport {
    fn new(gpu: &Gpu, card: &Card) -> Self {
        let (major, minor) = card.capability();
        Self {
            device: gpu.to_string(),
            name: card.name().to_owned(),
            compute_capability: format!("{major}.{minor}"),
            multiprocessors: card.multiprocessors(),
            memory_bytes: card.total_memory(),
            free_bytes: card.memory().ok().map(|(free, _)| free),
            driver_cuda: card.driver_version(),
        }
    }
}
