//! `elapid inspect`: what a path holds, read from headers alone where that is enough.

mod contents;
mod model;
mod sizes;

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::cli::JsonArgument;
use crate::hub;
use crate::output::print_json;

const EXAMPLES: &str = "\
Examples:
  elapid inspect runs/first
  elapid inspect mamba-130m-hf --tensors
  elapid inspect chapter.state --json

PATH is a model folder or file of any format, a checkpoint, a run's folder, a state file, any \
safetensors file, or OWNER/NAME on the Hugging Face hub. A file without a configuration beside it, and a \
model that cannot be run here (Mamba-2), are shown as far as their tensors tell.
The report goes to stdout. Weights are not loaded; --json has every tensor.";

/// Arguments of `elapid inspect`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// Folder or file to look into
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    #[command(flatten)]
    json: JsonArgument,
}

/// Looks and reports.
pub fn run(arguments: &Arguments) -> Result<()> {
    let pulled = hub::model(&arguments.path)?;
    let report = contents::report(pulled.as_deref().unwrap_or(&arguments.path))?;
    if arguments.json.json {
        return print_json(&report);
    }
    let text = report.to_text(arguments.tensors);
    let mut out = std::io::stdout().lock();
    std::io::Write::write_all(&mut out, text.as_bytes())?;
    Ok(std::io::Write::flush(&mut out)?)
}
