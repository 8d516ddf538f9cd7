//! Requests that arrive while others run, what each gets alone by a plain loop, and the comparison of the two.

#![allow(dead_code, unused_imports, reason = "each test file uses its own part")]

use std::collections::HashMap;
use std::ops::ControlFlow;

use elapid_infer::{
    Finish, Generated, Handle, Limits, Options, Request, Runner, Sampler, Sampling, Scheduler,
    TextStream, Update,
};
use elapid_models::{LanguageModel, MambaConfig, State};
use elapid_tensor::cuda::Gpu;
use elapid_tensor::{Sequence, Sequences};
use proptest::prelude::*;

mod watched;

pub use watched::Watched;

/// The emulation and the card, as far as they are there; says of `what` that it skipped the others.
pub fn gpus(what: &str) -> Vec<Gpu> {
    [("emulation", Gpu::emulated()), ("card", Gpu::open(0))]
        .into_iter()
        .filter_map(|(place, gpu)| {
            gpu.inspect_err(|error| eprintln!("SKIPPED: {what} on the {place}: {error}")).ok()
        })
        .collect()
}

pub fn model() -> LanguageModel {
    LanguageModel::new(&MambaConfig::bytes(24, 2), 5).unwrap()
}

pub fn bits(state: &State) -> Vec<Vec<u32>> {
    let tensors = state.layers.iter().flat_map(|layer| layer.iter().map(|(_, tensor)| tensor));
    tensors.map(|t| t.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect()).collect()
}

/// Runs tokens of one sequence; the logits of the last one.
pub fn read(
    runner: &mut dyn Runner,
    tokens: &[u32],
    id: u64,
    state: Option<State>,
) -> (Vec<f32>, State) {
    let sequence = Sequence {
        start: 0,
        len: tokens.len(),
        slot: 0,
        continued: state.is_some(),
        position: state.as_ref().map_or(0, |state| state.positions[0]),
        id,
    };
    let sequences = Sequences::new(vec![sequence], 1).unwrap();
    let mut logits = Vec::new();
    let state = runner.run(tokens, &sequences, state, &[tokens.len() - 1], &mut |piece| {
        logits.extend_from_slice(piece.values);
        ControlFlow::Continue(())
    });
    (logits, state.unwrap())
}

/// The definition: a prompt read in chunks, then one token after the other.
pub fn alone(runner: &mut dyn Runner, request: &Request, options: &Options) -> Generated {
    let mut state = request.state.clone();
    let mut logits = request.logits.as_ref().map(|logits| logits.to_vec()).unwrap_or_default();
    for piece in request.prompt.chunks(options.chunk) {
        let after;
        (logits, after) = read(runner, piece, request.id, state.take());
        state = Some(after);
    }
    let mut sampler = Sampler::new(&options.sampling, runner.config().vocab_size).unwrap();
    let mut stream = TextStream::new(&options.stop).unwrap();
    let mut history = [request.history.as_slice(), request.prompt.as_slice()].concat();
    let mut state = state.unwrap();
    let (mut tokens, mut text) = (Vec::new(), String::new());
    let finish = loop {
        if tokens.len() == options.max_tokens {
            break Finish::Length;
        }
        if let Some(last) = tokens.last() {
            (logits, state) = read(runner, &[*last], request.id, Some(state));
        }
        let token = sampler.sample(&logits, &history, request.id, state.positions[0]).unwrap();
        history.push(token);
        tokens.push(token);
        if options.end_of_sequence.contains(&token) {
            break Finish::EndOfSequence;
        }
        let (shown, stopped) = stream.push(&[token as u8]);
        text += &shown;
        if stopped {
            break Finish::Stop;
        }
    };
    text += &stream.finish();
    Generated { tokens, text, finish, state, logits: Some(logits.into()) }
}

#[track_caller]
pub fn same(found: &Generated, expected: &Generated) {
    assert_eq!(found.tokens, expected.tokens);
    assert_eq!(found.text, expected.text);
    assert_eq!(found.finish, expected.finish);
    assert_eq!(found.state.positions, expected.state.positions);
    assert_eq!(bits(&found.state), bits(&expected.state));
    assert_eq!(found.logits, expected.logits);
}

/// What one request got: its updates in order, and its end.
#[derive(Default)]
pub struct Got {
    pub tokens: Vec<u32>,
    pub text: String,
    pub end: Option<Generated>,
}

pub fn take(got: &mut HashMap<Handle, Got>, updates: Vec<Update>) {
    for update in updates {
        match update {
            Update::Token { handle, token, text } => {
                let got = got.entry(handle).or_default();
                assert!(got.end.is_none());
                got.tokens.push(token);
                got.text += &text;
            }
            Update::Finished { handle, generated } => {
                let got = got.entry(handle).or_default();
                assert!(got.end.is_none());
                // An interrupted one may have text held back.
                assert!(generated.text.starts_with(&got.text));
                assert_eq!(generated.tokens, got.tokens);
                got.end = Some(generated);
            }
            Update::Failed { handle, error } => panic!("{handle}: {error}"),
        }
    }
}

#[derive(Debug, Clone)]
pub struct Case {
    /// Tokens seen before, which the penalty is for and nobody reads.
    pub seen: usize,
    pub prompt: Vec<u32>,
    pub max_tokens: usize,
    pub sampling: Sampling,
    pub stop: bool,
    pub chunk: usize,
    pub arrival: usize,
    pub cancelled: Option<usize>,
}

impl Case {
    pub fn request(&self, id: u64) -> Request {
        let history = (0..self.seen as u32).map(|token| token * 7 % 256).collect();
        Request { prompt: self.prompt.clone(), id, history, ..Request::default() }
    }

    /// True if the last of `tokens` new ones comes under a penalty for more tokens than a card keeps.
    pub fn is_for_the_host(&self, tokens: usize) -> bool {
        let Sampling { repetition_penalty, repetition_window: window, .. } = self.sampling;
        let penalised = repetition_penalty != 1.0 && (window == 0 || window > 4096);
        penalised && self.seen + self.prompt.len() + tokens - 1 > 4096
    }

    pub fn options(&self) -> Options {
        // By chance, one of these comes.
        let stop = ["e", "5", "\u{1}", "Q"].map(String::from).to_vec();
        Options {
            sampling: self.sampling.clone(),
            max_tokens: self.max_tokens,
            stop: if self.stop { stop } else { Vec::new() },
            end_of_sequence: if self.stop { vec![7, 77, 177] } else { Vec::new() },
            chunk: self.chunk,
            ..Options::default()
        }
    }
}

pub fn sampling() -> impl Strategy<Value = Sampling> {
    let temperature = prop_oneof![Just(0f32), Just(0.9)];
    let filters = (
        prop_oneof![Just(0usize), Just(9)],
        prop_oneof![Just(1f32), Just(0.7)],
        prop_oneof![Just(0f32), Just(0.2)],
    );
    let penalty =
        (prop_oneof![Just(1f32), Just(1.2)], prop_oneof![Just(64usize), Just(3), Just(0)]);
    (temperature, filters, penalty, 0u64..3).prop_map(|(temperature, filters, penalty, seed)| {
        Sampling {
            temperature,
            top_k: filters.0,
            top_p: filters.1,
            min_p: filters.2,
            repetition_penalty: penalty.0,
            repetition_window: penalty.1,
            seed,
        }
    })
}

pub fn case() -> impl Strategy<Value = Case> {
    let prompt = prop::collection::vec(0u32..256, 1..40);
    let limits = (0usize..20, sampling(), any::<bool>(), 1usize..20);
    let times = (0usize..25, prop::option::weighted(0.2, 0usize..15));
    (prompt, limits, times).prop_map(|(prompt, limits, times)| Case {
        seen: 0,
        prompt,
        max_tokens: limits.0,
        sampling: limits.1,
        stop: limits.2,
        chunk: limits.3,
        arrival: times.0,
        cancelled: times.1,
    })
}

/// Runs the cases as they arrive, and compares each with what it gets alone.
pub fn check(runner: &mut dyn Runner, cases: &[Case], limits: Limits) {
    check_chosen(runner, cases, limits, |_, _| true);
}

/// The same; logits come of the cases whose last token, counted from the first new one, is chosen from them.
pub fn check_chosen(
    runner: &mut dyn Runner,
    cases: &[Case],
    limits: Limits,
    has_logits: impl Fn(&Case, usize) -> bool,
) {
    let mut scheduler = Scheduler::new(&mut *runner, limits).unwrap();
    let mut handles = HashMap::new();
    let mut got = HashMap::new();
    for step in 0.. {
        for (index, case) in cases.iter().enumerate() {
            if case.arrival == step {
                let request = case.request(100 + index as u64);
                let handle = scheduler.submit(request, &case.options()).unwrap();
                handles.insert(index, handle);
            }
            if case.cancelled.is_some_and(|after| case.arrival + after == step) {
                scheduler.cancel(handles[&index]);
            }
        }
        take(&mut got, scheduler.step());
        assert!(scheduler.running() <= limits.slots);
        if scheduler.is_idle() && step > 45 {
            break;
        }
    }
    drop(scheduler);
    assert_eq!(got.len(), cases.len());
    for (index, case) in cases.iter().enumerate() {
        let mut expected = alone(runner, &case.request(100 + index as u64), &case.options());
        // The first token comes out of the prompt.
        if expected.tokens.len() > 1 && !has_logits(case, expected.tokens.len()) {
            expected.logits = None;
        }
        let found = got[&handles[&index]].end.as_ref().unwrap();
        if found.finish == Finish::Interrupted {
            assert!(case.cancelled.is_some());
            assert!(expected.tokens.starts_with(&found.tokens));
            let read = case.prompt.len() + found.tokens.len();
            assert!(found.state.positions[0] <= read as u64);
        } else {
            same(found, &expected);
        }
    }
}
