//! `elapid generate`: continues a text, or token ids, with a model; or many of them at once.

mod many;
mod summary;

use std::fs;
use std::io::{self, IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{ArgGroup, Args};
use elapid_formats::{Fingerprint, load_continuation_checked, save_continuation};
use elapid_infer::{
    Event, Finish, Generated, Options, Request, Runner, Sampling, Timing, forward, generate,
};
use elapid_models::State;
use elapid_tensor::{DType, Device, Tensor};
use serde::Serialize;

use crate::cli::{Global, JsonArgument, ModelArgument, WeightsArgument};
use crate::exit::Usage;
use crate::output::print_json;
use crate::ready_model::{ReadyModel, check_state};
use crate::text_of::TextOf;
use summary::Place;

const EXAMPLES: &str = "\
Examples:
  elapid generate --model runs/first --prompt 'The snake '
  elapid generate --model runs/first --prompt-file story.txt --max-tokens 1000 --stop $'\\n\\n'
  echo 'fn main() {' | elapid generate --model runs/first --prompt-file - --temperature 0
  elapid generate --model mamba-130m-hf --prompt 'Mamba is the' --temperature 0 -n 20
  elapid generate --model state-spaces/mamba-130m --tokenizer EleutherAI/gpt-neox-20b --prompt 'Mamba'
  elapid generate --model mamba-130m-hf --tokens 510,5347,273 --seed 1 --json
  elapid generate --model runs/first --prompt 'Chapter 1' --state-out chapter.state
  elapid generate --model runs/first --state-in chapter.state --prompt ' and then'
  elapid generate --model runs/first --state-in chapter.state        goes on where it ended
  elapid generate --model runs/first --prompts prompts.jsonl --batch 16 > texts.jsonl
  elapid generate --model runs/first --prompt 'The ' --samples 4
  elapid generate --model mamba-130m-hf --prompt 'Mamba is the' --weights q8_0

Text needs a tokenizer: the model's tokenizer.json or GGUF vocabulary, or the one of --tokenizer; a \
model of 256 tokens reads and writes bytes. Without one, --tokens gives ids and ids are printed.
A text ends at the model's end-of-sequence token (generation_config.json, config.json, tokenizer).
--prompts: a prompt a line, or (.jsonl, --jsonl) an object a line with \"prompt\" or \"tokens\" and, \
where they are not those of the options, max_tokens, stop, id, seed, temperature, top_k, top_p, min_p, repetition_penalty and \
repetition_window. Each gets what it would get alone with its index (or id) among the draws' keys; \
its line of JSON is printed as soon as it has ended.
Sampling: repetition penalty, temperature, top-k, top-p, min-p, in this order.";

/// Arguments of `elapid generate`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, group = ArgGroup::new("input").args(["prompt", "prompt_file", "tokens", "prompts"]))]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgument,
    /// Text to continue [default: a line break]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// File with the text to continue; - for standard input
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Token ids to continue, separated by commas
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    tokens: Option<Vec<u32>>,
    /// File with many prompts, one a line; - for standard input. Prints a line of JSON for each
    #[arg(long, value_name = "FILE", conflicts_with_all = ["state_in", "state_out", "samples", "json"])]
    prompts: Option<PathBuf>,
    /// The lines of --prompts are JSON objects, whatever the file's name
    #[arg(long, requires = "prompts")]
    jsonl: bool,
    /// Continue the prompt in K ways, which reads it once. Prints a line of JSON for each
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..), conflicts_with_all = ["state_out", "json"])]
    samples: Option<u32>,
    /// Sequences that run at once, with --prompts and --samples
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// Tokens to generate at most; 0 only reads the prompt
    #[arg(long, short = 'n', value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// Stop at this text, which is not printed (repeatable)
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Go on after the model's end-of-sequence token
    #[arg(long)]
    ignore_eos: bool,
    /// tokenizer.json, a folder with one, or OWNER/NAME on the hub, instead of the model's own
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,
    /// Go on from this state
    #[arg(long, value_name = "FILE", help_heading = "State")]
    state_in: Option<PathBuf>,
    /// Save the state that has read the prompt and all that was generated
    #[arg(long, value_name = "FILE", help_heading = "State")]
    state_out: Option<PathBuf>,
    /// How decode steps on a GPU keep the recurrent state: f32, or bf16, which halves its bytes and rounds it once a
    /// token [default: f32]
    #[arg(long, value_name = "TYPE", value_parser = crate::cli::dtype)]
    state_dtype: Option<DType>,
    #[command(flatten)]
    weights: WeightsArgument,
    #[command(flatten)]
    json: JsonArgument,
    #[command(flatten)]
    sampling: SamplingArguments,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
struct SamplingArguments {
    /// Below 1 more predictable, above 1 more varied, 0 always the most probable token
    #[arg(long, value_name = "X", default_value_t = 0.8, allow_negative_numbers = true)]
    temperature: f32,
    /// Only the K most probable tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Only the most probable tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f32,
    /// Only tokens at least this share as probable as the most probable one
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    min_p: f32,
    /// Make tokens seen lately less probable; 1 changes nothing
    #[arg(long, value_name = "X", default_value_t = 1.0, allow_negative_numbers = true)]
    repetition_penalty: f32,
    /// How many of the last tokens count as seen lately; 0 for all
    #[arg(long, value_name = "N", default_value_t = 64)]
    repetition_window: usize,
    /// Same seed, same text [default: another one every time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

impl SamplingArguments {
    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            repetition_window: self.repetition_window,
            seed: self.seed.unwrap_or_else(arbitrary_seed),
        }
    }
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    model: String,
    prompt_tokens: usize,
    tokens: &'a [u32],
    /// With a tokenizer only.
    text: Option<&'a str>,
    finish: Finish,
    seed: u64,
    device: String,
    dtype: String,
    prefill_seconds: f64,
    prefill_tokens_per_second: f64,
    decode_seconds: f64,
    decode_tokens_per_second: f64,
}

/// Generates.
pub fn run(arguments: &Arguments, global: &Global) -> Result<()> {
    let mut options = Options {
        sampling: arguments.sampling.sampling(),
        max_tokens: arguments.max_tokens,
        stop: arguments.stop.clone(),
        ..Options::default()
    };
    options.sampling.validate().map_err(as_option)?;
    elapid_infer::StopStrings::new(&options.stop).map_err(as_option)?;

    let placement = global.placement()?;
    if arguments.state_dtype.is_some() {
        check_state(&placement)?;
    }
    let weights = arguments.weights.weights;
    let (path, tokenizer) = (&arguments.model.model, arguments.tokenizer.as_deref());
    let (ready, text) = ReadyModel::open_with_text(path, &placement, weights, tokenizer)?;
    let mut ready = ready.for_decoding().with_state(arguments.state_dtype.unwrap_or(DType::F32));
    let place = Place { device: placement.device.to_string(), dtype: ready.dtype() };
    options.tokenizer = text.tokenizer.clone();
    options.chunk = ready.reading().tokens;
    if !arguments.ignore_eos {
        options.end_of_sequence = text.end_of_sequence.clone();
    }
    if let Some(path) = &arguments.prompts {
        let json =
            arguments.jsonl || path.extension().is_some_and(|extension| extension == "jsonl");
        let encode = |prompt: &str| encode(prompt.as_bytes(), &text, true);
        let jobs = many::jobs(path, json, &options, encode)?;
        let with_text = text.tokenizer.is_some();
        return ready.with(|runner| {
            let many = many::run(runner, usize::from(arguments.batch), with_text, jobs)?;
            summary::prompts(&many, &place);
            Ok(())
        });
    }
    let prompt = prompt(arguments, &text)?;
    let fingerprint = match (&arguments.state_in, &arguments.state_out) {
        (None, None) => None,
        _ => Some(ready.fingerprint()?),
    };
    let model = ready.folder().display().to_string();
    let run = |runner: &mut dyn Runner| {
        run_one(arguments, runner, prompt, &options, fingerprint.as_ref(), &place, model)
    };
    ready.with(run)
}

/// One prompt, continued once or in several ways.
fn run_one(
    arguments: &Arguments,
    runner: &mut dyn Runner,
    prompt: Vec<u32>,
    options: &Options,
    fingerprint: Option<&Fingerprint>,
    place: &Place,
    model: String,
) -> Result<()> {
    let with_text = options.tokenizer.is_some();
    let (state, logits) = match (&arguments.state_in, fingerprint) {
        (Some(path), Some(fingerprint)) => {
            let (state, logits) = read_state(path, runner, fingerprint)?;
            if prompt.is_empty() && logits.is_none() {
                return Err(Usage::new(format!(
                    "{} does not say what its last token predicts (elapid generate --state-out writes \
                     that): give what follows with --prompt, --prompt-file or --tokens",
                    path.display()
                ))
                .into());
            }
            (Some(state), logits)
        }
        _ => (None, None),
    };
    let request = Request { prompt, state, logits, ..Request::default() };
    if let Some(samples) = arguments.samples {
        let (jobs, read) = forks(runner, &request, options, samples)?;
        let batch = usize::from(arguments.batch);
        let many = many::run(runner, batch, with_text, jobs.into_iter().map(Ok))?;
        summary::samples(read, &many, options.sampling.seed, place);
        return Ok(());
    }

    let mut writer = (!arguments.json.json).then(|| Writer::new(with_text));
    let outcome =
        generate(runner, std::slice::from_ref(&request), options, &mut |event| match &mut writer {
            Some(writer) => writer.write(event),
            None => ControlFlow::Continue(()),
        });
    let generation = outcome.map_err(as_option)?;
    if let Some(writer) = writer {
        writer.finish()?;
    }
    let Some(generated) = generation.sequences.first() else {
        return Ok(());
    };
    if let (Some(path), Some(fingerprint)) = (&arguments.state_out, fingerprint) {
        let (state, logits) = state_after(runner, generated)?;
        save_continuation(path, &state, logits.as_ref(), fingerprint)
            .context("the state was not saved")?;
    }
    let seed = options.sampling.seed;
    if arguments.json.json {
        let timing = &generation.timing;
        return print_json(&Report {
            model,
            prompt_tokens: request.prompt.len(),
            tokens: &generated.tokens,
            text: with_text.then_some(generated.text.as_str()),
            finish: generated.finish,
            seed,
            device: place.device.clone(),
            dtype: place.dtype.clone(),
            prefill_seconds: timing.prefill.as_secs_f64(),
            prefill_tokens_per_second: timing.prefill_rate(),
            decode_seconds: timing.decode.as_secs_f64(),
            decode_tokens_per_second: timing.decode_rate(),
        });
    }
    summary::one(generated, &generation.timing, seed, place);
    Ok(())
}

/// The tokens to read first.
fn prompt(arguments: &Arguments, text: &TextOf) -> Result<Vec<u32>> {
    if let Some(ids) = &arguments.tokens {
        return Ok(ids.clone());
    }
    let bytes = match (&arguments.prompt, &arguments.prompt_file) {
        (Some(text), _) => text.clone().into_bytes(),
        (None, Some(path)) if path.as_os_str() == "-" => {
            let mut bytes = Vec::new();
            io::stdin().lock().read_to_end(&mut bytes).context("cannot read standard input")?;
            bytes
        }
        (None, Some(path)) => {
            fs::read(path).with_context(|| format!("cannot read {}", path.display()))?
        }
        // Goes on from what the state's last token predicts.
        (None, None) if arguments.state_in.is_some() => return Ok(Vec::new()),
        (None, None) => b"\n".to_vec(),
    };
    // Marks around a whole text do not belong in the middle of one.
    encode(&bytes, text, arguments.state_in.is_none())
}

/// The tokens of a prompt; with `whole`, and the marks that the tokenizer puts around a text.
fn encode(bytes: &[u8], text: &TextOf, whole: bool) -> Result<Vec<u32>> {
    let ids = text.tokenizer()?.encode_bytes(bytes, whole)?;
    if ids.is_empty() {
        return Err(Usage::new("the prompt is empty: at least one byte is needed").into());
    }
    Ok(ids)
}

/// Several continuations of a prompt that is read once, here, and the time of that.
fn forks(
    runner: &mut dyn Runner,
    request: &Request,
    options: &Options,
    samples: u32,
) -> Result<(Vec<many::Job>, Timing)> {
    let only_read = Options { max_tokens: 0, ..options.clone() };
    let go_on = &mut |_: Event<'_>| ControlFlow::Continue(());
    let read =
        generate(runner, std::slice::from_ref(request), &only_read, go_on).map_err(as_option)?;
    let job = |generated: &Generated, id| many::Job {
        request: Request {
            history: request.prompt.clone(),
            prompt: Vec::new(),
            id,
            state: Some(generated.state.clone()),
            logits: generated.logits.clone(),
        },
        options: options.clone(),
        prompt_tokens: request.prompt.len(),
    };
    let jobs = read.sequences.first().map(|own| (0..u64::from(samples)).map(|id| job(own, id)));
    Ok((jobs.into_iter().flatten().collect(), read.timing))
}

/// The state, and what its last token predicts, if the file has it.
fn read_state(
    path: &Path,
    runner: &dyn Runner,
    fingerprint: &Fingerprint,
) -> Result<(State, Option<Arc<[f32]>>)> {
    let check = |state: &State| runner.check_state(state).map_err(|error| error.to_string());
    let (state, logits) = load_continuation_checked(path, runner.config(), fingerprint, &check)?;
    if state.slots() != 1 {
        return Err(Usage::new(format!(
            "{} holds the states of {} sequences, generate continues one",
            path.display(),
            state.slots()
        ))
        .into());
    }
    let logits = logits.map(|logits| logits.to_vec::<f32>()).transpose()?;
    Ok((state, logits.map(Arc::from)))
}

/// The state that has read the last token too, and what that token predicts [1, V].
fn state_after(runner: &mut dyn Runner, generated: &Generated) -> Result<(State, Option<Tensor>)> {
    let (state, logits) = match generated.tokens.last() {
        None => (generated.state.clone(), generated.logits.as_ref().map(|logits| logits.to_vec())),
        Some(&last) => {
            let state = Some(generated.state.clone());
            let mut logits = Vec::new();
            let state = forward(runner, &[vec![last]], state, 1, |piece| {
                logits.extend_from_slice(piece.logits);
                Ok::<_, anyhow::Error>(())
            })?;
            (state, Some(logits))
        }
    };
    let logits = logits.map(|logits| Tensor::from_slice(&logits, [1, logits.len()])).transpose()?;
    Ok((state.to(Device::Cpu)?, logits))
}

/// Streams to standard output.
struct Writer {
    /// Text, or a list of ids.
    text: bool,
    first: bool,
    ends_line: bool,
    failed: Option<io::Error>,
}

impl Writer {
    fn new(text: bool) -> Self {
        Self { text, first: true, ends_line: false, failed: None }
    }

    fn write(&mut self, event: Event<'_>) -> ControlFlow<()> {
        let text = match (self.text, self.first) {
            (true, _) => event.text.to_owned(),
            (false, true) => event.token.to_string(),
            (false, false) => format!(",{}", event.token),
        };
        self.first = false;
        if text.is_empty() {
            return ControlFlow::Continue(());
        }
        self.ends_line = text.ends_with('\n');
        match self.print(&text) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                self.failed = Some(error);
                ControlFlow::Break(())
            }
        }
    }

    fn print(&self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }

    /// Ends the line where people or lists need it; a file gets the text as it is.
    fn finish(self) -> io::Result<()> {
        if self.failed.is_none() && !self.ends_line && (!self.text || io::stdout().is_terminal()) {
            self.print("\n")?;
        }
        self.failed.map_or(Ok(()), Err)
    }
}

/// An option error of the library under the option's name on the command line.
fn as_option(error: elapid_infer::Error) -> anyhow::Error {
    match error {
        elapid_infer::Error::Option { name, expected, found } => {
            Usage::new(format!("--{}: expected {expected}, found {found}", name.replace('_', "-")))
                .into()
        }
        other => other.into(),
    }
}

/// A seed short enough to be typed again.
fn arbitrary_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0u8) % 1_000_000
}
