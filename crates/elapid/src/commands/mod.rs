//! One file a command: its arguments and its work.

pub mod bench;
pub mod completions;
pub mod doctor;
pub mod eval;
pub mod forward;
pub mod generate;
pub mod inspect;
pub mod pull;
pub mod quickstart;
pub mod train;

use anyhow::{Context, Result};

use crate::cli::{Cli, Command};

/// Runs the command that was asked for.
pub fn run(cli: Cli) -> Result<()> {
    if let Some(threads) = cli.global.threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(usize::from(threads))
            .build_global()
            .context("cannot start the worker threads")?;
    }
    crate::hub::set_offline(cli.global.offline);
    match cli.command {
        Command::Quickstart(arguments) => quickstart::run(&arguments, &cli.global),
        Command::Train(arguments) => train::run(&arguments, &cli.global),
        Command::Generate(arguments) => generate::run(&arguments, &cli.global),
        Command::Eval(arguments) => eval::run(&arguments, &cli.global),
        Command::Forward(arguments) => forward::run(&arguments, &cli.global),
        Command::Inspect(arguments) => inspect::run(&arguments),
        Command::Pull(arguments) => pull::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments, &cli.global),
        Command::Doctor(arguments) => doctor::run(&arguments, &cli.global),
        Command::Completions(arguments) => completions::run(&arguments),
    }
}
