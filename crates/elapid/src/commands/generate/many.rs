//! Many prompts, or many continuations of one: they share the model's slots, and each becomes a line of JSON as soon
//! as it has ended.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use elapid_infer::{Finish, Limits, Options, Request, Runner, Scheduler, Timing, Update};
use serde::{Deserialize, Serialize};

use crate::exit::Usage;

/// A line of the prompts file, where it is JSON. What is missing is as the command line says.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    prompt: Option<String>,
    tokens: Option<Vec<u32>>,
    /// Keys the draws, instead of the line's index.
    id: Option<u64>,
    max_tokens: Option<usize>,
    stop: Option<Stop>,
    temperature: Option<f32>,
    top_k: Option<usize>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    repetition_window: Option<usize>,
    seed: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Stop {
    One(String),
    Several(Vec<String>),
}

/// What is printed for each.
#[derive(Debug, Serialize)]
struct Ended<'a> {
    /// Index of the prompt or of the continuation.
    index: u64,
    prompt_tokens: usize,
    tokens: &'a [u32],
    /// Where tokens give text.
    text: Option<&'a str>,
    finish: Finish,
    seed: u64,
}

/// One that could not go on.
#[derive(Debug, Serialize)]
struct Failed {
    index: u64,
    error: String,
}

/// What came of all jobs.
pub struct Outcome {
    pub sequences: usize,
    /// New ones, of all sequences.
    pub tokens: usize,
    pub timing: Timing,
}

/// A request, its options, and how many tokens its prompt has.
pub struct Job {
    pub request: Request,
    pub options: Options,
    pub prompt_tokens: usize,
}

/// The jobs of a prompts file: a prompt a line, or with `json` an object a line. Empty lines are left out.
///
/// # Errors
/// If the file cannot be opened; the iterator's items also if a line cannot be used.
pub fn jobs<'a>(
    path: &Path,
    json: bool,
    options: &'a Options,
    encode: impl Fn(&str) -> Result<Vec<u32>> + 'a,
) -> Result<impl Iterator<Item = Result<Job>> + 'a> {
    let name = path.display().to_string();
    let reader: Box<dyn BufRead> = if path.as_os_str() == "-" {
        Box::new(BufReader::new(io::stdin()))
    } else {
        let file = File::open(path).with_context(|| format!("cannot read {name}"))?;
        Box::new(BufReader::new(file))
    };
    let mut index = 0;
    let lines = reader.lines().enumerate().filter_map(move |(number, line)| {
        let place = || format!("{name}, line {}", number + 1);
        let line = match line.with_context(|| format!("cannot read {}", place())) {
            Ok(line) if line.trim().is_empty() => return None,
            Ok(line) => line,
            Err(error) => return Some(Err(error)),
        };
        index += 1;
        Some(job(&line, json, index - 1, options, &encode).with_context(place))
    });
    Ok(lines)
}

fn job(
    line: &str,
    json: bool,
    index: u64,
    options: &Options,
    encode: &impl Fn(&str) -> Result<Vec<u32>>,
) -> Result<Job> {
    let line = match json {
        false => Line { prompt: Some(line.to_owned()), ..Line::default() },
        true => serde_json::from_str(line).map_err(|error| Usage::new(error.to_string()))?,
    };
    let prompt = match (&line.prompt, line.tokens) {
        (Some(text), None) => encode(text)?,
        (None, Some(tokens)) => tokens,
        _ => return Err(Usage::new("expected either \"prompt\" or \"tokens\"").into()),
    };
    let mut options = options.clone();
    let sampling = &mut options.sampling;
    sampling.temperature = line.temperature.unwrap_or(sampling.temperature);
    sampling.top_k = line.top_k.unwrap_or(sampling.top_k);
    sampling.top_p = line.top_p.unwrap_or(sampling.top_p);
    sampling.min_p = line.min_p.unwrap_or(sampling.min_p);
    sampling.repetition_penalty = line.repetition_penalty.unwrap_or(sampling.repetition_penalty);
    sampling.repetition_window = line.repetition_window.unwrap_or(sampling.repetition_window);
    sampling.seed = line.seed.unwrap_or(sampling.seed);
    options.max_tokens = line.max_tokens.unwrap_or(options.max_tokens);
    match line.stop {
        Some(Stop::One(stop)) => options.stop = vec![stop],
        Some(Stop::Several(stops)) => options.stop = stops,
        None => {}
    }
    let prompt_tokens = prompt.len();
    let request = Request { prompt, id: line.id.unwrap_or(index), ..Request::default() };
    Ok(Job { request, options, prompt_tokens })
}

/// Runs all jobs, at most `batch` at once, and prints a line for each as it ends. No more are read than can run soon.
///
/// # Errors
/// If a job cannot be read or makes no sense, or one of them failed; those before it are printed.
pub fn run(
    runner: &mut dyn Runner,
    batch: usize,
    with_text: bool,
    jobs: impl Iterator<Item = Result<Job>>,
) -> Result<Outcome> {
    let limits = Limits { queue: batch, ..Limits::throughput(&*runner, batch) };
    let mut scheduler = Scheduler::new(runner, limits)?;
    let mut jobs = jobs.fuse();
    let mut accepted: Vec<(usize, u64)> = Vec::new();
    let (mut failures, mut tokens, mut refused) = (0u64, 0, None);
    loop {
        while scheduler.waiting() < batch && refused.is_none() {
            let Some(job) = jobs.next() else { break };
            let index = accepted.len();
            let submitted = job.and_then(|Job { request, options, prompt_tokens }| {
                accepted.push((prompt_tokens, options.sampling.seed));
                scheduler.submit(request, &options).with_context(|| format!("prompt {index}"))
            });
            refused = submitted.err();
        }
        if scheduler.is_idle() {
            break;
        }
        let mut out = io::stdout().lock();
        for update in scheduler.step() {
            let line = match update {
                Update::Token { .. } => continue,
                Update::Finished { handle, generated } => {
                    tokens += generated.tokens.len();
                    let (prompt_tokens, seed) =
                        accepted.get(handle as usize).copied().unwrap_or_default();
                    serde_json::to_string(&Ended {
                        index: handle,
                        prompt_tokens,
                        tokens: &generated.tokens,
                        text: with_text.then_some(&generated.text),
                        finish: generated.finish,
                        seed,
                    })
                }
                Update::Failed { handle, error } => {
                    failures += 1;
                    serde_json::to_string(&Failed { index: handle, error: error.to_string() })
                }
            };
            writeln!(out, "{}", line.map_err(io::Error::from)?)?;
        }
        out.flush()?;
    }
    match refused {
        Some(error) => Err(error),
        None if failures > 0 => bail!("{failures} of {} prompts failed", accepted.len()),
        None => Ok(Outcome { sequences: accepted.len(), tokens, timing: scheduler.timing() }),
    }
}
