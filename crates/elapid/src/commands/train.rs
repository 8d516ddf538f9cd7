//! `elapid train`: one run from one TOML file.

use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use elapid_infer::{ModelRunner, Options, Request, Sampling, generate};
use elapid_models::LanguageModel;
use elapid_tensor::DType;
use elapid_tensor::cuda::Profiled;
use elapid_train::config::{Compute, RunConfig};
use elapid_train::plot::Reference;
use elapid_train::trainer::{Hooks, Outcome, Trainer};
use elapid_train::{Dataset, progress};
use serde_json::json;

use crate::cli::{Choice, Global, JsonArgument, Placement};
use crate::exit::Usage;
use crate::interrupt;
use crate::output::{Table, bytes, grouped, print_json, rate};

const EXAMPLES: &str = "\
Examples:
  elapid train configs/bytes-small.toml --set data.paths='[\"my-texts/\"]'
  elapid train configs/bytes-small.toml --set train.out=runs/mine --set optimizer.lr=2e-3
  elapid train configs/bytes-small.toml --resume        go on after Ctrl-C, a crash or a kill
  elapid train runs/mine/config.toml --resume --set train.steps=20000
  elapid train configs/induction-heads-small.toml       a task of the Mamba paper
  elapid train configs/bytes-small.toml --device cuda --dtype bf16   on a GPU

Ctrl-C saves a checkpoint and stops. A resumed run ends with the same bits as an uninterrupted one.";

/// Arguments of `elapid train`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// The run's TOML file (see configs/)
    #[arg(value_name = "CONFIG.toml")]
    config: PathBuf,
    /// Override a key, such as train.steps=1000 (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Go on from the newest checkpoint of the run's folder
    #[arg(long)]
    resume: bool,
    /// Show nothing while training
    #[arg(long, short)]
    quiet: bool,
    /// Check the configuration and the data, say what would be done, and stop
    #[arg(long)]
    dry_run: bool,
    /// On a GPU: time every kernel, and show at the end where the time went (slower: steps are not recorded)
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    json: JsonArgument,
}

/// Runs the command.
pub fn run(arguments: &Arguments, global: &Global) -> Result<()> {
    let mut config = RunConfig::load(&arguments.config, &arguments.overrides)?;
    let placement = placed(&mut config, global)?;
    let threads = Some(config.train.threads).filter(|&threads| threads > 0);
    super::start_threads(global.threads.map(usize::from).or(threads))?;
    let dataset = Dataset::open(&config)?;
    let mut trainer = if arguments.resume {
        Trainer::resume(config, dataset, &mut |warning| eprintln!("warning: {warning}"))?
    } else {
        Trainer::start(config, dataset)?
    };
    if !arguments.quiet {
        eprint!("{}", describe(&trainer, &placement));
    }
    if arguments.dry_run {
        if arguments.json.json {
            print_json(&plan(&trainer))?;
        }
        return Ok(());
    }
    let (done, steps) = trainer.steps();
    let profiled = match (arguments.profile, placement.device.gpu()?) {
        (true, None) => {
            return Err(Usage::new("--profile times the kernels of a GPU: --device cuda").into());
        }
        (profile, gpu) => gpu.filter(|_| profile),
    };
    if let Some(gpu) = &profiled {
        gpu.start_profile();
    }
    let outcome = train(&mut trainer, Vec::new(), arguments.quiet)?;
    if let Some(gpu) = &profiled {
        eprint!("{}", profile(&gpu.end_profile()?));
    }
    if arguments.json.json {
        print_json(&summary(&trainer, &outcome))?;
    }
    if !arguments.quiet {
        let out = trainer.config().train.out.display();
        if outcome.interrupted {
            eprintln!("{}", how_to_go_on(&trainer, &outcome));
        } else if done >= steps {
            eprintln!("nothing left to do: {} of {} steps are done", grouped(done), grouped(steps));
        } else {
            eprintln!("done: {out}");
            if trainer.dataset().is_text() {
                eprintln!("try:  elapid generate --model {out} --prompt 'The '");
            }
        }
    }
    Ok(())
}

/// Kernels by their share of the time.
fn profile(calls: &[Profiled]) -> Table {
    const SHOWN: usize = 40;
    let all: f64 = calls.iter().map(|call| call.milliseconds).sum();
    let mut table = Table::default();
    table.row("kernel", format!("{all:.1} ms in all"));
    for call in calls.iter().take(SHOWN) {
        let share = 100.0 * call.milliseconds / all.max(1e-9);
        let (ms, count) = (call.milliseconds, call.calls);
        let each = ms / count.max(1) as f64;
        table.row(&call.name, format!("{share:5.1} %  {ms:9.2} ms  {count:>6} x {each:.4} ms"));
    }
    table
}

/// Settles where a run computes: as the command line says, or else the configuration, or else on the first GPU.
///
/// # Errors
/// If the device cannot be used, or does not compute in the type.
pub fn placed(config: &mut RunConfig, global: &Global) -> Result<Placement> {
    let mut global = global.clone();
    if global.device.is_none()
        && let Some(device) = config.train.device.as_deref().filter(|&device| device != "auto")
    {
        global.device = Some(Choice::Device(device.parse()?));
    }
    let asked = global.dtype.get_or_insert(config.train.dtype.into());
    config.train.dtype = if *asked == DType::BF16 { Compute::Bf16 } else { Compute::F32 };
    let placement = global.placement()?;
    config.train.device = Some(placement.device.to_string());
    Ok(placement)
}

/// Trains with Ctrl-C watched and samples made by the generator.
///
/// # Errors
/// Those of the run.
pub fn train(trainer: &mut Trainer, references: Vec<Reference>, quiet: bool) -> Result<Outcome> {
    let sample = |model: &LanguageModel, tokens: usize| {
        sample_text(model, "", tokens, 0).unwrap_or_else(|error| error.to_string())
    };
    let mut hooks = Hooks {
        stop: Some(interrupt::watch()?),
        sample: trainer.dataset().is_text().then(|| Box::new(sample) as _),
        references,
        quiet,
    };
    Ok(trainer.run(&mut hooks)?)
}

/// A text of `tokens` bytes after `prompt` (a line break if empty), at temperature 0.8.
///
/// # Errors
/// If the model is not byte-level or its output is not finite.
pub fn sample_text(
    model: &LanguageModel,
    prompt: &str,
    tokens: usize,
    seed: u64,
) -> Result<String> {
    if model.config().vocab_size != 256 {
        return Err(Usage::new("only byte-level models make text").into());
    }
    let prompt = if prompt.is_empty() { "\n" } else { prompt };
    let request = Request { prompt: prompt.bytes().map(u32::from).collect(), ..Request::default() };
    let options = Options {
        sampling: Sampling { temperature: 0.8, top_p: 0.95, seed, ..Sampling::default() },
        max_tokens: tokens,
        ..Options::default()
    };
    let generation = generate(&mut ModelRunner::new(model), &[request], &options, &mut |_| {
        ControlFlow::Continue(())
    })?;
    Ok(generation.sequences.into_iter().map(|sequence| sequence.text).collect())
}

/// What to say of an interrupted run. Its stored configuration has every override in it.
pub fn how_to_go_on(trainer: &Trainer, outcome: &Outcome) -> String {
    format!(
        "stopped at step {}; go on with: elapid train {} --resume",
        grouped(outcome.step),
        trainer.config().train.out.join("config.toml").display()
    )
}

/// What is about to be trained, for people.
pub fn describe(trainer: &Trainer, placement: &Placement) -> String {
    let (done, steps) = trainer.steps();
    let config = trainer.config();
    let model = trainer.model().config();
    let per_step = config.tokens_per_batch() * config.train.accumulation;
    let mut table = Table::default();
    table.row(
        "model",
        format!(
            "Mamba, {} layers of width {}, {} parameters",
            model.n_layer,
            model.d_model,
            grouped(model.parameter_count() as u64)
        ),
    );
    let data = match trainer.dataset() {
        Dataset::Bytes { train_bytes, validation_bytes, .. } => {
            format!("{} to train on, {} held out", bytes(*train_bytes), bytes(*validation_bytes))
        }
        Dataset::Synthetic(task) => format!("{task}"),
    };
    table.row("data", data);
    table.row(
        "steps",
        format!(
            "{} of {} tokens{}",
            grouped(steps),
            grouped(per_step as u64),
            match done {
                0 => String::new(),
                done => format!(", {} done", grouped(done)),
            }
        ),
    );
    table.row("device", placement.to_string());
    table.row("threads", rayon::current_num_threads().to_string());
    table.row("folder", config.train.out.display().to_string());
    table.to_string()
}

/// What is about to be trained, for scripts.
fn plan(trainer: &Trainer) -> serde_json::Value {
    let (done, steps) = trainer.steps();
    let config = trainer.config();
    let (train_bytes, validation_bytes) = match trainer.dataset() {
        Dataset::Bytes { train_bytes, validation_bytes, .. } => {
            (Some(train_bytes), Some(validation_bytes))
        }
        Dataset::Synthetic(_) => (None, None),
    };
    json!({
        "out": config.train.out,
        "parameters": trainer.model().config().parameter_count(),
        "steps": steps,
        "steps_done": done,
        "tokens_per_step": config.tokens_per_batch() * config.train.accumulation,
        "train_bytes": train_bytes,
        "validation_bytes": validation_bytes,
        "device": config.train.device,
        "dtype": DType::from(config.train.dtype).to_string(),
        "threads": rayon::current_num_threads(),
    })
}

fn summary(trainer: &Trainer, outcome: &Outcome) -> serde_json::Value {
    let bits = |loss: f64| trainer.dataset().is_text().then_some(loss / std::f64::consts::LN_2);
    json!({
        "out": trainer.config().train.out,
        "checkpoint": outcome.checkpoint,
        "interrupted": outcome.interrupted,
        "step": outcome.step,
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "tokens_per_s": outcome.tokens as f64 / outcome.seconds.max(1e-9),
        "validation": outcome.evaluation.as_ref().map(|evaluation| json!({
            "loss": evaluation.loss,
            "bits_per_byte": bits(evaluation.loss),
            "accuracy": evaluation.accuracy.iter()
                .map(|(length, share)| json!({ "length": length, "accuracy": share }))
                .collect::<Vec<_>>(),
        })),
        "peak_memory_bytes": elapid_train::metrics::memory::peak_memory_bytes(),
        "device": trainer.config().train.device,
        "dtype": DType::from(trainer.config().train.dtype).to_string(),
        "threads": rayon::current_num_threads(),
    })
}

/// One line on how fast a run was.
pub fn speed(outcome: &Outcome) -> String {
    format!(
        "{} tokens in {}, {} tokens/s",
        grouped(outcome.tokens),
        progress::duration(outcome.seconds),
        rate(outcome.tokens as f64 / outcome.seconds.max(1e-9))
    )
}
