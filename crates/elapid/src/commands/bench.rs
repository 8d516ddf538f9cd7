//! `elapid bench`: how fast this machine runs the work of Elapid, each figure beside what the machine can do
//! at most, measured in the same run.

use anyhow::Result;
use clap::Args;
use clap::ValueEnum as _;
use serde::Serialize;

use super::doctor::machine::Machine;
use crate::bench::{self, Report, Subject};
use crate::cli::JsonArgument;
use crate::output::print_json;

const EXAMPLES: &str = "\
Examples:
  elapid bench                        everything, some minutes
  elapid bench train                  tokens a second and memory of a training step
  elapid bench ops scan --json        single operations, raw figures on stdout
  elapid bench --quick                tiny sizes, some seconds: does everything run?
  elapid bench decode --threads 1

A share is what the work must move or compute at least, over what the machine moves or computes at most in
that time. Let nothing else run meanwhile. The table goes to stderr.";

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
    #[command(flatten)]
    json: JsonArgument,
}

#[derive(Debug, Serialize)]
struct Document {
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
    report: Report,
}

/// Measures and reports.
pub fn run(arguments: &Arguments) -> Result<()> {
    let what = match arguments.what.as_slice() {
        [] => Subject::value_variants().to_vec(),
        some => some.to_vec(),
    };
    let repeats = arguments.repeats.map_or(if arguments.quick { 3 } else { 9 }, usize::from);
    let threads = rayon::current_num_threads();
    let machine = Machine::this();
    let load_before = load();
    let started = std::time::Instant::now();
    let report = bench::run(&what, arguments.quick, repeats, threads, machine.free_bytes)?;
    let document = Document {
        elapid: env!("CARGO_PKG_VERSION"),
        rustc: option_env!("ELAPID_RUSTC"),
        what,
        quick: arguments.quick,
        repeats,
        threads,
        machine,
        load_before,
        load_after: load(),
        seconds: started.elapsed().as_secs_f64(),
        report,
    };
    eprint!("\n{}{}", heading(&document), document.report.to_text());
    if arguments.json.json {
        print_json(&document)?;
    }
    Ok(())
}

fn heading(document: &Document) -> String {
    let machine = &document.machine;
    let load =
        |load: Option<[f64; 3]>| load.map_or("unknown".into(), |load| format!("{:.1}", load[0]));
    format!(
        "elapid {} on {} ({} {}, {}), {} of {} cores, load {} before and {} after, median of {}{}\n\n",
        document.elapid,
        machine.processor.as_deref().unwrap_or("an unknown processor"),
        machine.system,
        machine.architecture,
        machine.vector_code,
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
