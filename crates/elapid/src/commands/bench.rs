//! `elapid bench`: how fast this machine runs the work of Elapid, each figure beside what the machine can do
//! at most, measured in the same run; or how fast its GPU does.

use anyhow::Result;
use clap::Args;
use clap::ValueEnum as _;
use elapid_ops::blocks::Encoding;
use elapid_ops::decode_step;
use elapid_tensor::cuda::Gpu;
use elapid_tensor::{DType, Device};
use serde::Serialize;

use super::doctor::machine::Machine;
use crate::bench::gpu::{self, ModelShape, Settings};
use crate::bench::{self, InferenceSettings, Subject};
use crate::cli::{Choice, Global, JsonArgument};
use crate::exit::Usage;
use crate::output::print_json;

const EXAMPLES: &str = "\
Examples:
  elapid bench                        everything, some minutes
  elapid bench train                  tokens a second and memory of a training step
  elapid bench ops scan --json        single operations, raw figures on stdout
  elapid bench --quick                tiny sizes, some seconds: does everything run?
  elapid bench decode --threads 1     generating, in each kind of weights
  elapid bench decode prefill --model-shape 370m --weights bf16,q8_0 --batch 1,8,32 --prompt-tokens 16,512
  elapid bench --device cuda          the same work on a GPU, some minutes
  elapid bench train --device cuda --model-shape 130m --model-shape 1.4b:8x2048
  elapid bench decode --device cuda --model-shape 370m --batch 1,32 --weights q8_0
  elapid bench decode --device cuda --prompt-tokens 0   sequences that have read nothing

Without --device, or with auto, the CPU is measured. On a GPU models compute in bf16 unless --dtype says f32.

A share is what the work must move or compute at least, over what the machine moves or computes at most in \
that time. Let nothing else run meanwhile. The table goes to stderr.";

/// A prompt is made and kept as a whole.
const MOST_PROMPT_TOKENS: usize = 1 << 24;

/// Arguments of `elapid bench`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// What to measure [default: all]
    #[arg(value_enum, value_name = "WHAT")]
    what: Vec<Subject>,
    /// Tiny sizes, for a check that everything runs
    #[arg(long)]
    quick: bool,
    /// Times each figure is taken; the median counts [default: 9, quick 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    repeats: Option<u16>,
    /// Model that `decode` takes, `prefill` too on the CPU, `train` on a GPU, and train's batch (S sequences of L
    /// tokens): 130m, 370m, 1.4b, .., bytes, tiny; `:keep` behind it keeps activations rather than make them again;
    /// several times for several [default: 130m; train: bytes, 130m, 370m, 1.4b with 8 and with 16 sequences]
    #[arg(long, value_name = "NAME[:SxL][:keep]")]
    model_shape: Vec<ModelShape>,
    /// Sequences of a decode step [default: 1,8,32; on a GPU also 64,128,256]
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = batch)]
    batch: Vec<usize>,
    /// How `decode`, and `prefill` on the CPU, hold projections and embedding: f32, bf16, f16, q8_0, q4_0, q4_k, q6_k
    /// [default: all but q6_k]; on a GPU bf16, q8_0 [default: both]
    #[arg(long, value_name = "TYPE", value_delimiter = ',', value_parser = encoding)]
    weights: Vec<Encoding>,
    /// Tokens of a prompt that `prefill` reads, and on a GPU of the one that `decode` goes on from (0: none) [default: 512;
    /// on a GPU decode 2048, prefill many lengths]
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = prompt)]
    prompt_tokens: Vec<usize>,
    /// Recurrent state of decode steps on a GPU: f32, bf16 [default: f32]
    #[arg(long, value_name = "TYPE", value_parser = crate::cli::dtype)]
    state_dtype: Option<DType>,
    #[command(flatten)]
    json: JsonArgument,
}

#[derive(Debug, Serialize)]
struct Document<R> {
    elapid: &'static str,
    /// The compiler that built this program, if known.
    rustc: Option<&'static str>,
    what: Vec<Subject>,
    quick: bool,
    repeats: usize,
    threads: usize,
    machine: Machine,
    /// Processes that wanted to run, averages over 1, 5 and 15 minutes; Linux only.
    load_before: Option<[f64; 3]>,
    load_after: Option<[f64; 3]>,
    seconds: f64,
    #[serde(flatten)]
    report: R,
}

fn batch(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=65536) => Ok(count),
        _ => Err(format!("{text:?}: expected a number from 1 to 65536")),
    }
}

fn prompt(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 0..=MOST_PROMPT_TOKENS) => Ok(count),
        _ => Err(format!("{text:?}: expected a number from 0 to {MOST_PROMPT_TOKENS}")),
    }
}

fn encoding(text: &str) -> Result<Encoding, String> {
    text.parse::<Encoding>().map_err(|error| error.to_string())
}

/// Measures and reports.
pub fn run(arguments: &Arguments, global: &Global) -> Result<()> {
    match global.device {
        None | Some(Choice::Auto | Choice::Device(Device::Cpu)) => on_cpu(arguments, global),
        Some(Choice::Device(device)) => match device.gpu()? {
            None => on_cpu(arguments, global),
            Some(gpu) => on_gpu(arguments, global, &gpu),
        },
    }
}

fn on_cpu(arguments: &Arguments, global: &Global) -> Result<()> {
    if arguments.state_dtype.is_some() {
        return Err(Usage::new("--state-dtype is for a GPU: add --device cuda").into());
    }
    if let Some(dtype) = global.dtype.filter(|&dtype| dtype != DType::F32) {
        let message = format!(
            "--dtype {dtype}: the CPU computes in f32 (weights of decode and prefill: --weights; a GPU: --device cuda)"
        );
        return Err(Usage::new(message).into());
    }
    if arguments.prompt_tokens.contains(&0) {
        let message =
            "--prompt-tokens 0 is for decode on a GPU: here a prompt has one token at least";
        return Err(Usage::new(message).into());
    }
    let own = |shape: &ModelShape| {
        let (name, config) = shape.model();
        (name.to_owned(), config.clone())
    };
    let settings = InferenceSettings {
        models: arguments.model_shape.iter().map(own).collect(),
        weights: arguments.weights.clone(),
        batches: arguments.batch.clone(),
        prompts: arguments.prompt_tokens.clone(),
    };
    let machine = Machine::this();
    let threads = rayon::current_num_threads();
    let (document, text) = measured(arguments, machine, |what, repeats, machine| {
        let free = machine.free_bytes;
        let report = bench::run(what, arguments.quick, repeats, threads, free, &settings)?;
        let text = report.to_text();
        Ok((report, text))
    })?;
    print(arguments, &document, &heading(&document), &text)
}

fn on_gpu(arguments: &Arguments, global: &Global, gpu: &Gpu) -> Result<()> {
    if gpu.is_emulated() && !arguments.quick {
        let message = "cuda:emulated is for tests and has no speed to measure: add --quick";
        return Err(Usage::new(message).into());
    }
    let dtype = global.dtype.unwrap_or(DType::BF16);
    let prompts = &arguments.prompt_tokens;
    if !prompts.is_empty() && dtype != DType::BF16 {
        let message = format!("--prompt-tokens: prompts have one length in {dtype}, any in bf16");
        return Err(Usage::new(message).into());
    }
    if prompts.contains(&0) && subjects(arguments).contains(&Subject::Prefill) {
        let message = "--prompt-tokens 0 is for decode: prefill reads one token at least";
        return Err(Usage::new(message).into());
    }
    let weights = arguments.weights.iter().map(|encoding| encoding.to_string().parse());
    let weights: Vec<decode_step::Encoding> = weights
        .collect::<Result<_, _>>()
        .map_err(|message: String| Usage::new(format!("--weights {message}")))?;
    let (document, text) = measured(arguments, Machine::this(), |subjects, repeats, _| {
        let settings = Settings {
            subjects,
            quick: arguments.quick,
            repeats,
            dtype,
            models: &arguments.model_shape,
            batches: &arguments.batch,
            prompts,
            weights: &weights,
            state: arguments.state_dtype.unwrap_or(DType::F32),
        };
        let report = gpu::run(gpu, &settings)?;
        let text = report.to_text();
        Ok((report, text))
    })?;
    let heading = format!("{} ({gpu}), {}", document.report.device_name(), heading(&document));
    print(arguments, &document, &heading, &text)
}

/// What is to be measured.
fn subjects(arguments: &Arguments) -> Vec<Subject> {
    match arguments.what.as_slice() {
        [] => Subject::value_variants().to_vec(),
        some => some.to_vec(),
    }
}

/// Measures, and describes what was measured, where and when.
fn measured<R: Serialize>(
    arguments: &Arguments,
    machine: Machine,
    measure: impl FnOnce(&[Subject], usize, &Machine) -> Result<(R, String)>,
) -> Result<(Document<R>, String)> {
    let what = subjects(arguments);
    let repeats = arguments.repeats.map_or(if arguments.quick { 3 } else { 9 }, usize::from);
    let load_before = load();
    let started = std::time::Instant::now();
    let (report, text) = measure(&what, repeats, &machine)?;
    let document = Document {
        elapid: env!("CARGO_PKG_VERSION"),
        rustc: option_env!("ELAPID_RUSTC"),
        what,
        quick: arguments.quick,
        repeats,
        threads: rayon::current_num_threads(),
        machine,
        load_before,
        load_after: load(),
        seconds: started.elapsed().as_secs_f64(),
        report,
    };
    Ok((document, text))
}

fn print<R: Serialize>(
    arguments: &Arguments,
    document: &Document<R>,
    heading: &str,
    text: &str,
) -> Result<()> {
    eprint!("\n{heading}{text}");
    if arguments.json.json {
        print_json(document)?;
    }
    Ok(())
}

fn heading<R>(document: &Document<R>) -> String {
    let machine = &document.machine;
    let load =
        |load: Option<[f64; 3]>| load.map_or("unknown".into(), |load| format!("{:.1}", load[0]));
    format!(
        "elapid {} on {} ({} {}, {}), {} of {} cores, load {} before and {} after, median of {}{}\n\n",
        document.elapid,
        machine.processor.as_deref().unwrap_or("an unknown processor"),
        machine.system,
        machine.architecture,
        match machine.bf16_products {
            "AMX" => format!("{}, AMX", machine.vector_code),
            _ => machine.vector_code.clone(),
        },
        document.threads,
        machine.cores,
        load(document.load_before),
        load(document.load_after),
        document.repeats,
        if document.quick { ", quick: sizes too small to compare" } else { "" },
    )
}

/// How many processes wanted to run, where the system tells it in a file.
fn load() -> Option<[f64; 3]> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    let mut numbers = text.split_whitespace().map_while(|word| word.parse().ok());
    Some([numbers.next()?, numbers.next()?, numbers.next()?])
}
