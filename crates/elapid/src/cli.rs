//! The arguments of the command line: what exists, what it means, and examples. Each command's arguments
//! are declared beside its code; this file holds what they share.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use elapid_tensor::{DType, Device};

use crate::commands::{bench, completions, doctor, forward, generate, inspect, quickstart, train};

const EXAMPLES: &str = "\
Examples:
  elapid quickstart                                  train a small model, see what it learnt
  elapid train configs/bytes-small.toml              a run of your own
  elapid doctor                                      what this machine offers
  elapid inspect runs/first                          what a folder or file holds
  elapid generate --model runs/first --prompt 'The ' continue a text
  elapid generate --help                             all options of a command

Exit codes: 0 done, 1 the work failed, 2 the call was wrong.
Human-readable output goes to stderr, results to stdout; --json prints one object on stdout.";

/// Train, run and study linear-time sequence models.
#[derive(Debug, Parser)]
#[command(
    name = "elapid",
    version,
    about = "Train, run and study linear-time sequence models",
    after_help = EXAMPLES,
    propagate_version = true,
    subcommand_required = true,
    arg_required_else_help = true,
    max_term_width = 100
)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Machine")]
pub struct Global {
    /// Where to compute: cpu, or auto for the best device there is
    #[arg(long, global = true, value_name = "DEVICE", default_value = "auto", value_parser = device)]
    pub device: Device,
    /// Number type to compute in: f32 on the CPU
    #[arg(long, global = true, value_name = "TYPE", default_value = "f32", value_parser = dtype)]
    pub dtype: DType,
    /// CPU threads [default: one per core]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a small model on text that this machine has, and show what it learnt (about two minutes)
    Quickstart(quickstart::Arguments),
    /// Train a model as a TOML file says, or resume
    Train(train::Arguments),
    /// Continue a text (or token ids) with a model
    Generate(generate::Arguments),
    /// Write the logits and states of given tokens to a file
    Forward(forward::Arguments),
    /// Show what a model folder, checkpoint, state file or safetensors file holds
    Inspect(inspect::Arguments),
    /// Measure the speed of this machine, each figure beside what the machine can do at most
    Bench(bench::Arguments),
    /// Check this machine, and a model on it
    Doctor(doctor::Arguments),
    /// Print a completion script for your shell
    Completions(completions::Arguments),
}

/// `--model`, as every command that needs a model has it.
#[derive(Debug, Clone, Args)]
pub struct ModelArgument {
    /// Model: a Hugging Face folder, a checkpoint folder, or a run folder (its best checkpoint)
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
}

/// `--json`, as every command with a result has it.
#[derive(Debug, Clone, Copy, Args)]
pub struct JsonArgument {
    /// Print one JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

fn device(text: &str) -> Result<Device, String> {
    if text == "cuda" || text.starts_with("cuda:") {
        return Err("this version computes on the CPU only: use cpu or auto".into());
    }
    text.parse::<Device>().map_err(|error| error.to_string())
}

fn dtype(text: &str) -> Result<DType, String> {
    match text.parse::<DType>().map_err(|error| error.to_string())? {
        DType::F32 => Ok(DType::F32),
        other => Err(format!(
            "the CPU computes in f32, not {other}; weights stored as bf16 or f16 are widened on loading"
        )),
    }
}
