//! Generation: several prompts at once, streamed token by token, from a given state or from nothing.

use std::ops::{Add, ControlFlow};
use std::sync::Arc;
use std::time::Duration;

use elapid_formats::Tokenizer;
use elapid_models::State;

use crate::{Limits, Result, Runner, Sampling, Scheduler, Update};

/// One sequence to be continued.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Tokens to read first; at least one, unless there are a state and its `logits`.
    pub prompt: Vec<u32>,
    /// Keys the random draws: the same id gets the same draws in any batch.
    pub id: u64,
    /// The state of one slot to go on from; none to start from nothing.
    pub state: Option<State>,
    /// Tokens that the state has read, for the repetition penalty; it needs the last ones only.
    pub history: Vec<u32>,
    /// [V]: what the state's last token predicts, from which the first token is sampled if the prompt is empty.
    pub logits: Option<Arc<[f32]>>,
}

/// How to generate.
#[derive(Debug, Clone)]
pub struct Options {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens at most, for each sequence; 0 reads the prompts only.
    pub max_tokens: usize,
    /// Turns tokens into text. Without one, the tokens of a vocabulary of 256 are bytes, and others give none.
    pub tokenizer: Option<Tokenizer>,
    /// Strings that end a sequence and are not part of its text. They need tokens that give text.
    pub stop: Vec<String>,
    /// Tokens that end a sequence; they are no part of its text.
    pub end_of_sequence: Vec<u32>,
    /// Each prompt is read so many tokens at a time, which bounds memory; [`Reading::tokens`](crate::Reading::tokens) is
    /// what is fastest. Where prompts are cut may change the last bits of what a GPU makes of them.
    pub chunk: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            sampling: Sampling::default(),
            max_tokens: 256,
            tokenizer: None,
            stop: Vec::new(),
            end_of_sequence: Vec::new(),
            chunk: 2048,
        }
    }
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// It has as many tokens as were asked for.
    Length,
    /// A stop string came.
    Stop,
    /// An end-of-sequence token came.
    EndOfSequence,
    /// The receiver of the events asked to stop.
    Interrupted,
}

/// A new token.
#[derive(Debug, Clone, Copy)]
pub struct Event<'a> {
    /// Index of the request.
    pub sequence: usize,
    /// The token.
    pub token: u32,
    /// Text that may be shown now; often empty in the middle of a character or of a possible stop string.
    pub text: &'a str,
}

/// What came of one request.
#[derive(Debug, Clone)]
pub struct Generated {
    /// The new tokens.
    pub tokens: Vec<u32>,
    /// Their text, without the stop string; empty if there is no tokenizer.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// The state (one slot) after the prompt and every new token but the last, which no step has read.
    /// To go on, let that token be the next prompt's first.
    pub state: State,
    /// [V]: what the last token that the state has read predicts. Given back with the state and an empty prompt, the
    /// last token is sampled anew; after a request of 0 tokens, this forks a prompt that was read once. None if the
    /// sequence was interrupted, or its last token was chosen on a GPU.
    pub logits: Option<Arc<[f32]>>,
}

/// Where the time went.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Timing {
    /// Prompt tokens read.
    pub prefill_tokens: usize,
    /// Time to read them.
    pub prefill: Duration,
    /// Tokens made by decode steps; the first of each sequence comes out of the prefill.
    pub decode_tokens: usize,
    /// Time of these steps.
    pub decode: Duration,
}

impl Timing {
    /// Prompt tokens a second; 0 if there was none.
    pub fn prefill_rate(&self) -> f64 {
        rate(self.prefill_tokens, self.prefill)
    }

    /// Decoded tokens a second; 0 if there was none.
    pub fn decode_rate(&self) -> f64 {
        rate(self.decode_tokens, self.decode)
    }
}

impl Add for Timing {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            prefill_tokens: self.prefill_tokens + other.prefill_tokens,
            prefill: self.prefill + other.prefill,
            decode_tokens: self.decode_tokens + other.decode_tokens,
            decode: self.decode + other.decode,
        }
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    if tokens == 0 { 0.0 } else { tokens as f64 / time.as_secs_f64().max(1e-9) }
}

/// What came of all requests.
#[derive(Debug, Clone)]
pub struct Generation {
    /// One per request, in order.
    pub sequences: Vec<Generated>,
    /// Where the time went.
    pub timing: Timing,
}

/// Continues every request, all at once. `on_event` is shown each token as it comes and may stop all of them.
///
/// # Errors
/// If an option makes no sense, a prompt is empty or has a token outside the vocabulary, a state is of
/// another model, or the model's output is not finite.
pub fn generate(
    runner: &mut dyn Runner,
    requests: &[Request],
    options: &Options,
    on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
) -> Result<Generation> {
    if let [request] = requests
        && let Some(outcome) = runner.continue_alone(request, options, on_event)
    {
        return outcome;
    }
    let limits = Limits {
        slots: requests.len().max(1),
        prefill_tokens: options.chunk.max(runner.reading().tokens),
        queue: requests.len(),
        ..Limits::default()
    };
    let mut scheduler = Scheduler::new(runner, limits)?;
    for request in requests {
        scheduler.submit(request.clone(), options)?;
    }
    let mut done: Vec<Option<Generated>> = requests.iter().map(|_| None).collect();
    while !scheduler.is_idle() {
        let mut interrupted = false;
        for update in scheduler.step() {
            match update {
                Update::Token { handle, token, text } => {
                    let event = Event { sequence: handle as usize, token, text: &text };
                    interrupted |= on_event(event).is_break();
                }
                Update::Finished { handle, generated } => done[handle as usize] = Some(generated),
                Update::Failed { error, .. } => return Err(error),
            }
        }
        if interrupted {
            for handle in 0..requests.len() as u64 {
                scheduler.cancel(handle);
            }
        }
    }
    let timing = scheduler.timing();
    Ok(Generation { sequences: done.into_iter().flatten().collect(), timing })
}
