//! Live progress on stderr: a bar where a person watches a terminal, plain lines elsewhere (first
//! step, then every ten seconds, every minute once the run is ten minutes old, last step), nothing
//! when quiet. A terminal that goes away never stops a run: failed writes are ignored.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::config::ProgressMode;

/// The figures shown after a step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Status {
    /// Optimizer steps done.
    pub step: u64,
    /// Cross-entropy in nats.
    pub loss: f64,
    /// The same in bits per byte, where tokens are text.
    pub bits_per_byte: Option<f64>,
    /// Real tokens per second.
    pub tokens_per_s: f64,
    /// Peak memory of the process, where known.
    pub memory_bytes: Option<u64>,
}

/// Shows a run's progress.
pub struct Progress {
    display: Display,
    steps: u64,
    first_step: u64,
    started: Instant,
}

enum Display {
    Bar(ProgressBar),
    Lines { out: Box<dyn Write + Send>, last: Option<Instant> },
    Quiet,
}

impl Progress {
    /// Progress of a run of `steps` steps that starts (or resumes) after `first_step` of them.
    pub fn new(mode: ProgressMode, steps: u64, first_step: u64) -> Self {
        let display = match mode {
            ProgressMode::Quiet => Display::Quiet,
            ProgressMode::Auto if stderr_is_live() => {
                Display::Bar(bar(ProgressDrawTarget::stderr_with_hz(10), steps, first_step))
            }
            _ => Display::Lines { out: Box::new(std::io::stderr()), last: None },
        };
        Self { display, steps, first_step, started: Instant::now() }
    }

    /// Plain lines into `out`, as they go to stderr without a terminal.
    pub fn lines(out: Box<dyn Write + Send>, steps: u64, first_step: u64) -> Self {
        let display = Display::Lines { out, last: None };
        Self { display, steps, first_step, started: Instant::now() }
    }

    /// Shows the figures of a step.
    pub fn update(&mut self, status: &Status) {
        self.update_at(status, Instant::now());
    }

    fn update_at(&mut self, status: &Status, now: Instant) {
        let age = now.saturating_duration_since(self.started);
        let done = status.step.saturating_sub(self.first_step);
        let left = self.steps.saturating_sub(status.step);
        let eta = (done > 0).then(|| age.as_secs_f64() * left as f64 / done as f64);
        match &mut self.display {
            Display::Bar(bar) => {
                bar.set_message(figures(status, eta));
                bar.set_position(status.step);
            }
            Display::Lines { out, last } => {
                let interval =
                    Duration::from_secs(if age < Duration::from_secs(600) { 10 } else { 60 });
                let due = last.is_none_or(|last| now.saturating_duration_since(last) >= interval);
                if due || status.step >= self.steps {
                    *last = Some(now);
                    let line = figures(status, eta);
                    let _ = writeln!(out, "step {}/{}  {line}", status.step, self.steps);
                }
            }
            Display::Quiet => {}
        }
    }

    /// Shows how much of a validation is done, on a bar; plain lines do not wait for it.
    pub fn validating(&mut self, share: f64) {
        if let Display::Bar(bar) = &self.display {
            bar.set_message(format!("validating {:.0} %", share * 100.0));
        }
    }

    /// Shows a line that stays, such as a validation or a saved checkpoint, above the bar.
    pub fn note(&mut self, text: &str) {
        match &mut self.display {
            Display::Bar(bar) => bar.println(text),
            Display::Lines { out, .. } => {
                let _ = writeln!(out, "{text}");
            }
            Display::Quiet => {}
        }
    }

    /// Ends the display; the bar stays with its last figures.
    pub fn finish(&mut self) {
        if let Display::Bar(bar) = &self.display {
            bar.abandon();
        }
        self.display = Display::Quiet;
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Whether stderr is a terminal that understands cursor movement.
fn stderr_is_live() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

fn bar(target: ProgressDrawTarget, steps: u64, first_step: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(steps), target);
    // The template is constant, so the fallback is only for the type.
    let style = ProgressStyle::with_template("{bar:24.cyan/blue} {pos}/{len}  {wide_msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━╸─");
    bar.set_style(style);
    bar.set_position(first_step);
    bar
}

fn figures(status: &Status, eta: Option<f64>) -> String {
    let mut text = format!("loss {:.4}", status.loss);
    // Writing to a string cannot fail.
    if let Some(bits) = status.bits_per_byte {
        let _ = write!(text, "  {bits:.3} bits/byte");
    }
    let _ = write!(text, "  {} tokens/s", thousands(status.tokens_per_s));
    if let Some(bytes) = status.memory_bytes {
        let _ = write!(text, "  {}", memory(bytes));
    }
    if let Some(eta) = eta {
        let _ = write!(text, "  ETA {}", duration(eta));
    }
    text
}

/// A whole number with a comma every three digits: 12,345.
pub fn thousands(value: f64) -> String {
    if !value.is_finite() {
        return "-".to_string();
    }
    let digits = format!("{:.0}", value.abs());
    let mut text = if value < -0.5 { "-".to_string() } else { String::new() };
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes in MiB, or in GiB from one on.
pub fn memory(bytes: u64) -> String {
    let mebibytes = bytes as f64 / f64::from(1 << 20);
    if mebibytes < 1023.5 {
        format!("{mebibytes:.0} MiB")
    } else {
        format!("{:.2} GiB", mebibytes / 1024.0)
    }
}

/// Seconds in at most two units: 8s, 2m 05s, 3h 20m, 4d 7h.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "-".to_string();
    }
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m {:02}s", s / 60, s % 60),
        3600..86_400 => format!("{}h {:02}m", s / 3600, s % 3600 / 60),
        _ => format!("{}d {}h", s / 86_400, s % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Debug, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Captured {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }

        fn push(&self, text: &str) -> std::io::Result<()> {
            self.0.lock().unwrap().extend_from_slice(text.as_bytes());
            Ok(())
        }
    }

    impl Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl indicatif::TermLike for Captured {
        fn width(&self) -> u16 {
            120
        }
        fn move_cursor_up(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn write_line(&self, text: &str) -> std::io::Result<()> {
            self.push(text)?;
            self.push("\n")
        }
        fn write_str(&self, text: &str) -> std::io::Result<()> {
            self.push(text)
        }
        fn clear_line(&self) -> std::io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn status(step: u64) -> Status {
        Status {
            step,
            loss: 1.5,
            bits_per_byte: Some(2.164),
            tokens_per_s: 4512.3,
            memory_bytes: Some(312 << 20),
        }
    }

    #[test]
    fn lines_come_first_then_every_ten_seconds_then_last() {
        let captured = Captured::default();
        let mut progress = Progress::lines(Box::new(captured.clone()), 100, 0);
        let started = progress.started;
        for step in 1..=100 {
            progress.update_at(&status(step), started + Duration::from_secs(step));
        }
        let text = captured.text();
        let steps: Vec<&str> = text.lines().map(|l| l.split("  ").next().unwrap()).collect();
        let expected: Vec<String> =
            [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100].map(|s| format!("step {s}/100")).to_vec();
        assert_eq!(steps, expected);
        let line = "step 11/100  loss 1.5000  2.164 bits/byte  4,512 tokens/s  312 MiB  ETA 1m 29s";
        assert!(text.lines().any(|l| l == line), "{text}");
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'));
    }

    #[test]
    fn an_old_run_speaks_every_minute() {
        let captured = Captured::default();
        let mut progress = Progress::lines(Box::new(captured.clone()), 1_000_000, 0);
        let started = progress.started;
        for second in 600..900 {
            progress.update_at(&status(second), started + Duration::from_secs(second));
        }
        assert_eq!(captured.text().lines().count(), 5);
    }

    #[test]
    fn a_resumed_run_estimates_from_its_own_steps() {
        let captured = Captured::default();
        let mut progress = Progress::lines(Box::new(captured.clone()), 1000, 900);
        let started = progress.started;
        progress.update_at(&status(910), started + Duration::from_secs(20));
        assert!(captured.text().contains("ETA 3m 00s"), "{}", captured.text());
    }

    #[test]
    fn the_bar_shows_figures_and_notes() {
        let captured = Captured::default();
        let target = ProgressDrawTarget::term_like(Box::new(captured.clone()));
        let display = Display::Bar(bar(target, 10, 0));
        let mut progress = Progress { display, steps: 10, first_step: 0, started: Instant::now() };
        progress.update(&status(5));
        progress.validating(0.25);
        progress.note("checkpoint saved");
        progress.finish();
        let text = captured.text();
        assert!(text.contains("5/10  loss 1.5000  2.164 bits/byte"), "{text}");
        assert!(text.contains("5/10  validating 25 %"), "{text}");
        assert!(text.contains("checkpoint saved"), "{text}");
    }

    #[test]
    fn quiet_and_finished_say_nothing() {
        let captured = Captured::default();
        let mut progress = Progress::lines(Box::new(captured.clone()), 10, 0);
        progress.finish();
        progress.update(&status(1));
        progress.note("late");
        assert_eq!(captured.text(), "");
        assert!(matches!(Progress::new(ProgressMode::Quiet, 1, 0).display, Display::Quiet));
    }

    #[test]
    fn figures_in_words() {
        let numbers = [0.0, 999.6, 1234.0, 12_345_678.0, -4321.0, f64::NAN].map(thousands);
        assert_eq!(numbers, ["0", "1,000", "1,234", "12,345,678", "-4,321", "-"]);
        let times = [0.2, 59.0, 125.0, 12_000.0, 370_000.0, f64::INFINITY].map(duration);
        assert_eq!(times, ["0s", "59s", "2m 05s", "3h 20m", "4d 6h", "-"]);
        assert_eq!([memory(312 << 20), memory(3 << 29)], ["312 MiB", "1.50 GiB"]);
    }
}
