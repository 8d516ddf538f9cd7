//! A whole training step of a byte-level model: forward, backward, clipping and AdamW.

use anyhow::Result;
use elapid_data::Batch;
use elapid_models::{LanguageModel, MambaConfig};
use elapid_tensor::{Sequences, memory};
use elapid_train::config::OptimizerConfig;
use elapid_train::metrics::memory::peak_memory_bytes;
use elapid_train::optimizer::AdamW;
use elapid_train::trainer::{NormWatch, train_step};
use serde::Serialize;

use super::Bench;
use super::inputs::Inputs;
use super::sampling::{Task, Work};

/// What the training step's figure does not tell.
#[derive(Debug, Serialize)]
pub struct Training {
    /// Parameters of the model.
    pub parameters: usize,
    /// Most bytes that tensors held at once: parameters, moments, activations and gradients.
    pub tensor_peak_bytes: usize,
    /// Most memory of the process during the steps, where the system tells it and lets it be reset.
    pub process_peak_bytes: Option<u64>,
}

/// Measures.
pub fn run(bench: &mut Bench) -> Result<Training> {
    let (width, layers, sequences, length) =
        if bench.quick { (32, 2, 2, 64) } else { (256, 8, 8, 512) };
    let config = MambaConfig::bytes(width, layers);
    // The samples of the memory's rate are no part of what training needs.
    bench.meter.release_memory();
    memory::trim();
    memory::reset_peak();
    let resets = reset_process_peak();

    let mut model = LanguageModel::new(&config, 0)?;
    let optimizer_config = OptimizerConfig::default();
    let mut optimizer = AdamW::new(&optimizer_config, &mut model)?;
    let mut watch = NormWatch::default();
    let tokens = sequences * length;
    let stream = Inputs::new().tokens(tokens + 1, config.vocab_size);
    let batch = Batch {
        ids: stream[..tokens].to_vec(),
        targets: stream[1..].iter().map(|&id| i64::from(id)).collect(),
        sequences: Sequences::uniform(sequences, length),
        real_tokens: tokens,
        predicted: tokens,
    };
    let embedding = config.padded_vocab_size() * config.d_model;
    let (blocks, head) = (config.parameter_count() - embedding, embedding);
    let states = (config.d_inner() * config.d_state * layers) as f64;
    bench.measure(
        Task {
            name: "training step",
            shape: format!(
                "byte-level Mamba, D {width}, {layers} layers, {sequences} x {length} tokens"
            ),
            tokens,
            work: Work {
                bytes: 0.0,
                flops: 6.0 * (blocks + head) as f64 * tokens as f64,
                updates: 3.0 * states * tokens as f64,
            },
            counted: format!(
                "a token: 6 FLOP for each of {blocks} parameters outside the embedding and 6 D V = {} for \
                 the head; E N updates a layer forward and twice as many backward",
                6 * head
            ),
        },
        || Ok(()),
        |()| {
            let batches = std::slice::from_ref(&batch);
            let watch = &mut watch;
            Ok(train_step(&mut model, &mut optimizer, &optimizer_config, watch, batches, None, 1e-4)?)
        },
    )?;
    Ok(Training {
        parameters: config.parameter_count(),
        tensor_peak_bytes: memory::usage().peak,
        process_peak_bytes: peak_memory_bytes().filter(|_| resets),
    })
}

/// Starts the process's own measurement of its peak anew; false where that cannot be done.
pub fn reset_process_peak() -> bool {
    // "5" resets the high-water mark and nothing else (proc_pid_clear_refs(5)).
    cfg!(target_os = "linux") && std::fs::write("/proc/self/clear_refs", "5").is_ok()
}
