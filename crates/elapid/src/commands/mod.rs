//! One file a command: its arguments and its work.

pub mod bench;
pub mod completions;
pub mod convert;
pub mod doctor;
pub mod eval;
pub mod forward;
pub mod generate;
pub mod inspect;
pub mod pull;
pub mod quantize;
pub mod quickstart;
pub mod train;

use anyhow::{Context, Result};

use crate::cli::{Cli, Command};

/// Runs the command that was asked for.
pub fn run(cli: Cli) -> Result<()> {
    // A training run's file may name the threads, too.
    if !matches!(cli.command, Command::Train(_)) {
        start_threads(cli.global.threads.map(usize::from))?;
    }
    crate::hub::set_offline(cli.global.offline);
    match cli.command {
        Command::Quickstart(arguments) => quickstart::run(&arguments, &cli.global),
        Command::Train(arguments) => train::run(&arguments, &cli.global),
        Command::Generate(arguments) => generate::run(&arguments, &cli.global),
        Command::Eval(arguments) => eval::run(&arguments, &cli.global),
        Command::Forward(arguments) => forward::run(&arguments, &cli.global),
        Command::Inspect(arguments) => inspect::run(&arguments),
        Command::Convert(arguments) => convert::run(&arguments),
        Command::Pull(arguments) => pull::run(&arguments),
        Command::Quantize(arguments) => quantize::run(&arguments, &cli.global),
        Command::Bench(arguments) => bench::run(&arguments, &cli.global),
        Command::Doctor(arguments) => doctor::run(&arguments, &cli.global),
        Command::Completions(arguments) => completions::run(&arguments),
    }
}

/// Starts the threads that share the work, of which the calling thread is one: handing work over to another thread
/// and waiting for it costs two wake-ups, a tenth of a millisecond, for every operation.
fn start_threads(count: Option<usize>) -> Result<()> {
    let count = count.unwrap_or_else(|| {
        let named = std::env::var("RAYON_NUM_THREADS").ok().and_then(|text| text.parse().ok());
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        named.filter(|&count| count > 0).unwrap_or_else(cores)
    });
    let mut threads = rayon::ThreadPoolBuilder::new().num_threads(count);
    // Alone it would leave nobody to work for other threads while it waits for them.
    if count > 1 {
        threads = threads.use_current_thread();
    }
    threads.build_global().context("cannot start the worker threads")
}
