//! `elapid completions`: a completion script, made from the arguments themselves.

use std::io::{self, Write};

use anyhow::Result;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::cli::Cli;

const EXAMPLES: &str = "\
Examples:
  elapid completions bash > ~/.local/share/bash-completion/completions/elapid
  elapid completions zsh  > ~/.zfunc/_elapid
  elapid completions fish > ~/.config/fish/completions/elapid.fish";

/// Arguments of `elapid completions`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// The shell that the script is for
    shell: Shell,
}

/// Prints the script.
pub fn run(arguments: &Arguments) -> Result<()> {
    // Made in memory first: the generator does not survive a closed pipe.
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "elapid", &mut script);
    let mut out = io::stdout().lock();
    out.write_all(&script)?;
    Ok(out.flush()?)
}
