//! The last line on standard error: how much was read and made, and how fast.

use std::fmt;
use std::io::{self, Write};

use elapid_infer::{Finish, Generated, Timing};

use super::many::Outcome;
use crate::output::{grouped, rate};

/// Where and how it was computed.
pub struct Place {
    /// `cpu`, `cuda:0`.
    pub device: String,
    /// How weights are held, or the type of products.
    pub dtype: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {}", self.device, self.dtype)
    }
}

/// One text.
pub fn one(generated: &Generated, timing: &Timing, seed: u64, place: &Place) {
    let finish = match generated.finish {
        Finish::Length => "length reached",
        Finish::Stop => "stop string found",
        Finish::EndOfSequence => "end of sequence",
        Finish::Interrupted => "interrupted",
    };
    let (read, new) = (read(timing), new(generated.tokens.len(), timing));
    say(&format!("prompt: {read} · new: {new} · {finish} · seed {seed} · {place}"));
}

/// Several continuations of one prompt, which `reading` has read.
pub fn samples(reading: Timing, many: &Outcome, seed: u64, place: &Place) {
    let (read, timing) = (read(&reading), reading + many.timing);
    let (samples, new) = (counted(many.sequences, "sample"), new(many.tokens, &timing));
    say(&format!("prompt: {read} · {samples}: {new} · seed {seed} · {place}"));
}

/// Many prompts.
pub fn prompts(many: &Outcome, place: &Place) {
    let (read, new) = (read(&many.timing), new(many.tokens, &many.timing));
    say(&format!("{}: {read} · new: {new} · {place}", counted(many.sequences, "prompt")));
}

fn read(timing: &Timing) -> String {
    with_speed(timing.prefill_tokens, timing.prefill_tokens, timing.prefill_rate())
}

/// New tokens, of which decode steps made all but the first of each text.
fn new(tokens: usize, timing: &Timing) -> String {
    with_speed(tokens, timing.decode_tokens, timing.decode_rate())
}

/// So many tokens, and the speed of those that were measured, if any.
fn with_speed(tokens: usize, measured: usize, per_second: f64) -> String {
    match measured {
        0 => counted(tokens, "token"),
        _ => format!("{} at {} tokens/s", counted(tokens, "token"), rate(per_second)),
    }
}

fn counted(count: usize, what: &str) -> String {
    format!("{} {what}{}", grouped(count as u64), if count == 1 { "" } else { "s" })
}

fn say(line: &str) {
    // Nobody may be there to read it, which does not undo the work.
    let _ = writeln!(io::stderr(), "{line}");
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_speed_stands_only_beside_what_was_measured() {
        let timing = Timing {
            prefill_tokens: 1200,
            prefill: Duration::from_secs(2),
            decode_tokens: 30,
            decode: Duration::from_secs(4),
        };
        assert_eq!(read(&timing), "1,200 tokens at 600 tokens/s");
        assert_eq!(new(31, &timing), "31 tokens at 7.5 tokens/s");
        assert_eq!(read(&Timing::default()), "0 tokens");
        assert_eq!(new(1, &Timing::default()), "1 token");
    }
}
