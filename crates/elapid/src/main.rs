//! The `elapid` command: reads the arguments, runs one of `commands/`, and turns what comes of it into an
//! exit code.

mod bench;
mod cli;
mod commands;
mod exit;
mod hub;
mod interrupt;
mod model_folder;
mod output;
mod progress;
mod ready_model;
mod text_of;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    exit::install_panic_hook();
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return exit::arguments(&error),
    };
    exit::run(|| commands::run(cli))
}
