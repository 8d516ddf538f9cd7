//! `elapid quantize`: a model with weights in blocks of few-bit integers, as a GGUF file, and what that costs.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use elapid_data::corpus::{self, CorpusOptions};
use elapid_data::{Documents, SourceOptions};
use elapid_eval::{Divergence, Document, Options, Progress, kl_divergence};
use elapid_formats::gguf::{Plan, WeightTypes, save_gguf, vocabulary_of};
use elapid_formats::{ModelSource, Tokenizer, atomic};
use elapid_ops::blocks::Encoding;
use serde_json::{Value, json};

use crate::cli::{Global, JsonArgument};
use crate::exit::Usage;
use crate::model_folder;
use crate::output::{Table, bytes, grouped, print_json};
use crate::progress::{Bar, Unit};
use crate::ready_model::ReadyModel;
use crate::text_of::TextOf;

const EXAMPLES: &str = "\
Examples:
  elapid quantize mamba-130m-hf mamba-130m-q8.gguf --type q8_0
  elapid quantize mamba-130m-hf mamba-130m-q4.gguf --type q4_k --embedding q6_k
  elapid quantize runs/first first-q4.gguf --type q4_0 --report report.json --text book.txt

Quantised are the embedding, the head and the projections (in, x, out). Convolution, Δ, A, D, biases and \
norms stay f32. Rows that are no whole number of blocks get q8_0, or f16, and are listed.
--report runs original and quantised model over the same text: perplexity of both, and the divergence of \
their predictions (Kullback-Leibler, in nats).";

/// Arguments of `elapid quantize`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// Model to read
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// GGUF file to write
    #[arg(value_name = "DST")]
    target: PathBuf,
    /// Blocks of the weights: q8_0, q4_0, q4_k (or q6_k)
    #[arg(id = "type", long = "type", value_name = "TYPE", value_parser = blocks)]
    blocks: Encoding,
    /// Another type for embedding and head: also q6_k, f16, bf16, f32
    #[arg(long, value_name = "TYPE", value_parser = encoding)]
    embedding: Option<Encoding>,
    /// Compare with the original, and write what was found to this JSON file
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Text to compare on: a file, folder or glob (repeatable) [default: text found on this machine]
    #[arg(long, value_name = "FILE", requires = "report")]
    text: Vec<PathBuf>,
    /// tokenizer.json, a folder with one, or OWNER/NAME on the hub, instead of the model's own
    #[arg(long, value_name = "PATH", requires = "report")]
    tokenizer: Option<PathBuf>,
    /// Tokens of the text to compare on, at most
    #[arg(long, value_name = "N", default_value = "16384", requires = "report", value_parser = clap::value_parser!(u64).range(2..))]
    tokens: u64,
    #[command(flatten)]
    json: JsonArgument,
}

/// Quantises and compares.
pub fn run(arguments: &Arguments, global: &Global) -> Result<()> {
    let from = model_folder::resolve(&arguments.source)?;
    let source = ModelSource::open(&from)?;
    let types = WeightTypes { projections: Some(arguments.blocks), embedding: arguments.embedding };
    let plan = Plan::new(&source, types)?;
    for tensor in plan.fallbacks() {
        eprintln!("note: {tensor}");
    }
    let started = Instant::now();
    let mut bar = Bar::new("quantizing", Unit::Bytes, 0, plan.bytes());
    save_gguf(&source, &plan, vocabulary_of(&source)?, &arguments.target, &mut |done| {
        bar.at(done);
    })?;
    drop(bar);
    let seconds = started.elapsed().as_secs_f64();
    let mut report = sizes(&source, &plan, arguments, seconds);
    let parameters = source.config().parameter_count();
    let mut table = Table::default();
    table.row("before", bytes(plan.bytes_before()));
    table.row(
        "after",
        format!(
            "{}, {:.2} bits a weight, {:.1} % of before",
            bytes(plan.bytes()),
            plan.bytes() as f64 * 8.0 / parameters as f64,
            plan.bytes() as f64 * 100.0 / plan.bytes_before() as f64
        ),
    );
    if let Some(path) = &arguments.report {
        let text = Text::read(arguments, &from, &source)?;
        let divergence = compare(&from, &text, arguments, global)?;
        report["text"] = json!({
            "source": text.source,
            "tokens": text.tokens(),
            "bytes": text.bytes(),
        });
        report["comparison"] = serde_json::to_value(divergence)?;
        atomic::write_file(path, |out| writeln!(out, "{report:#}"))?;
        rows(&mut table, &divergence);
        table.row("report", path.display().to_string());
    }
    if arguments.json.json {
        return print_json(&report);
    }
    eprintln!("{} to {}", from.display(), arguments.target.display());
    eprint!("{table}");
    Ok(())
}

/// Sizes, as a JSON object.
fn sizes(source: &ModelSource, plan: &Plan, arguments: &Arguments, seconds: f64) -> Value {
    let tensors: Vec<Value> = plan
        .tensors
        .iter()
        .map(|tensor| {
            json!({
                "name": tensor.file_name,
                "shape": tensor.shape,
                "from": tensor.from.name(),
                "to": tensor.to.name(),
                "instead_of": tensor.instead_of.map(Encoding::name),
                "bytes": tensor.bytes,
            })
        })
        .collect();
    let parameters = source.config().parameter_count();
    json!({
        "source": source.path().display().to_string(),
        "target": arguments.target.display().to_string(),
        "type": arguments.blocks.name(),
        "parameters": parameters,
        "bytes_before": plan.bytes_before(),
        "bytes": plan.bytes(),
        "bits_per_weight": plan.bytes() as f64 * 8.0 / parameters as f64,
        "fallbacks": plan.fallbacks().count(),
        "seconds": seconds,
        "tensors": tensors,
    })
}

/// The text to compare on, cut to the tokens that are wanted.
struct Text {
    source: String,
    /// One entry a document: the part of its text that is read, and the ids of that part unless bytes are ids.
    documents: Vec<(Vec<u8>, Option<Vec<u32>>)>,
}

impl Text {
    fn read(arguments: &Arguments, from: &Path, source: &ModelSource) -> Result<Self> {
        let text_of = TextOf::model(from, source.config(), arguments.tokenizer.as_deref())?;
        let tokenizer = text_of.tokenizer()?;
        let (found, all) = if arguments.text.is_empty() {
            // A token is seldom more than eight bytes.
            let most = usize::try_from(arguments.tokens).unwrap_or(usize::MAX).saturating_mul(8);
            let corpus = corpus::find(CorpusOptions { max_bytes: most, min_bytes: 1 << 10 })?;
            (corpus.source.to_owned(), corpus.documents)
        } else {
            let names: Vec<String> =
                arguments.text.iter().map(|path| path.display().to_string()).collect();
            (names.join(", "), Documents::load(&SourceOptions::new(&arguments.text))?)
        };
        let mut left = usize::try_from(arguments.tokens).unwrap_or(usize::MAX);
        let mut documents = Vec::new();
        for (index, text) in all.iter().enumerate() {
            if left < 2 {
                break;
            }
            if tokenizer.is_bytes() {
                let text = &text[..text.len().min(left)];
                left -= text.len();
                documents.push((text.to_vec(), None));
                continue;
            }
            let (text, ids) = beginning(tokenizer, text, left)
                .with_context(|| format!("document {index} of {found}"))?;
            left -= ids.len();
            documents.push((text.to_vec(), Some(ids)));
        }
        let text = Self { source: found, documents };
        if text.tokens() < 2 {
            let message = format!("--text: {}: expected two tokens at least", text.source);
            return Err(Usage::new(message).into());
        }
        Ok(text)
    }

    fn tokens(&self) -> usize {
        self.documents.iter().map(|(text, ids)| ids.as_ref().map_or(text.len(), Vec::len)).sum()
    }

    fn bytes(&self) -> usize {
        self.documents.iter().map(|(text, _)| text.len()).sum()
    }

    fn documents(&self) -> Vec<Document<'_>> {
        self.documents
            .iter()
            .map(|(text, ids)| match ids {
                None => Document::bytes(text),
                Some(ids) => Document::ids(ids, text),
            })
            .collect()
    }
}

/// The beginning of a text that has at most `most` tokens, and these. The text is cut, never the tokens: they stand for
/// exactly the bytes that are counted, also where a character takes several tokens or the tokenizer changes the text
/// before it divides it.
fn beginning<'t>(
    tokenizer: &Tokenizer,
    text: &'t [u8],
    most: usize,
) -> Result<(&'t [u8], Vec<u32>)> {
    // A token is seldom more than eight bytes, so this is all that could be wanted.
    let mut end = text.len().min(most.saturating_mul(8));
    // Back to where a character begins, which has four bytes at most.
    let least = end.saturating_sub(3);
    while end > least && text.get(end).is_some_and(|byte| byte & 0xC0 == 0x80) {
        end -= 1;
    }
    let text = &text[..end];
    let ids = tokenizer.encode_bytes(text, false)?;
    if ids.len() <= most {
        return Ok((text, ids));
    }
    let characters = std::str::from_utf8(text)?;
    let starts: Vec<usize> = characters.char_indices().map(|(start, _)| start).collect();
    // So many characters have few enough tokens, and so many too many.
    let (mut fit, mut fail) = (0, starts.len());
    let mut kept = Vec::new();
    while fail - fit > 1 {
        let middle = fit.midpoint(fail);
        let ids = tokenizer.encode(&characters[..starts[middle]], false)?;
        if ids.len() <= most {
            (fit, kept) = (middle, ids);
        } else {
            fail = middle;
        }
    }
    Ok((&text[..starts.get(fit).copied().unwrap_or(0)], kept))
}

fn compare(from: &Path, text: &Text, arguments: &Arguments, global: &Global) -> Result<Divergence> {
    let placement = global.placement()?;
    let ready = |path: &Path| {
        ReadyModel::of_source(ModelSource::open(path)?, path.to_path_buf(), &placement, None)
    };
    let (mut original, mut other) = (ready(from)?, ready(&arguments.target)?);
    let mut bar = Bar::new("comparing", Unit::Tokens, 0, 0);
    let mut show = |Progress { done, all }| {
        bar.of(done, all);
        ControlFlow::Continue(())
    };
    let (documents, options) = (text.documents(), Options::default());
    original.with(|original| {
        other.with(|other| Ok(kl_divergence(original, other, &documents, &options, &mut show)?))
    })
}

fn rows(table: &mut Table, found: &Divergence) {
    let (original, other) = (found.original, found.other);
    table.row("compared on", format!("{} predictions", grouped(original.predicted)));
    table.row(
        "token perplexity",
        format!(
            "{:.4} to {:.4} ({:+.2} %)",
            original.token_perplexity,
            other.token_perplexity,
            (other.token_perplexity / original.token_perplexity - 1.0) * 100.0
        ),
    );
    if let (Some(before), Some(after)) = (original.bits_per_byte, other.bits_per_byte) {
        table.row("bits per byte", format!("{before:.5} to {after:.5}"));
    }
    table.row(
        "divergence",
        format!(
            "{:.6} nats mean, {:.6} median, {:.6} of 99 %, {:.4} largest",
            found.mean, found.median, found.p99, found.max
        ),
    );
    table.row("same best token", format!("{:.2} %", found.top1_agreement * 100.0));
}

fn encoding(text: &str) -> Result<Encoding, String> {
    text.parse::<Encoding>().map_err(|error| error.to_string())
}

fn blocks(text: &str) -> Result<Encoding, String> {
    match encoding(text)? {
        blocks if blocks.is_quantized() => Ok(blocks),
        other => Err(format!(
            "{other} is no type of blocks; elapid convert --dtype {other} writes plain floats"
        )),
    }
}
