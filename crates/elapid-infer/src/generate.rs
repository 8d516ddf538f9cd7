//! Generation: several prompts at once, streamed token by token, from a given state or from nothing.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use elapid_formats::Tokenizer;
use elapid_formats::tokenizer::Detokenizer;
use elapid_models::State;
use elapid_tensor::{Sequence, Sequences};

use crate::prefill::{self, Feed, check_tokens};
use crate::{Error, Logits, Result, Runner, Sampler, Sampling, TextStream};

/// One sequence to be continued.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Tokens to read first, at least one.
    pub prompt: Vec<u32>,
    /// Keys the random draws: the same id gets the same draws in any batch.
    pub id: u64,
    /// The state of one slot to go on from; none to start from nothing.
    pub state: Option<State>,
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
    /// Prompts are read so many tokens at a time, which bounds memory.
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

/// One request under way.
struct Running {
    sequence: usize,
    id: u64,
    /// Prompt and new tokens.
    history: Vec<u32>,
    prompt: usize,
    /// None if tokens give no text.
    detokenizer: Option<Detokenizer>,
    stream: TextStream,
    text: String,
    finish: Option<Finish>,
}

impl Running {
    /// The end of the text: all that was held back. After a stop string nothing follows.
    fn rest(&mut self, stopped: bool) -> String {
        let mut bytes = Vec::new();
        if let Some(detokenizer) = self.detokenizer.take().as_mut().filter(|_| !stopped) {
            detokenizer.finish(&mut bytes);
        }
        self.stream.push(&bytes).0 + &self.stream.finish()
    }
}

/// Continues every request. `on_event` is shown each token as it comes and may stop all of them.
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
    let vocabulary = runner.config().vocab_size;
    let tokenizer = options.tokenizer.clone().or((vocabulary == 256).then(Tokenizer::bytes));
    if !options.stop.is_empty() && tokenizer.is_none() {
        return Err(Error::Option {
            name: "stop",
            expected: "none, as without a tokenizer there is no text",
            found: format!("{:?} for {} tokens", options.stop, runner.config().vocab_size),
        });
    }
    if options.chunk == 0 {
        return Err(Error::Option {
            name: "chunk",
            expected: "at least one token",
            found: "0".into(),
        });
    }
    let stream = TextStream::new(&options.stop)?;
    let sampler = Sampler::new(&options.sampling, runner.config().vocab_size)?;
    let mut engine = Engine { runner, options, tokenizer, sampler, on_event };
    engine.run(requests, &stream)
}

struct Engine<'a> {
    runner: &'a mut dyn Runner,
    options: &'a Options,
    tokenizer: Option<Tokenizer>,
    sampler: Sampler,
    on_event: &'a mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
}

impl Engine<'_> {
    fn run(&mut self, requests: &[Request], stream: &TextStream) -> Result<Generation> {
        let mut timing = Timing::default();
        let started = Instant::now();
        let (states, logits) = self.prefill(requests)?;
        timing.prefill_tokens = requests.iter().map(|request| request.prompt.len()).sum();
        timing.prefill = started.elapsed();

        let mut running: Vec<Running> = requests
            .iter()
            .enumerate()
            .map(|(sequence, request)| Running {
                sequence,
                id: request.id,
                history: request.prompt.clone(),
                prompt: request.prompt.len(),
                detokenizer: (self.tokenizer.as_ref()).map(|own| own.detokenizer(&request.prompt)),
                stream: stream.clone(),
                text: String::new(),
                finish: (self.options.max_tokens == 0).then_some(Finish::Length),
            })
            .collect();
        let mut done: Vec<Option<Generated>> = requests.iter().map(|_| None).collect();
        if !running.is_empty() {
            let started = Instant::now();
            let mut state = State::join(&states.iter().collect::<Vec<_>>())?;
            drop(states);
            if self.options.max_tokens > 0 {
                self.choose(&mut running, &logits, &state)?;
            }
            drop(logits);
            loop {
                state = leave(&mut running, state, &mut done)?;
                if running.is_empty() {
                    break;
                }
                let logits;
                (logits, state) = self.step(&running, state)?;
                timing.decode_tokens += running.len();
                self.choose(&mut running, &logits, &state)?;
            }
            timing.decode = started.elapsed();
        }
        Ok(Generation { sequences: done.into_iter().flatten().collect(), timing })
    }

    /// Reads the prompts: each one's state, and the logits of each one's last token [S, V].
    fn prefill(&mut self, requests: &[Request]) -> Result<(Vec<State>, Vec<f32>)> {
        let mut feeds = Vec::with_capacity(requests.len());
        for (sequence, request) in requests.iter().enumerate() {
            if request.prompt.is_empty() {
                return Err(Error::EmptyPrompt { sequence });
            }
            check_tokens(self.runner, sequence, &request.prompt)?;
            let state = request.state.clone();
            feeds.push(Feed::new(self.runner, &request.prompt, request.id, state)?);
        }
        let lengths: Vec<usize> = requests.iter().map(|request| request.prompt.len()).collect();
        let mut logits = Vec::new();
        for parts in prefill::plan(&lengths, self.options.chunk) {
            let mut end = 0;
            let mut wanted = Vec::new();
            for part in &parts {
                end += part.tokens.len();
                if part.tokens.end == lengths[part.sequence] && self.options.max_tokens > 0 {
                    wanted.push(end - 1);
                }
            }
            prefill::run(
                self.runner,
                &mut feeds,
                &parts,
                &wanted,
                &mut |Logits { values, .. }| {
                    logits.extend_from_slice(values);
                    ControlFlow::Continue(())
                },
            )?;
        }
        Ok((feeds.into_iter().map(|feed| feed.state).collect(), logits))
    }

    /// Reads the last token of every running sequence: logits [S, V] and the state after it.
    fn step(&mut self, running: &[Running], state: State) -> Result<(Vec<f32>, State)> {
        let ids: Vec<u32> = running.iter().filter_map(|r| r.history.last().copied()).collect();
        let sequences = running
            .iter()
            .enumerate()
            .map(|(slot, running)| Sequence {
                start: slot,
                len: 1,
                slot,
                continued: true,
                position: state.positions[slot],
                id: running.id,
            })
            .collect();
        let sequences = Sequences::new(sequences, running.len())?;
        let rows: Vec<usize> = (0..running.len()).collect();
        let mut logits =
            Vec::with_capacity(running.len() * self.runner.config().padded_vocab_size());
        let mut receive = |piece: Logits<'_>| {
            logits.extend_from_slice(piece.values);
            ControlFlow::Continue(())
        };
        let state = self.runner.run(&ids, &sequences, Some(state), &rows, &mut receive)?;
        Ok((logits, state))
    }

    /// Samples the next token of every running sequence from its logits [S, V].
    fn choose(&mut self, running: &mut [Running], logits: &[f32], state: &State) -> Result<()> {
        let mut rows = logits.chunks_exact(self.runner.config().padded_vocab_size());
        let mut interrupted = false;
        for (slot, running) in running.iter_mut().enumerate() {
            let position = state.positions[slot];
            let token = self.sampler.sample(
                rows.next().unwrap_or_default(),
                &running.history,
                running.id,
                position,
            )?;
            running.history.push(token);
            interrupted |= self.receive(running, token).is_break();
        }
        if interrupted {
            for running in running {
                running.finish.get_or_insert(Finish::Interrupted);
            }
        }
        Ok(())
    }

    /// Turns a token into text, tells the receiver, and decides whether the sequence ends.
    fn receive(&mut self, running: &mut Running, token: u32) -> ControlFlow<()> {
        let ended = self.options.end_of_sequence.contains(&token);
        let mut bytes = Vec::new();
        if let Some(detokenizer) = running.detokenizer.as_mut().filter(|_| !ended) {
            detokenizer.push(token, &mut bytes);
        }
        let (mut text, stopped) = running.stream.push(&bytes);
        let full = running.history.len() - running.prompt >= self.options.max_tokens;
        running.finish = match (stopped, ended, full) {
            (true, ..) => Some(Finish::Stop),
            (_, true, _) => Some(Finish::EndOfSequence),
            (.., true) => Some(Finish::Length),
            _ => None,
        };
        if running.finish.is_some() {
            text += &running.rest(stopped);
        }
        running.text += &text;
        (self.on_event)(Event { sequence: running.sequence, token, text: &text })
    }
}

/// Takes the finished sequences out of the batch; the state of the others remains.
fn leave(
    running: &mut Vec<Running>,
    state: State,
    done: &mut [Option<Generated>],
) -> Result<State> {
    if running.iter().all(|running| running.finish.is_none()) {
        return Ok(state);
    }
    let mut stay = Vec::new();
    let mut kept = Vec::new();
    for (slot, mut running) in running.drain(..).enumerate() {
        match running.finish {
            None => {
                kept.push(slot);
                stay.push(running);
            }
            Some(finish) => {
                let rest = running.rest(false);
                running.text += &rest;
                done[running.sequence] = Some(Generated {
                    tokens: running.history.split_off(running.prompt),
                    text: running.text,
                    finish,
                    state: state.select(&[slot])?,
                });
            }
        }
    }
    *running = stay;
    Ok(state.select(&kept)?)
}
