//! Ctrl-C and termination: the first asks the work to save and stop, the second ends at once.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

static STOP: AtomicBool = AtomicBool::new(false);

/// Installs the handler and returns the flag that it sets.
///
/// # Errors
/// If the system refuses the handler.
pub fn watch() -> Result<&'static AtomicBool> {
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            // 128 + SIGINT, as a shell reports an interrupted program.
            std::process::exit(130);
        }
        eprintln!("\nstopping after this step; press Ctrl-C again to stop at once");
    })
    .context("cannot watch for Ctrl-C")?;
    Ok(&STOP)
}
