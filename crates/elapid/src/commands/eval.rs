//! `elapid eval`: how well a model predicts a text.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use elapid_data::{Documents, SourceOptions};
use elapid_eval::{Document, Options, Perplexity, Progress, Reading, perplexity};
use serde::Serialize;

use crate::cli::{Global, JsonArgument, ModelArgument, WeightsArgument};
use crate::exit::Usage;
use crate::output::{Table, grouped, print_json, rate};
use crate::progress::{Bar, Unit};
use crate::ready_model::{ReadyModel, check_reading};

const EXAMPLES: &str = "\
Examples:
  elapid eval --model runs/first --perplexity book.txt
  elapid eval --model runs/first --perplexity book.txt.zst --carry-state
  elapid eval --model mamba-130m-hf --perplexity wiki.test.txt --window 2048 --stride 512 --json
  elapid eval --model runs/first --perplexity stories.bin --nul
  elapid eval --model mamba-130m-hf --weights q4_k --perplexity book.txt   what fewer bits cost

A window of N tokens starts from nothing and moves by M; each token is predicted once, from at least \
N-M+1 tokens (fewer at the beginning of a document). --carry-state predicts it from all tokens before \
it in its document. Bits per byte and word perplexity (words as `wc -w` counts them) do not depend on \
the tokenizer. Each file is a document; folders, globs, .gz and .zst files are read too.";

/// Arguments of `elapid eval`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgument,
    /// Text to predict: a file, folder or glob (repeatable)
    #[arg(long, value_name = "FILE", required = true)]
    perplexity: Vec<PathBuf>,
    /// Tokens of a sliding window
    #[arg(long, value_name = "N", default_value_t = 2048)]
    window: usize,
    /// Tokens by which the window moves [default: half of it]
    #[arg(long, value_name = "M")]
    stride: Option<usize>,
    /// Carry the state through each document instead of a window
    #[arg(long, conflicts_with_all = ["window", "stride"])]
    carry_state: bool,
    /// tokenizer.json, a folder with one, or OWNER/NAME on the hub, instead of the model's own
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,
    /// A NUL byte ends a document within a file
    #[arg(long)]
    nul: bool,
    /// Put this token before each document, so that its first token is predicted too
    #[arg(long, value_name = "ID")]
    start_token: Option<u32>,
    /// Read so many tokens at a time, which bounds memory
    #[arg(long, value_name = "N", default_value_t = 2048)]
    chunk: usize,
    #[command(flatten)]
    weights: WeightsArgument,
    #[command(flatten)]
    json: JsonArgument,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    reading: Reading,
    #[serde(flatten)]
    perplexity: Perplexity,
    seconds: f64,
    device: String,
    dtype: String,
}

/// Evaluates.
pub fn run(arguments: &Arguments, global: &Global) -> Result<()> {
    let reading = match arguments.carry_state {
        true => Reading::Carried,
        false => Reading::Windows {
            window: arguments.window,
            stride: arguments.stride.unwrap_or(arguments.window.div_ceil(2)),
        },
    };
    let options = Options { reading, chunk: arguments.chunk };
    let placement = global.placement()?;
    let source = SourceOptions {
        separator: arguments.nul.then(|| vec![0]),
        ..SourceOptions::new(&arguments.perplexity)
    };
    let texts = Documents::load(&source)?;
    let weights = arguments.weights.weights;
    check_reading(weights, &placement)?;
    let (path, tokenizer) = (&arguments.model.model, arguments.tokenizer.as_deref());
    let (mut ready, text_of) = ReadyModel::open_with_text(path, &placement, weights, tokenizer)?;
    let tokenizer = text_of.tokenizer()?;
    // Bytes are their own ids, and stay in the mapped file.
    let encoded = match tokenizer.is_bytes() {
        true => Vec::new(),
        false => texts
            .iter()
            .enumerate()
            .map(|(index, text)| {
                tokenizer.encode_bytes(text, false).with_context(|| format!("document {index}"))
            })
            .collect::<Result<Vec<_>>>()?,
    };
    let documents: Vec<Document<'_>> = texts
        .iter()
        .enumerate()
        .map(|(index, text)| match encoded.get(index) {
            Some(ids) => Document::ids(ids, text),
            None => Document::bytes(text),
        })
        .map(|document| document.after(arguments.start_token))
        .collect();
    for (index, text) in texts.iter().enumerate() {
        if let Err(error) = std::str::from_utf8(text) {
            eprintln!(
                "note: document {index} is not UTF-8 from byte {} on; its bytes are predicted as they are",
                error.valid_up_to()
            );
        }
    }

    let started = Instant::now();
    let mut bar = Bar::new("evaluating", Unit::Tokens, 0, 0);
    let mut show = |Progress { done, all }| {
        bar.of(done, all);
        ControlFlow::Continue(())
    };
    let found = ready
        .with(|runner| perplexity(runner, &documents, &options, &mut show).map_err(as_option))?;
    drop(bar);
    let seconds = started.elapsed().as_secs_f64();
    if arguments.json.json {
        return print_json(&Report {
            model: ready.folder().display().to_string(),
            reading,
            perplexity: found,
            seconds,
            device: placement.device.to_string(),
            dtype: ready.dtype(),
        });
    }
    print!("{}", table(&found, reading));
    eprintln!(
        "{} tokens predicted at {} tokens/s · {} in {}",
        grouped(found.predicted),
        rate(found.predicted as f64 / seconds.max(1e-9)),
        placement.device,
        ready.dtype()
    );
    Ok(())
}

fn table(found: &Perplexity, reading: Reading) -> Table {
    let mut table = Table::default();
    let reading = match reading {
        Reading::Carried => "state carried through each document".to_owned(),
        Reading::Windows { window, stride } => {
            format!(
                "windows of {} tokens that move by {}",
                grouped(window as u64),
                grouped(stride as u64)
            )
        }
    };
    table.row("reading", reading);
    table.row("documents", grouped(found.documents));
    table.row(
        "text",
        format!(
            "{} tokens, {} bytes, {} words",
            grouped(found.tokens),
            grouped(found.bytes),
            grouped(found.words)
        ),
    );
    let figure = |value: f64| {
        if value < 1e6 { format!("{value:.4}") } else { format!("{value:.4e}") }
    };
    table.row("cross-entropy", format!("{:.5} nats per token", found.cross_entropy));
    table.row("token perplexity", figure(found.token_perplexity));
    if let Some(bits) = found.bits_per_byte {
        table.row("bits per byte", format!("{bits:.5}"));
    }
    if let Some(words) = found.word_perplexity {
        table.row("word perplexity", figure(words));
    }
    table
}

/// An option error of the library under the option's name on the command line.
fn as_option(error: elapid_eval::Error) -> anyhow::Error {
    match error {
        elapid_eval::Error::Option { name, expected, found } => {
            Usage::new(format!("--{name}: expected {expected}, found {found}")).into()
        }
        other => other.into(),
    }
}
