//! Whole training steps of models of published sizes: forward, backward, clipping and AdamW, by the host's clock, as a
//! step ends when the host has its loss.

use std::str::FromStr;
use std::time::Instant;

use anyhow::Result;
use elapid_data::Batch;
use elapid_models::MambaConfig;
use elapid_tensor::Sequences;
use elapid_tensor::cuda::GpuError;
use elapid_train::config::OptimizerConfig;
use elapid_train::optimizer::AdamW;
use elapid_train::trainer::{NormWatch, train_step};
use serde::Serialize;

use super::limits::{Limit, Limits};
use super::{Bench, values};
use crate::bench::sampling::median;
use crate::bench::table::duration;
use crate::output::{bytes, rate};

/// Steps that are thrown away: one by one launches, one that is recorded, one that is carried out as it was recorded.
const WARM: usize = 3;
/// Least number of steps that are timed.
const STEPS: usize = 5;
/// Seconds of a step from which on no more than the least number are timed.
const SLOW: f64 = 0.2;

/// A model and its batch.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelShape {
    name: String,
    config: MambaConfig,
    sequences: usize,
    length: usize,
    recompute: bool,
}

impl ModelShape {
    /// Its name and configuration.
    pub fn model(&self) -> (&str, &MambaConfig) {
        (&self.name, &self.config)
    }
}

impl FromStr for ModelShape {
    type Err = String;

    /// Parses `tiny` or `bytes` (byte-level, D 32 and 64), or a published size, with or without `mamba-`; behind a colon
    /// the batch, `SxL`; behind another `keep`, if activations are to be kept rather than made again in backward.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or_default();
        let mut parts: Vec<&str> = parts.collect();
        let recompute = parts.pop_if(|last| *last == "keep").is_none();
        let batch = parts.pop();
        if !parts.is_empty() {
            return Err("expected NAME, NAME:SxL, NAME:keep or NAME:SxL:keep".into());
        }
        let preset = || {
            let name =
                if name.starts_with("mamba") { name.into() } else { format!("mamba-{name}") };
            let config = MambaConfig::preset(&name).map_err(|error| error.to_string())?;
            Ok::<_, String>((name, config))
        };
        let (name, config) = match name {
            "tiny" => (name.to_owned(), MambaConfig::bytes(32, 1)),
            "bytes" => (name.to_owned(), MambaConfig::bytes(64, 2)),
            _ => preset()?,
        };
        let usual = match name.as_str() {
            "tiny" => (2, 16),
            "bytes" => (8, 256),
            "mamba-130m" => (32, 2048),
            "mamba-370m" | "mambabyte-353m" => (16, 2048),
            _ => (8, 2048),
        };
        let (sequences, length) = match batch {
            None => usual,
            Some(batch) => {
                let wrong = || format!("batch {batch:?}: expected SEQUENCESxLENGTH, as 8x2048");
                let (sequences, length) = batch.split_once('x').ok_or_else(wrong)?;
                let count = |text: &str| text.parse().ok().filter(|&count: &usize| count > 0);
                count(sequences).zip(count(length)).ok_or_else(wrong)?
            }
        };
        Ok(Self { name, config, sequences, length, recompute })
    }
}

/// Training steps of one model.
#[derive(Debug, Serialize)]
pub struct Training {
    /// Name of the model's shape.
    pub model: String,
    /// Parameters.
    pub parameters: usize,
    /// S.
    pub sequences: usize,
    /// L.
    pub length: usize,
    /// Type of the products.
    pub dtype: &'static str,
    /// Whether the launches of a step are recorded once and carried out as a graph, or made one by one each time.
    pub recorded: bool,
    /// Whether backward makes cheap activations again or finds them kept.
    pub recompute: bool,
    /// Whether the card's memory is enough; if not, `steps` is missing.
    pub fits: bool,
    /// What was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<Steps>,
}

/// Times of training steps.
#[derive(Debug, Serialize)]
pub struct Steps {
    /// Median time of a step in seconds.
    pub seconds: f64,
    /// Tokens of a step over its median time.
    pub tokens_per_second: f64,
    /// Products' FLOP a second, counted 6 a parameter (the embedding once, as the head) and token.
    pub flops_per_second: f64,
    /// The rate that they are compared with.
    pub bound_by: Limit,
    /// `flops_per_second` over that limit.
    pub share: f64,
    /// Most bytes of the card that buffers in use held at once.
    pub peak_bytes: usize,
    /// Bytes that the program holds after the last step, in use or waiting to be used again.
    pub held_bytes: usize,
    /// The last loss, in nats.
    pub loss: f64,
    /// Seconds of each step.
    pub samples: Vec<f64>,
}

/// Measures the models that were asked for, or the usual ones.
pub fn run(bench: &Bench, models: &[ModelShape]) -> Result<Vec<Training>> {
    let usual: &[&str] = match bench.quick {
        true => &["tiny"],
        false => &["bytes", "130m", "370m", "1.4b:8x2048", "1.4b:16x2048"],
    };
    let models = match models {
        [] => usual
            .iter()
            .map(|text| text.parse().map_err(anyhow::Error::msg))
            .collect::<Result<Vec<ModelShape>>>()?,
        some => some.to_vec(),
    };
    let mut found = Vec::new();
    for model in &models {
        found.push(measure(bench, model, true)?);
        if model.config.d_model <= 64 {
            // What recording is for: here launches take longer than the work.
            found.push(measure(bench, model, false)?);
        }
    }
    Ok(found)
}

fn measure(bench: &Bench, model: &ModelShape, recorded: bool) -> Result<Training> {
    let gpu = &bench.gpu;
    gpu.trim()?;
    gpu.reset_peak();
    let steps = match steps(bench, model, recorded) {
        Ok(steps) => Some(steps),
        Err(error) if out_of_memory(&error) => None,
        Err(error) => return Err(error),
    };
    gpu.trim()?;
    let how = match (recorded, model.recompute) {
        (true, true) => "recorded",
        (true, false) => "recorded, activations kept",
        (false, true) => "launch by launch",
        (false, false) => "launch by launch, activations kept",
    };
    let found = steps.as_ref().map_or("does not fit".into(), |steps| {
        format!(
            "{} a step, {} tokens/s, {:.1} % of {}, peak {}",
            duration(steps.seconds),
            rate(steps.tokens_per_second),
            100.0 * steps.share,
            steps.bound_by.name(),
            bytes(steps.peak_bytes as u64)
        )
    });
    eprintln!("  {}, {} x {} tokens, {how}: {found}", model.name, model.sequences, model.length);
    Ok(Training {
        model: model.name.clone(),
        parameters: model.config.parameter_count(),
        sequences: model.sequences,
        length: model.length,
        dtype: bench.dtype.name(),
        recorded,
        recompute: model.recompute,
        fits: steps.is_some(),
        steps,
    })
}

fn steps(bench: &Bench, shape: &ModelShape, recorded: bool) -> Result<Steps> {
    let ModelShape { config, sequences, length, .. } = shape;
    let mut model = values::model(config, bench.device(), bench.dtype)?;
    model.set_recompute(shape.recompute);
    let options = OptimizerConfig::default();
    let mut optimizer = AdamW::new(&options, &mut model)?;
    let mut watch = NormWatch::default();
    let tokens = sequences * length;
    let stream = values::tokens(tokens + 1, config.vocab_size);
    let batch = Batch {
        ids: stream[..tokens].to_vec(),
        targets: stream[1..].iter().map(|&id| i64::from(id)).collect(),
        sequences: Sequences::uniform(*sequences, *length),
        real_tokens: tokens,
        predicted: tokens,
    };
    let batches = std::slice::from_ref(&batch);
    let mut step = || -> Result<(f64, f64)> {
        // A state to carry keeps the trainer from recording.
        let (mut none, begin) = (None, Instant::now());
        let carried = (!recorded).then_some(&mut none);
        let watch = &mut watch;
        let report =
            train_step(&mut model, &mut optimizer, &options, watch, batches, carried, 1e-4)?;
        Ok((begin.elapsed().as_secs_f64(), report.loss))
    };
    let warm = if bench.quick { 2 } else { WARM };
    let mut last = (0.0, 0.0);
    for _ in 0..warm {
        last = step()?;
    }
    let count = match bench.quick {
        true => 1,
        false if last.0 > SLOW => STEPS,
        false => bench.repeats.max(STEPS),
    };
    let mut samples = Vec::with_capacity(count);
    for _ in 0..count {
        last = step()?;
        samples.push(last.0);
    }
    let seconds = median(&samples);
    let flops_per_second = 6.0 * config.parameter_count() as f64 * tokens as f64 / seconds;
    let bound_by = Limits::of_products(bench.dtype);
    let usage = bench.gpu.usage();
    Ok(Steps {
        seconds,
        tokens_per_second: tokens as f64 / seconds,
        flops_per_second,
        bound_by,
        share: flops_per_second / bench.limits.rate(bound_by),
        peak_bytes: usage.peak,
        held_bytes: usage.in_use + usage.cached,
        loss: last.1,
        samples,
    })
}

/// Whether the card's memory was not enough.
fn out_of_memory(error: &anyhow::Error) -> bool {
    let of_gpu = |error: &GpuError| match error {
        GpuError::OutOfMemory { .. } => true,
        // A graph takes memory too.
        GpuError::Call { message, .. } => message.contains("ERROR_OUT_OF_MEMORY"),
        _ => false,
    };
    let of_tensor = |error: &elapid_tensor::Error| matches!(error, elapid_tensor::Error::Gpu(error) if of_gpu(error));
    let of_model = |error: &elapid_models::Error| matches!(error, elapid_models::Error::Tensor(error) if of_tensor(error));
    let of_training = |error: &elapid_train::Error| match error {
        elapid_train::Error::Tensor(error) => of_tensor(error),
        elapid_train::Error::Model(error) => of_model(error),
        _ => false,
    };
    // Errors that only hand another on do not show it as their cause.
    error.downcast_ref().is_some_and(of_gpu)
        || error.downcast_ref().is_some_and(of_tensor)
        || error.downcast_ref().is_some_and(of_model)
        || error.downcast_ref().is_some_and(of_training)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_of_models() {
        let shape = |text: &str| text.parse::<ModelShape>();
        let small = shape("130m").unwrap();
        assert_eq!((small.name.as_str(), small.sequences, small.length), ("mamba-130m", 32, 2048));
        assert_eq!(small, shape("mamba-130m:32x2048").unwrap());
        assert_eq!(shape("1.4b:16x1024").unwrap().length, 1024);
        assert!(small.recompute && !shape("130m:keep").unwrap().recompute);
        assert!(!shape("130m:8x64:keep").unwrap().recompute);
        for wrong in [
            "131m",
            "130m:8",
            "130m:0x2",
            "130m:8x",
            "bytes:8 x 2",
            "130m:1x2:3x4",
            "130m:keep:1x2",
        ] {
            assert!(shape(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_full_card_is_told_from_other_errors() {
        let full =
            || GpuError::OutOfMemory { device: "cuda:0".into(), asked: 2, free: 1, total: 1 };
        let tensor = || elapid_tensor::Error::from(full());
        assert!(out_of_memory(&full().into()));
        assert!(out_of_memory(&elapid_models::Error::from(tensor()).into()));
        assert!(out_of_memory(&elapid_train::Error::from(tensor()).into()));
        assert!(out_of_memory(
            &elapid_train::Error::from(elapid_models::Error::from(tensor())).into()
        ));
        let other = GpuError::NoSuchCard { ordinal: 1, count: 1 };
        assert!(!out_of_memory(&elapid_tensor::Error::from(other).into()));
    }
}
