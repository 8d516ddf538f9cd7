//! How the program ends: 0 done, 1 the work failed, 2 the call was wrong. An error is one line and its
//! causes; a panic, which is always a bug, says so; a closed pipe is silent.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;

use anyhow::Result;

/// The call was wrong: an option, or a file given as an option, makes no sense. Exit code 2.
#[derive(Debug)]
pub struct Usage(String);

impl Usage {
    /// What was wrong with the call.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Runs the program and gives its exit code.
pub fn run(work: impl FnOnce() -> Result<()>) -> ExitCode {
    let outcome = panic::catch_unwind(AssertUnwindSafe(work));
    match outcome {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            // If stderr is closed there is nobody left to tell.
            let _ = writeln!(io::stderr(), "error: {}", with_causes(&error));
            ExitCode::from(code(&error))
        }
        // The panic hook has said what happened.
        Err(_) => ExitCode::from(1),
    }
}

/// Ends after the arguments could not be used, or asked for help or the version.
pub fn arguments(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

/// A panic is a bug: says so in a line, without a dump.
pub fn install_panic_hook() {
    panic::set_hook(Box::new(|info| {
        if elapid_formats::is_guarded() {
            return;
        }
        let payload = info.payload();
        let message = payload
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("no message");
        let place = info.location().map_or_else(String::new, |place| format!(" ({place})"));
        let _ = writeln!(
            io::stderr(),
            "error: this is a bug in elapid: {message}{place}\n\
             Please report it together with the command that you ran."
        );
    }));
}

fn code(error: &anyhow::Error) -> u8 {
    let wrong_call = error.chain().any(|cause| {
        cause.is::<Usage>()
            || matches!(
                cause.downcast_ref(),
                Some(
                    elapid_train::Error::Syntax { .. }
                        | elapid_train::Error::UnknownKey { .. }
                        | elapid_train::Error::BadValue { .. }
                )
            )
            || matches!(
                cause.downcast_ref(),
                Some(
                    elapid_infer::Error::Option { .. }
                        | elapid_infer::Error::EmptyPrompt { .. }
                        | elapid_infer::Error::Token { .. }
                )
            )
            || matches!(
                cause.downcast_ref(),
                Some(elapid_eval::Error::Option { .. } | elapid_eval::Error::Token { .. })
            )
    });
    if wrong_call { 2 } else { 1 }
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    })
}

/// The error and its causes. Many of our errors end with their cause already; it is not said twice.
fn with_causes(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            let _ = write!(text, "\n  caused by: {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn codes_tell_wrong_calls_from_failed_work() {
        let wrong = Err::<(), _>(Usage::new("no such option")).context("generate").unwrap_err();
        assert_eq!(code(&wrong), 2);
        let io = Err::<(), _>(io::Error::other("disk")).context("save").unwrap_err();
        assert_eq!(code(&io), 1);
        let pipe = Err::<(), _>(io::Error::from(io::ErrorKind::BrokenPipe)).context("write");
        assert!(is_closed_pipe(&pipe.unwrap_err()));
    }

    #[test]
    fn causes_are_said_once() {
        let inner = anyhow::anyhow!("no space left");
        let error = inner.context("cannot write a.txt: no space left").context("saving");
        assert_eq!(with_causes(&error), "saving\n  caused by: cannot write a.txt: no space left");
    }
}
