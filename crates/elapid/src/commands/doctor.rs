//! `elapid doctor`: what this machine offers, whether the fast code computes right on it, and whether a
//! model is sound.

mod gpu;
pub mod machine;
mod self_check;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use elapid_infer::{Checked, CpuEngine, GpuEngine, Loading, ModelRunner, Rows, SelfCheck, forward};
use elapid_tensor::{DType, Device};
use serde::Serialize;
use std::path::{Path, PathBuf};

use crate::cli::{Global, JsonArgument, Placement};
use crate::model_folder;
use crate::output::{Table, bytes, grouped, print_json};
use gpu::Gpus;
use machine::Machine;
use self_check::Check;

const EXAMPLES: &str = "\
Examples:
  elapid doctor
  elapid doctor --model runs/first
  elapid doctor --json

Exit code 1 if a check fails.";

/// Arguments of `elapid doctor`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// Also check this model: its files, that a forward pass gives finite logits, and every weight and
    /// kernel against the reference
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    #[command(flatten)]
    json: JsonArgument,
}

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    /// Where commands compute, in what type, and why not on a GPU.
    device: String,
    threads: usize,
    machine: Machine,
    gpus: Gpus,
    checks: Vec<Check>,
    model: Option<Model>,
    healthy: bool,
}

#[derive(Debug, Serialize)]
struct Model {
    folder: String,
    parameters: usize,
    logits_finite: bool,
    /// Values that were compared with the reference, of every output row of every weight.
    checked_values: usize,
    /// Their largest difference, as a share of what rounding explains.
    worst_share: f64,
    /// The first weight or kernel that is wrong.
    fault: Option<String>,
}

/// Checks and reports.
pub fn run(arguments: &Arguments, global: &Global) -> Result<()> {
    let placement = global.placement()?;
    let checks = self_check::run()?;
    let model = match &arguments.model {
        Some(path) => Some(check_model(path, &placement)?),
        None => None,
    };
    let healthy = checks.iter().all(|check| check.passed)
        && model.as_ref().is_none_or(|m| m.logits_finite && m.fault.is_none());
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        device: placement.to_string(),
        threads: rayon::current_num_threads(),
        machine: Machine::this(),
        gpus: Gpus::find(),
        checks,
        model,
        healthy,
    };
    if arguments.json.json {
        print_json(&report)?;
    } else {
        eprint!("{}", table(&report));
    }
    if !healthy {
        bail!("a check failed: results on this machine cannot be trusted");
    }
    Ok(())
}

/// Reads every file of a model, runs a few tokens through it, and compares every output row with the reference.
fn check_model(path: &Path, placement: &Placement) -> Result<Model> {
    let (source, folder) = model_folder::open(path)?;
    let mut model = source.load()?;
    let check = SelfCheck::of(&mut model)?;
    model.place(placement.device, placement.dtype)?;
    let outcome = check.check(&mut model, Rows::All).and_then(|of_model| {
        if placement.device != Device::Cpu {
            let decodes = placement.dtype == DType::BF16;
            let values = match decodes {
                true => GpuEngine::of_source(&mut model, &source, None)?.check_all()?,
                false => 0,
            };
            return Ok(Checked { values: of_model.values + values, ..of_model });
        }
        // What generates here, with the weights as the file has them.
        let (encoding, threads) = (None, rayon::current_num_threads());
        let loading =
            Loading { encoding, threads, check: Some(Rows::All), progress: &mut |_, _| {} };
        let (_, of_engine) = CpuEngine::load(&source, loading)?;
        Ok(Checked {
            values: of_model.values + of_engine.values,
            worst: of_model.worst.max(of_engine.worst),
        })
    });
    let (checked, fault) = match outcome {
        Ok(checked) => (checked, None),
        Err(error @ elapid_infer::Error::SelfCheck { .. }) => {
            (Checked::default(), Some(error.to_string()))
        }
        Err(error) => return Err(error.into()),
    };
    let vocabulary = model.config().vocab_size as u32;
    let tokens: Vec<u32> = (0..16u32).map(|t| t * 31 % vocabulary).collect();
    let mut logits_finite = true;
    let state = forward(&mut ModelRunner::new(&model), &[tokens], None, 16, |piece| {
        logits_finite &= piece.logits.iter().all(|logit| logit.is_finite());
        Ok::<_, anyhow::Error>(())
    })
    .context("the model's forward pass failed")?;
    for layer in &state.layers {
        for (_, tensor) in layer.iter() {
            logits_finite &= tensor.to_vec::<f32>()?.iter().all(|value| value.is_finite());
        }
    }
    Ok(Model {
        folder: folder.display().to_string(),
        parameters: model.config().parameter_count(),
        logits_finite,
        checked_values: checked.values,
        worst_share: checked.worst,
        fault,
    })
}

fn table(report: &Report) -> Table {
    let machine = &report.machine;
    let mut table = Table::default();
    table.row("elapid", report.version);
    table.row("system", format!("{} {}", machine.system, machine.architecture));
    if let Some(name) = &machine.processor {
        table.row("processor", name);
    }
    table.row("cores", format!("{}, {} threads used", machine.cores, report.threads));
    table.row("vector code", &machine.vector_code);
    table.row("bf16 products", machine.bf16_products);
    table.row("features", machine.features.join(" "));
    let memory = |value: Option<u64>| value.map_or("unknown".into(), bytes);
    table.row(
        "memory",
        format!("{}, {} free", memory(machine.memory_bytes), memory(machine.free_bytes)),
    );
    table.row("computes", format!("on {}", report.device));
    report.gpus.rows(&mut table);
    for check in &report.checks {
        let verdict = if check.passed { "ok" } else { "FAILED" };
        table.row(
            format!("check {}", check.operation),
            format!(
                "{verdict}, differs from f64 by {:.1e} (limit {:.0e})",
                check.difference, check.limit
            ),
        );
    }
    if let Some(model) = &report.model {
        let verdict = if model.logits_finite { "ok, finite" } else { "FAILED: not finite" };
        let count = grouped(model.parameters as u64);
        table.row("model", format!("{} ({count} parameters)", model.folder));
        table.row("check forward", format!("{verdict} logits and states"));
        let verdict = model.fault.as_ref().map_or_else(
            || {
                let values = grouped(model.checked_values as u64);
                format!("ok, {values} values, at most {:.2} of their limit", model.worst_share)
            },
            |fault| format!("FAILED: {fault}"),
        );
        table.row("check weights", verdict);
    }
    table
}
