//! Reading prompts and generating token by token on the CPU's decode engine: for each shape of model and each way to
//! hold weights, prompts of several lengths and steps of several sequences (random weights: values do not change the
//! time).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use anyhow::{Context as _, Result};
use elapid_formats::StoredTensor;
use elapid_infer::{CpuEngine, Logits, Runner};
use elapid_models::{Kind, MambaConfig, ParameterOutline, State, parameter_outlines};
use elapid_ops::blocks::Encoding;
use elapid_tensor::rng::Rng;
use elapid_tensor::{Sequences, memory};
use elapid_train::metrics::memory::peak_memory_bytes;
use serde::Serialize;

use super::Bench;
use super::inputs::Inputs;
use super::sampling::{Task, Work};
use super::training::reset_process_peak;

/// What is measured; the usual where a list is empty.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Names and shapes of models.
    pub models: Vec<(String, MambaConfig)>,
    /// How projections and embedding are held.
    pub weights: Vec<Encoding>,
    /// Sequences of a decode step.
    pub batches: Vec<usize>,
    /// Tokens of a prompt.
    pub prompts: Vec<usize>,
}

/// What the figures do not tell of one model with weights of one kind.
#[derive(Debug, Serialize)]
pub struct Inference {
    /// Name of the model's shape.
    pub model: String,
    /// How projections and embedding are held.
    pub weights: &'static str,
    /// Parameters.
    pub parameters: usize,
    /// Bytes of weights that a decode step reads.
    pub weight_bytes: usize,
    /// Bytes of one sequence's state, which a decode step reads and writes.
    pub state_bytes: usize,
    /// Most memory of the process while it read the longest prompt and decoded the largest batch, where the system
    /// tells it and lets it be reset.
    pub process_peak_bytes: Option<u64>,
}

/// Decode steps in a timed run.
const STEPS: usize = 8;
/// The name of such a run.
const DECODE: &str = "8 decode steps";

/// Measures one of them or both.
pub fn run(
    bench: &mut Bench,
    decode: bool,
    prefill: bool,
    threads: usize,
    settings: &Settings,
) -> Result<Vec<Inference>> {
    let quick = bench.quick;
    let or = |given: &[usize], quick_usual: &[usize], usual: &[usize]| match given {
        [] if quick => quick_usual.to_vec(),
        [] => usual.to_vec(),
        some => some.to_vec(),
    };
    let models = match settings.models.as_slice() {
        [] if quick => vec![("bytes".to_owned(), MambaConfig::bytes(64, 2))],
        [] => vec![("mamba-130m".to_owned(), MambaConfig::preset("mamba-130m")?)],
        some => some.to_vec(),
    };
    let encodings = match settings.weights.as_slice() {
        [] if quick => vec![Encoding::F32, Encoding::Q8_0],
        [] => Encoding::ALL.into_iter().filter(|&own| own != Encoding::Q6_K).collect(),
        some => some.to_vec(),
    };
    let batches = or(&settings.batches, &[1, 3], &[1, 8, 32]);
    let prompts = or(&settings.prompts, &[20], &[512]);
    let mut reports = Vec::new();
    for (name, config) in &models {
        for &encoding in &encodings {
            eprintln!("  making random weights: {name} in {encoding}");
            let mut engine = engine(config, encoding, threads)?;
            let mut subject = Subject { bench, name, config, encoding, engine: &mut engine };
            let most = |counts: &[usize]| counts.iter().copied().max().unwrap_or(1);
            let peaks = if prefill { subject.peaks(&prompts)? } else { BTreeMap::new() };
            let report = subject.memory(most(&prompts), most(&batches))?;
            reports.push(report);
            if prefill {
                for &prompt in &prompts {
                    subject.prefill(prompt, peaks.get(&prompt).copied())?;
                }
            }
            if decode {
                for &batch in &batches {
                    subject.decode(batch)?;
                }
            }
        }
    }
    Ok(reports)
}

/// An engine whose weights are made one by one, so that none is held twice.
fn engine(config: &MambaConfig, encoding: Encoding, threads: usize) -> Result<CpuEngine> {
    let outlines: Vec<ParameterOutline> = parameter_outlines(config).collect();
    let made = |name: &str| {
        let outline = outlines.iter().find(|outline| outline.name == name)?;
        tensor(outline)
    };
    Ok(CpuEngine::from_tensors(config, &made, Some(encoding), threads)?)
}

/// Values of the size that an initialisation gives. A short random run is repeated.
fn tensor(outline: &ParameterOutline) -> Option<StoredTensor> {
    /// A prime, so that rows do not repeat.
    const RUN: usize = 65_521;
    let columns = outline.shape.last().copied().unwrap_or(1) as f64;
    let (low, high) = match (outline.kind, outline.shape.len()) {
        (Kind::Scale | Kind::Skip, _) => (0.9, 1.1),
        (Kind::Recurrence, _) => (0.0, 2.7),
        (Kind::DeltaProjection, 1) => (-6.0, -2.0),
        (Kind::Convolution, _) => (-0.5, 0.5),
        (Kind::Embedding, _) => (-0.03, 0.03),
        (Kind::Bias, _) => (-0.1, 0.1),
        _ => (-columns.recip().sqrt(), columns.recip().sqrt()),
    };
    let elements = outline.shape.iter().product::<usize>();
    let mut rng = Rng::new(0, elements as u64);
    let run: Vec<u8> = (0..RUN.min(elements))
        .flat_map(|_| ((low + (high - low) * rng.uniform()) as f32).to_le_bytes())
        .collect();
    let mut bytes = vec![0; elements * size_of::<f32>()];
    for part in bytes.chunks_mut(run.len().max(1)) {
        part.copy_from_slice(&run[..part.len()]);
    }
    StoredTensor::new(Encoding::F32, outline.shape.to_vec(), bytes.into()).ok()
}

struct Subject<'a> {
    bench: &'a mut Bench,
    name: &'a str,
    config: &'a MambaConfig,
    encoding: Encoding,
    engine: &'a mut CpuEngine,
}

impl Subject<'_> {
    /// Most memory of the process while it reads a prompt of each length, where the system tells it. The shortest comes
    /// first, as a process keeps memory that it had.
    fn peaks(&mut self, prompts: &[usize]) -> Result<BTreeMap<usize, u64>> {
        let mut peaks = BTreeMap::new();
        for prompt in BTreeSet::from_iter(prompts) {
            let resets = self.start_peak();
            self.read(*prompt)?;
            peaks.extend(peak_memory_bytes().filter(|_| resets).map(|peak| (*prompt, peak)));
        }
        Ok(peaks)
    }

    /// Reads a prompt and decodes a step of a batch, which also brings the weights into memory.
    fn memory(&mut self, prompt: usize, batch: usize) -> Result<Inference> {
        let resets = self.start_peak();
        let state = self.read(prompt)?;
        let state_bytes = state_bytes(&state);
        self.step(&mut Some(self.engine.fresh_state(batch)?), batch)?;
        Ok(Inference {
            model: self.name.to_owned(),
            weights: self.encoding.name(),
            parameters: self.config.parameter_count(),
            weight_bytes: self.engine.weight_bytes(),
            state_bytes,
            process_peak_bytes: peak_memory_bytes().filter(|_| resets),
        })
    }

    /// Starts the process's peak anew, from what the model needs; false where that cannot be done.
    fn start_peak(&mut self) -> bool {
        // The samples of the memory's rate are no part of it.
        self.bench.meter.release_memory();
        memory::trim();
        reset_process_peak()
    }

    fn read(&mut self, prompt: usize) -> Result<State> {
        let ids = Inputs::new().tokens(prompt, self.config.vocab_size);
        advance(self.engine, &ids, &Sequences::uniform(1, prompt), None, &[prompt - 1])
    }

    fn prefill(&mut self, prompt: usize, peak: Option<u64>) -> Result<()> {
        let config = self.config;
        let embedding = config.padded_vocab_size() * config.d_model;
        let blocks = config.parameter_count() - embedding;
        let updates = (config.d_inner() * config.d_state * config.n_layer * prompt) as f64;
        let flops = 2.0 * (blocks as f64 * prompt as f64 + embedding as f64);
        let task = Task {
            name: "prefill",
            shape: format!("{}, {prompt} tokens, {}", self.name, self.encoding),
            tokens: prompt,
            work: Work { bytes: self.engine.weight_bytes() as f64, flops, updates },
            counted: format!(
                "2 FLOP a token for each of {blocks} parameters outside the embedding, the head for the last token, \
                 at the rate of f32 products; E N updates a token and layer; every weight is read once"
            ),
        };
        let ids = Inputs::new().tokens(prompt, self.config.vocab_size);
        let sequences = Sequences::uniform(1, prompt);
        let engine = &mut *self.engine;
        self.bench.measure(
            task,
            || Ok(()),
            |()| advance(engine, &ids, &sequences, None, &[prompt - 1]),
        )?;
        if let Some(figure) = self.bench.figures.last_mut() {
            figure.process_peak_bytes = peak;
        }
        Ok(())
    }

    /// Steps of `batch` sequences that have read something.
    fn decode(&mut self, batch: usize) -> Result<()> {
        let short = self.read(3)?;
        let state_bytes = state_bytes(&short);
        let mut state = Some(State::join(&vec![&short; batch])?);
        let work = (self.engine.weight_bytes() + 2 * state_bytes * batch) * STEPS;
        let task = Task {
            name: DECODE,
            shape: format!("{}, batch {batch}, {}", self.name, self.encoding),
            tokens: STEPS * batch,
            work: Work { bytes: work as f64, ..Work::default() },
            counted: format!(
                "{STEPS} steps a run: every weight is read once a step (the embedding as the head), the states of \
                 all sequences are read and written"
            ),
        };
        let (engine, config) = (&mut *self.engine, self.config);
        self.bench.measure(
            task,
            || Ok(()),
            |()| {
                for _ in 0..STEPS {
                    step(engine, config, &mut state, batch)?;
                }
                Ok(())
            },
        )
    }

    fn step(&mut self, state: &mut Option<State>, batch: usize) -> Result<()> {
        step(self.engine, self.config, state, batch)
    }
}

/// One token for each of `batch` sequences.
fn step(
    engine: &mut CpuEngine,
    config: &MambaConfig,
    state: &mut Option<State>,
    batch: usize,
) -> Result<()> {
    let before = state.take().context("no state")?;
    let ids: Vec<u32> = (0..batch).map(|i| (i % config.vocab_size) as u32).collect();
    let wanted: Vec<usize> = (0..batch).collect();
    let sequences = Sequences::continued(&vec![1; batch], &before.positions)?;
    *state = Some(advance(engine, &ids, &sequences, Some(before), &wanted)?);
    Ok(())
}

/// One call; the logits are looked at and dropped.
fn advance(
    engine: &mut CpuEngine,
    ids: &[u32],
    sequences: &Sequences,
    state: Option<State>,
    wanted: &[usize],
) -> Result<State> {
    let mut receive = |logits: Logits<'_>| {
        std::hint::black_box(logits.values);
        ControlFlow::Continue(())
    };
    Ok(engine.run(ids, sequences, state, wanted, &mut receive)?)
}

fn state_bytes(state: &State) -> usize {
    let tensors = state.layers.iter().flat_map(|layer| layer.iter());
    tensors.map(|(_, tensor)| tensor.elements() * size_of::<f32>()).sum()
}
