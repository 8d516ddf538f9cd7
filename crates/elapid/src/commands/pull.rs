//! `elapid pull`: a model from the Hugging Face hub into the cache.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use elapid_formats::hub::{Pulled, Reference, Wanted};
use serde::Serialize;

use crate::cli::JsonArgument;
use crate::exit::Usage;
use crate::hub::{Bars, hub};
use crate::output::{bytes, print_json};

const EXAMPLES: &str = "\
Examples:
  elapid pull state-spaces/mamba-130m-hf
  elapid pull state-spaces/mamba-130m-hf --revision v1.0 --json
  elapid pull owner/name-GGUF --file name-q8_0.gguf
  elapid pull EleutherAI/gpt-neox-20b --tokenizer-only
  elapid generate --model state-spaces/mamba-130m-hf --prompt 'Mamba is the'   pulls what is missing

Takes the configuration, the weights (safetensors, else .bin; shards by their index; else the one .gguf) and \
the tokenizer, and prints where they are, which --model takes too. A download that broke off goes on where it \
stopped. The cache is that of the hub's other clients: HF_HUB_CACHE, HF_HOME/hub or ~/.cache/huggingface/hub.
A token for private and gated models is taken from HF_TOKEN, HF_TOKEN_PATH or HF_HOME/token; HF_ENDPOINT is \
another address of the hub; HF_HUB_OFFLINE=1 is --offline.";

/// Arguments of `elapid pull`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// OWNER/NAME, OWNER/NAME@REVISION or OWNER/NAME/FILE.gguf
    #[arg(value_name = "OWNER/NAME")]
    name: String,
    /// Branch, tag or commit [default: main]
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
    /// Only this file of the repository
    #[arg(long, value_name = "FILE", conflicts_with = "tokenizer_only")]
    file: Option<String>,
    /// Only the tokenizer's files
    #[arg(long)]
    tokenizer_only: bool,
    /// Another cache
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    #[command(flatten)]
    json: JsonArgument,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    repository: &'a str,
    revision: &'a str,
    commit: &'a str,
    /// For `--model`.
    model: String,
    files: Vec<File<'a>>,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct File<'a> {
    name: &'a str,
    path: String,
    bytes: u64,
    /// Over the network this time.
    received_bytes: u64,
}

/// Pulls.
pub fn run(arguments: &Arguments) -> Result<()> {
    let reference = reference(arguments)?;
    let mut hub = hub()?;
    if let Some(cache) = &arguments.cache_dir {
        hub = hub.with_cache(cache);
    }
    let wanted = match &arguments.file {
        Some(file) => Wanted::File(file),
        None if arguments.tokenizer_only => Wanted::Tokenizer,
        None => Wanted::Model,
    };
    let started = std::time::Instant::now();
    let pulled = hub.pull(&reference, wanted, &mut Bars::default())?;
    let seconds = started.elapsed().as_secs_f64();
    if arguments.json.json {
        return print_json(&report(&reference, &pulled, seconds));
    }
    let received: u64 = pulled.files.iter().map(|file| file.received).sum();
    let size: u64 = pulled.files.iter().map(|file| file.bytes).sum();
    eprintln!(
        "{reference} at {}: {} in {} files, {} of them downloaded",
        &pulled.commit[..12],
        bytes(size),
        pulled.files.len(),
        bytes(received)
    );
    writeln!(io::stdout().lock(), "{}", pulled.model.display())?;
    Ok(())
}

/// The name, with the revision of its option.
fn reference(arguments: &Arguments) -> Result<Reference> {
    let name = match &arguments.revision {
        None => arguments.name.clone(),
        Some(revision) if !arguments.name.contains('@') => format!("{}@{revision}", arguments.name),
        Some(_) => {
            let message =
                format!("{} has a revision already, and so has --revision", arguments.name);
            return Err(Usage::new(message).into());
        }
    };
    Reference::parse(&name).ok_or_else(|| {
        let expected =
            "expected OWNER/NAME, such as state-spaces/mamba-130m-hf, or OWNER/NAME@REVISION";
        Usage::new(format!("{name:?} is no model on the hub: {expected}")).into()
    })
}

fn report<'a>(reference: &'a Reference, pulled: &'a Pulled, seconds: f64) -> Report<'a> {
    let files = pulled.files.iter().map(|file| File {
        name: &file.name,
        path: file.path.display().to_string(),
        bytes: file.bytes,
        received_bytes: file.received,
    });
    Report {
        repository: &reference.repository,
        revision: &reference.revision,
        commit: &pulled.commit,
        model: pulled.model.display().to_string(),
        files: files.collect(),
        seconds,
    }
}
