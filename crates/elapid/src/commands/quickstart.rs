//! `elapid quickstart`: the main job without arguments, downloads or a GPU. Trains a small byte-level Mamba
//! on text that the machine has, shows what it learnt beside what compressors and a counting model reach on
//! the same bytes, and says what to try next.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use elapid_data::baselines::{Order2, gzip, zstd};
use elapid_data::corpus::{self, CorpusOptions};
use elapid_formats::atomic;
use elapid_train::Dataset;
use elapid_train::config::RunConfig;
use elapid_train::plot::Reference;
use elapid_train::trainer::{Outcome, Trainer};
use serde_json::json;

use super::train::{describe, how_to_go_on, placed, sample_text, speed, train};
use crate::cli::{Global, JsonArgument};
use crate::exit::Usage;
use crate::output::{Table, bytes, grouped, print_json};

/// The run, apart from its data: sized for about two minutes on two cores.
const CONFIG: &str = include_str!("quickstart.toml");

/// Between the documents of the text that was found, in which it does not occur.
const SEPARATOR: &str = "\0";

const EXAMPLES: &str = "\
Examples:
  elapid quickstart                          about two minutes on two cores
  elapid quickstart --data my-texts/         on your own files, folders or globs (.gz and .zst too)
  elapid quickstart --steps 2000             longer, better";

/// Arguments of `elapid quickstart`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// Train on these files, folders or globs instead of the text found on this machine (repeatable)
    #[arg(long, value_name = "PATH")]
    data: Vec<String>,
    /// Folder of the run [default: runs/quickstart, or runs/quickstart-2, ... if that is taken]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Optimizer steps
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// Override any other key of the run's configuration (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    #[command(flatten)]
    json: JsonArgument,
}

/// Runs the command.
pub fn run(arguments: &Arguments, global: &Global) -> Result<()> {
    let mut config = configure(arguments)?;
    let placement = placed(&mut config, global)?;
    let dataset = Dataset::open(&config)?;
    let baselines = Baselines::measure(&dataset)?;
    let mut trainer = Trainer::start(config, dataset)?;
    eprint!("{}", describe(&trainer, &placement));

    let outcome = train(&mut trainer, baselines.references(), false)?;
    let out = trainer.config().train.out.clone();
    let bits = outcome.evaluation.as_ref().map(|e| e.loss / std::f64::consts::LN_2);
    let sample = match outcome.interrupted {
        true => None,
        false => Some(sample_text(trainer.model(), "The ", 400, trainer.config().train.seed)?),
    };
    match (bits, &sample) {
        (Some(bits), Some(sample)) => tell(&trainer, &outcome, &baselines, bits, sample),
        _ => eprintln!("{}", how_to_go_on(&trainer, &outcome)),
    }
    if arguments.json.json {
        print_json(&json!({
            "out": out,
            "plot": out.join("loss.svg"),
            "checkpoint": outcome.checkpoint,
            "interrupted": outcome.interrupted,
            "steps": outcome.step,
            "tokens": outcome.tokens,
            "seconds": outcome.seconds,
            "bits_per_byte": bits,
            "baselines": baselines.json(),
            "sample": sample,
        }))?;
    }
    Ok(())
}

/// What came of it, and what to try next.
fn tell(trainer: &Trainer, outcome: &Outcome, baselines: &Baselines, bits: f64, sample: &str) {
    let out = &trainer.config().train.out;
    eprintln!("\nA sample after \"The \":\n");
    eprintln!("{}\n", indented(&format!("The {}", sample.trim_end())));
    eprint!("{}", baselines.table(bits, trainer.config().data.context));
    eprintln!();
    let mut table = Table::default();
    table.row("speed", speed(outcome));
    table.row("loss plot", out.join("loss.svg").display().to_string());
    if let Some(checkpoint) = &outcome.checkpoint {
        table.row("checkpoint", checkpoint.display().to_string());
    }
    eprint!("{table}");
    eprintln!("\nTry next:");
    let out = out.display();
    // As this program was called, so that the commands work when pasted.
    let program = std::env::args().next().unwrap_or_else(|| "elapid".into());
    for (command, what) in [
        (format!("generate --model {out} --prompt 'fn main'"), "continue a text"),
        (format!("inspect {out}"), "what was saved"),
        ("quickstart --data FOLDER --steps 3000".into(), "your own text, longer"),
        ("train configs/bytes-small.toml --set data.paths=FOLDER".into(), "a run of your own"),
        ("bench".into(), "how fast this machine is"),
    ] {
        eprintln!("  {program} {command:<56} {what}");
    }
}

/// The run's configuration: a run like any other, which `elapid train` can resume and repeat.
fn configure(arguments: &Arguments) -> Result<RunConfig> {
    for key in ["data.paths", "data.synthetic"] {
        if arguments.overrides.iter().any(|text| text.trim_start().starts_with(key)) {
            let message = format!("--set {key}: quickstart takes its data from --data PATH");
            return Err(Usage::new(message).into());
        }
    }
    let mut overrides = arguments.overrides.clone();
    if let Some(steps) = arguments.steps {
        overrides.push(format!("train.steps={steps}"));
    }
    let mut config = RunConfig::parse(CONFIG, None, &overrides)?;
    config.train.out = folder(arguments.out.as_deref(), &config.train.out)?;
    if arguments.data.is_empty() {
        let text = collect(&config.train.out)?;
        config.data.paths = vec![text.display().to_string()];
        config.data.separator = Some(SEPARATOR.into());
    } else {
        config.data.paths.clone_from(&arguments.data);
    }
    Ok(config)
}

/// Finds text on this machine and writes it into the run's folder, so that the run does not depend on
/// what is installed or removed later.
fn collect(out: &Path) -> Result<PathBuf> {
    let corpus = corpus::find(CorpusOptions::default())?;
    eprintln!(
        "text    {}: {} from {} files",
        corpus.source,
        bytes(corpus.bytes),
        grouped(corpus.files as u64)
    );
    for root in &corpus.roots {
        eprintln!("        {}", root.display());
    }
    std::fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    let path = out.join("text.txt");
    atomic::write_file(&path, |file| {
        corpus.documents.iter().try_for_each(|document| {
            file.write_all(document)?;
            file.write_all(SEPARATOR.as_bytes())
        })
    })?;
    Ok(path)
}

/// The folder asked for, or the first of `default`, `default-2`, .. that is free.
fn folder(asked: Option<&Path>, default: &Path) -> Result<PathBuf> {
    if let Some(asked) = asked {
        let refuse = |what| Usage::new(format!("--out {}: {what}", asked.display()));
        if asked.exists() && !asked.is_dir() {
            return Err(refuse("not a folder").into());
        }
        if std::fs::read_dir(asked).is_ok_and(|mut entries| entries.next().is_some()) {
            return Err(refuse("the folder is not empty").into());
        }
        return Ok(asked.to_path_buf());
    }
    let numbered = |n: u32| match n {
        1 => default.to_path_buf(),
        n => PathBuf::from(format!("{}-{n}", default.display())),
    };
    (1..10_000).map(numbered).find(|path| !path.exists()).ok_or_else(|| {
        Usage::new(format!("too many runs beside {}; use --out", default.display())).into()
    })
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  | {line}")).collect::<Vec<_>>().join("\n")
}

/// Bits per byte that others reach on the same validation bytes.
struct Baselines {
    order2: f64,
    gzip: elapid_data::baselines::Compressed,
    zstd: elapid_data::baselines::Compressed,
}

impl Baselines {
    fn measure(dataset: &Dataset) -> Result<Self> {
        let Dataset::Bytes { documents, train, validation: Some(validation), .. } = dataset else {
            return Err(Usage::new("nothing is held out (data.validation_fraction = 0)").into());
        };
        let texts = validation.texts();
        let order2 = Order2::train(train.iter().map(|span| span.of(documents)));
        Ok(Self {
            order2: order2.bits_per_byte(texts.iter().copied()),
            gzip: gzip(texts.iter().copied(), validation.windows())?,
            zstd: zstd(texts.iter().copied(), validation.windows())?,
        })
    }

    fn references(&self) -> Vec<Reference> {
        vec![
            Reference { label: "order-2 byte model".into(), value: self.order2 },
            Reference { label: "gzip -9, whole".into(), value: self.gzip.whole },
            Reference { label: "zstd -19, whole".into(), value: self.zstd.whole },
        ]
    }

    fn table(&self, mamba: f64, context: usize) -> String {
        let mut table = Table::default();
        let row = |bits: f64| format!("{bits:.3}");
        table.row("bits per byte of the held-out text", "(lower is better)");
        table.row("  Mamba, this run", row(mamba));
        table.row("  order-2 byte model, same training text", row(self.order2));
        table.row("  gzip -9, all of it as one stream", row(self.gzip.whole));
        table.row("  zstd -19, all of it as one stream", row(self.zstd.whole));
        table.row(format!("  gzip -9, each {context} bytes alone"), row(self.gzip.per_window));
        table.row(format!("  zstd -19, each {context} bytes alone"), row(self.zstd.per_window));
        table.to_string()
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "order2": self.order2,
            "gzip": { "whole": self.gzip.whole, "per_window": self.gzip.per_window },
            "zstd": { "whole": self.zstd.whole, "per_window": self.zstd.per_window },
        })
    }
}
