//! The arguments of the command line: what exists, what it means, and examples. Each command's arguments
//! are declared beside its code; this file holds what they share.

use std::fmt;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use elapid_formats::ModelSource;
use elapid_infer::{Rows, SelfCheck};
use elapid_models::LanguageModel;
use elapid_ops::blocks::Encoding;
use elapid_tensor::{DType, Device};

use crate::commands::{
    bench, completions, convert, doctor, eval, forward, generate, inspect, pull, quantize,
    quickstart, train,
};
use crate::exit::Usage;

const EXAMPLES: &str = "\
Examples:
  elapid quickstart                                     train a small model, see what it learnt
  elapid train configs/bytes-small.toml                 a run of your own
  elapid doctor                                         what this machine offers
  elapid inspect runs/first                             what a folder or file holds
  elapid generate --model runs/first --prompt 'The '    continue a text
  elapid pull state-spaces/mamba-130m-hf                a model from the Hugging Face hub
  elapid eval --model runs/first --perplexity book.txt  how well it predicts
  elapid generate --help                                all options of a command

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
    /// Where to compute: cpu, cuda, cuda:N, or auto for the first GPU that can be used [default: auto]
    #[arg(long, global = true, value_name = "DEVICE", value_parser = choice)]
    pub device: Option<Choice>,
    /// Number type of products: f32, or bf16 on a GPU [default: f32]
    #[arg(long, global = true, value_name = "TYPE", value_parser = dtype)]
    pub dtype: Option<DType>,
    /// CPU threads [default: one per core]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Never ask the network: models of the hub must be in its cache (also HF_HUB_OFFLINE=1)
    #[arg(long, global = true)]
    pub offline: bool,
    /// Do not compare a loaded model's kernels and weights with the reference where it runs
    #[arg(long, global = true)]
    pub no_self_check: bool,
}

/// What `--device` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// The first GPU that can be used, or else the host.
    Auto,
    /// This one.
    Device(Device),
}

/// Where a command computes, and in what type.
#[derive(Debug, Clone)]
pub struct Placement {
    /// The device.
    pub device: Device,
    /// The type of products.
    pub dtype: DType,
    /// Why there is no GPU, where one was looked for.
    pub reason: Option<String>,
    /// Whether a model that is placed is checked there.
    pub self_check: bool,
}

impl Global {
    /// The device and type that were asked for.
    ///
    /// # Errors
    /// If the device cannot be used, or does not compute in the type.
    pub fn placement(&self) -> anyhow::Result<Placement> {
        let (device, reason) = match self.device {
            None | Some(Choice::Auto) => Device::best(),
            Some(Choice::Device(device)) => {
                device.gpu().with_context(|| {
                    format!("--device {device} cannot be used (--device cpu always can)")
                })?;
                (device, None)
            }
        };
        let dtype = self.dtype.unwrap_or(DType::F32);
        if device == Device::Cpu && dtype != DType::F32 {
            let message = format!(
                "--dtype {dtype}: the CPU computes in f32; --weights {dtype} holds weights so{}",
                reason.as_ref().map_or(String::new(), |reason| format!(" (no GPU: {reason})"))
            );
            return Err(Usage::new(message).into());
        }
        let reason = reason.map(|reason| reason.to_string());
        Ok(Placement { device, dtype, reason, self_check: !self.no_self_check })
    }
}

impl Placement {
    /// Loads a model there, and compares what it computes with the reference.
    ///
    /// # Errors
    /// If a weight is no number, the device is full or fails, or a kernel or weight is wrong there.
    pub fn load(&self, source: &ModelSource) -> anyhow::Result<LanguageModel> {
        let mut model = source.load_on(self.device)?;
        model.place(self.device, self.dtype)?;
        if self.self_check {
            SelfCheck::of_source(source)
                .check(&mut model, Rows::AT_LOAD)
                .with_context(|| format!("the model cannot be trusted on {}", self.device))?;
        }
        Ok(model)
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {}", self.device, self.dtype)?;
        match &self.reason {
            Some(reason) => write!(f, " (no GPU: {reason})"),
            None => Ok(()),
        }
    }
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
    /// Measure how well a model predicts a text
    Eval(eval::Arguments),
    /// Write the logits and states of given tokens to a file
    Forward(forward::Arguments),
    /// Show what a model folder, checkpoint, state file or file of tensors holds
    Inspect(inspect::Arguments),
    /// Write a model in another format or element type
    Convert(convert::Arguments),
    /// Download a model from the Hugging Face hub into the cache that its other clients use
    Pull(pull::Arguments),
    /// Write a model with weights in blocks of few-bit integers, and say what that costs
    Quantize(quantize::Arguments),
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
    /// Model: a folder or file of any format, a checkpoint folder, a run folder (its best checkpoint), or OWNER/NAME
    /// on the Hugging Face hub (OWNER/NAME@REVISION, OWNER/NAME/FILE.gguf), which is downloaded once
    #[arg(long, value_name = "MODEL")]
    pub model: PathBuf,
}

/// `--weights`, as every command that runs a model has it.
#[derive(Debug, Clone, Copy, Args)]
pub struct WeightsArgument {
    /// Hold projections and embedding so [default: as they are stored]: on the CPU f32, bf16, f16, q8_0, q4_0, q4_k or
    /// q6_k; for decode steps on a GPU, with --dtype bf16, bf16 or q8_0 [default: floats bf16, blocks of integers q8_0,
    /// exact for those of q8_0 and q4_0]
    #[arg(long, value_name = "TYPE", help_heading = "Machine", value_parser = encoding)]
    pub weights: Option<Encoding>,
}

fn encoding(text: &str) -> Result<Encoding, String> {
    text.parse::<Encoding>().map_err(|error| error.to_string())
}

/// `--json`, as every command with a result has it.
#[derive(Debug, Clone, Copy, Args)]
pub struct JsonArgument {
    /// Print one JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

fn choice(text: &str) -> Result<Choice, String> {
    if text == "auto" {
        return Ok(Choice::Auto);
    }
    text.parse::<Device>().map(Choice::Device).map_err(|error| error.to_string())
}

pub(crate) fn dtype(text: &str) -> Result<DType, String> {
    match text.parse::<DType>().map_err(|error| error.to_string())? {
        dtype @ (DType::F32 | DType::BF16) => Ok(dtype),
        other => Err(format!(
            "computes in f32 or, on a GPU, bf16, not {other}; weights of other types are converted on loading"
        )),
    }
}
