//! Requests that come, go and are cancelled at any time get what each gets alone, by a plain loop.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use elapid_infer::{
    CpuEngine, Error, Finish, Generated, GpuEngine, Handle, Limits, ModelRunner, NextTokens,
    Options, Request, Runner, Sampler, Sampling, Scheduler, TextStream, Update, generate,
};
use elapid_models::{LanguageModel, MambaConfig, State};
use elapid_ops::blocks::Encoding;
use elapid_ops::decode_step;
use elapid_tensor::cuda::Gpu;
use elapid_tensor::{DType, Device, Sequence, Sequences, Tensor};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;

fn model() -> LanguageModel {
    LanguageModel::new(&MambaConfig::bytes(24, 2), 5).unwrap()
}

fn bits(state: &State) -> Vec<Vec<u32>> {
    let tensors = state.layers.iter().flat_map(|layer| layer.iter().map(|(_, tensor)| tensor));
    tensors.map(|t| t.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect()).collect()
}

/// Runs tokens of one sequence; the logits of the last one.
fn read(
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
fn alone(runner: &mut dyn Runner, request: &Request, options: &Options) -> Generated {
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
fn same(found: &Generated, expected: &Generated) {
    assert_eq!(found.tokens, expected.tokens);
    assert_eq!(found.text, expected.text);
    assert_eq!(found.finish, expected.finish);
    assert_eq!(found.state.positions, expected.state.positions);
    assert_eq!(bits(&found.state), bits(&expected.state));
    assert_eq!(found.logits, expected.logits);
}

/// What one request got: its updates in order, and its end.
#[derive(Default)]
struct Got {
    tokens: Vec<u32>,
    text: String,
    end: Option<Generated>,
}

fn take(got: &mut HashMap<Handle, Got>, updates: Vec<Update>) {
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
struct Case {
    /// Tokens seen before, which the penalty is for and nobody reads.
    seen: usize,
    prompt: Vec<u32>,
    max_tokens: usize,
    sampling: Sampling,
    stop: bool,
    chunk: usize,
    arrival: usize,
    cancelled: Option<usize>,
}

impl Case {
    fn request(&self, id: u64) -> Request {
        let history = (0..self.seen as u32).map(|token| token * 7 % 256).collect();
        Request { prompt: self.prompt.clone(), id, history, ..Request::default() }
    }

    /// True if the last of `tokens` new ones comes under a penalty for more tokens than a card keeps.
    fn is_for_the_host(&self, tokens: usize) -> bool {
        let Sampling { repetition_penalty, repetition_window: window, .. } = self.sampling;
        let penalised = repetition_penalty != 1.0 && (window == 0 || window > 4096);
        penalised && self.seen + self.prompt.len() + tokens - 1 > 4096
    }

    fn options(&self) -> Options {
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

fn sampling() -> impl Strategy<Value = Sampling> {
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

fn case() -> impl Strategy<Value = Case> {
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
fn check(runner: &mut dyn Runner, cases: &[Case], limits: Limits) {
    check_chosen(runner, cases, limits, |_, _| true);
}

/// The same; logits come of the cases whose last token, counted from the first new one, is chosen from them.
fn check_chosen(
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn each_gets_what_it_gets_alone(
        cases in prop::collection::vec(case(), 1..10),
        slots in 1usize..5,
        prefill_tokens in 1usize..40,
    ) {
        let model = model();
        let limits = Limits { slots, prefill_tokens, ..Limits::default() };
        check(&mut ModelRunner::new(&model), &cases, limits);
    }
}

/// Some cases of every kind.
fn examples() -> Vec<Case> {
    (0..7u32)
        .map(|i| Case {
            seen: 0,
            prompt: (0..3 + i * 5).map(|t| (t * 37 + i) % 256).collect(),
            max_tokens: [6, 9, 0, 5, 12, 7, 3][i as usize],
            sampling: Sampling {
                temperature: if i % 2 == 0 { 0.0 } else { 0.8 },
                repetition_penalty: if i == 4 { 1.2 } else { 1.0 },
                seed: 3,
                ..Sampling::default()
            },
            stop: i == 4,
            chunk: 8,
            arrival: i as usize / 2,
            cancelled: (i == 5).then_some(2),
        })
        .collect()
}

/// Greedy and seeded sequences together and alone, bit for bit, whatever the weights are.
#[test]
fn on_the_decode_engine_of_the_cpu() {
    let mut model = LanguageModel::new(&MambaConfig::bytes(256, 2), 5).unwrap();
    for encoding in [Encoding::F32, Encoding::BF16, Encoding::Q8_0, Encoding::Q4_K] {
        let mut engine = CpuEngine::from_model(&mut model, Some(encoding), 2).unwrap();
        assert_eq!(engine.encoding(), encoding);
        for (slots, prefill_tokens) in [(3, 16), (7, 512)] {
            let limits = Limits { slots, prefill_tokens, ..Limits::default() };
            check(&mut engine, &examples(), limits);
        }
    }
}

#[test]
fn on_the_emulated_gpu_too() {
    let gpu = match Gpu::emulated() {
        Ok(gpu) => gpu,
        Err(error) => return eprintln!("SKIPPED: the scheduler on the emulation: {error}"),
    };
    let mut model = LanguageModel::new(&MambaConfig::bytes(16, 1), 5).unwrap();
    model.place(Device::Cuda(gpu.id()), DType::F32).unwrap();
    let limits = Limits { slots: 3, prefill_tokens: 16, ..Limits::default() };
    check(&mut ModelRunner::new(&model), &examples(), limits);
}

fn gpus() -> Vec<Gpu> {
    [("emulation", Gpu::emulated()), ("card", Gpu::open(0))]
        .into_iter()
        .filter_map(|(what, gpu)| {
            gpu.inspect_err(|error| eprintln!("SKIPPED: the scheduler on the {what}: {error}")).ok()
        })
        .collect()
}

/// A runner that counts who chooses.
struct Counted<R> {
    runner: R,
    by_host: usize,
    by_runner: usize,
}

impl<R> Counted<R> {
    fn new(runner: R) -> Self {
        Self { runner, by_host: 0, by_runner: 0 }
    }
}

struct CountedTokens<'a> {
    next: &'a mut dyn NextTokens,
    by_host: usize,
    by_runner: usize,
}

impl NextTokens for CountedTokens<'_> {
    fn rule(&self, slot: usize) -> (&Sampling, &[u32]) {
        self.next.rule(slot)
    }

    fn choose(&mut self, slot: usize, logits: &[f32]) {
        self.by_host += 1;
        self.next.choose(slot, logits);
    }

    fn take(&mut self, slot: usize, token: elapid_infer::Result<u32>) {
        self.by_runner += 1;
        self.next.take(slot, token);
    }
}

impl<R: Runner> Runner for Counted<R> {
    fn config(&self) -> &MambaConfig {
        self.runner.config()
    }

    fn fresh_state(&self, slots: usize) -> elapid_infer::Result<State> {
        self.runner.fresh_state(slots)
    }

    fn check_state(&self, state: &State) -> elapid_infer::Result<()> {
        self.runner.check_state(state)
    }

    fn run(
        &mut self,
        ids: &[u32],
        sequences: &Sequences,
        state: Option<State>,
        wanted: &[usize],
        receive: &mut elapid_infer::Receiver<'_>,
    ) -> elapid_infer::Result<State> {
        self.runner.run(ids, sequences, state, wanted, receive)
    }

    fn decode(
        &mut self,
        ids: &[u32],
        sequences: &Sequences,
        state: Option<State>,
        next: &mut dyn NextTokens,
    ) -> elapid_infer::Result<State> {
        let mut counted = CountedTokens { next, by_host: 0, by_runner: 0 };
        let after = self.runner.decode(ids, sequences, state, &mut counted);
        self.by_host += counted.by_host;
        self.by_runner += counted.by_runner;
        after
    }
}

/// Cases of every option. Before the last three more tokens were seen than a card keeps, or nearly so: the penalty is for
/// fewer, for all, and for all, of which there are too many from the fourth new token on.
fn options_of_every_kind() -> Vec<Case> {
    let base = Sampling { seed: 8, temperature: 0.9, ..Sampling::default() };
    let penalty =
        |repetition_window| Sampling { repetition_penalty: 1.4, repetition_window, ..base.clone() };
    let samplings = [
        (0, Sampling::greedy()),
        (0, base.clone()),
        (0, Sampling { top_k: 5, temperature: 0.7, ..base.clone() }),
        (0, Sampling { top_p: 0.6, ..base.clone() }),
        (0, Sampling { min_p: 0.3, seed: 9, ..base.clone() }),
        (0, Sampling { top_k: 40, top_p: 0.8, min_p: 0.1, ..penalty(4) }),
        (0, Sampling { temperature: 0.0, ..penalty(0) }),
        (5000, penalty(64)),
        (5000, penalty(0)),
        (4090, penalty(5000)),
    ];
    let cases = samplings.into_iter().enumerate().map(|(i, (seen, sampling))| Case {
        seen,
        prompt: (0..4 + i as u32 % 3).map(|t| (t * 37 + i as u32) % 256).collect(),
        max_tokens: [4, 5, 7][i % 3],
        sampling,
        stop: i == 3,
        // Prompts in pieces of one token are steps too.
        chunk: if i == 1 { 1 } else { 8 },
        arrival: [0, 0, 1, 1, 3][i % 5],
        cancelled: (i == 2).then_some(4),
    });
    cases.collect()
}

#[test]
fn on_the_decode_engine_of_a_gpu_tokens_are_chosen_there() {
    for gpu in gpus() {
        let mut model = LanguageModel::new(&MambaConfig::bytes(32, 2), 5).unwrap();
        model.place(Device::Cuda(gpu.id()), DType::BF16).unwrap();
        for (encoding, slots) in [(decode_step::Encoding::Bf16, 3), (decode_step::Encoding::Q8, 10)]
        {
            let mut counted = Counted::new(GpuEngine::new(&mut model, encoding).unwrap());
            let limits = Limits { slots, prefill_tokens: 16, ..Limits::default() };
            // Alone, logits are asked for, and not counted.
            check_chosen(&mut counted, &options_of_every_kind(), limits, Case::is_for_the_host);
            assert!(counted.by_runner > 20, "{}", counted.by_runner);
            // All but the first token of the last case but one, and the last one of the last.
            assert_eq!(counted.by_host, 6 + 1);
        }
    }
}

#[test]
fn on_a_gpu_each_gets_what_it_gets_alone() {
    for gpu in gpus() {
        let mut model = LanguageModel::new(&MambaConfig::bytes(32, 1), 5).unwrap();
        model.place(Device::Cuda(gpu.id()), DType::BF16).unwrap();
        let mut engine = GpuEngine::new(&mut model, decode_step::Encoding::Bf16).unwrap();
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let any = (prop::collection::vec(case(), 2..6), 1usize..5, 1usize..40);
        for _ in 0..3 {
            let (cases, slots, prefill_tokens) = any.new_tree(&mut runner).unwrap().current();
            let limits = Limits { slots, prefill_tokens, ..Limits::default() };
            check_chosen(&mut engine, &cases, limits, |_, _| false);
        }
    }
}

#[test]
fn on_a_gpu_a_sequence_that_fails_leaves_the_others_alone() {
    for gpu in gpus() {
        let mut model = LanguageModel::new(&MambaConfig::bytes(32, 1), 5).unwrap();
        model.place(Device::Cuda(gpu.id()), DType::BF16).unwrap();
        let mut engine = GpuEngine::new(&mut model, decode_step::Encoding::Bf16).unwrap();
        let options = Options { max_tokens: 5, ..Options::default() };
        // A NaN in one sequence's state, whose first token is chosen from given logits.
        let mut state =
            LanguageModel::new(&MambaConfig::bytes(32, 1), 5).unwrap().fresh_state(1).unwrap();
        let layer = state.layers[0].iter().map(|(name, tensor)| {
            (name.to_owned().into(), Tensor::filled(f32::NAN, tensor.shape()))
        });
        state.layers[0] = elapid_models::LayerState::new(layer.collect::<Vec<_>>());
        let logits = Some(Arc::from([0.0f32; 256]));
        let bad = Request { state: Some(state), logits, ..Request::default() };
        let good = Request { prompt: vec![97, 98, 99], id: 4, ..Request::default() };
        let mut expected = alone(&mut engine, &good, &options);
        expected.logits = None;
        let mut errors = Vec::new();
        for slots in [2, 1] {
            let limits = Limits { slots, ..Limits::default() };
            let mut scheduler = Scheduler::new(&mut engine, limits).unwrap();
            // With one slot, the second good one comes to where the bad one was.
            for request in [&good, &bad, &good] {
                scheduler.submit(request.clone(), &options).unwrap();
            }
            let mut finished = Vec::new();
            while !scheduler.is_idle() {
                for update in scheduler.step() {
                    match update {
                        Update::Failed { handle, error } => {
                            assert_eq!(handle, 1);
                            errors.push(error.to_string());
                        }
                        Update::Finished { handle, generated } => {
                            assert_ne!(handle, 1);
                            finished.push(generated);
                        }
                        Update::Token { .. } => {}
                    }
                }
            }
            assert_eq!(finished.len(), 2);
            finished.iter().for_each(|finished| same(finished, &expected));
        }
        let nan = "the logit of token 0 at position 1 is NaN";
        assert!(errors.len() == 2 && errors.iter().all(|e| e.starts_with(nan)), "{errors:?}");
    }
}

#[test]
fn long_prompts_do_not_keep_running_sequences_waiting() {
    let model = model();
    let limits = Limits { slots: 3, prefill_tokens: 8, ..Limits::default() };
    let mut scheduler = Scheduler::new(ModelRunner::new(&model), limits).unwrap();
    let options = Options { max_tokens: 40, chunk: 8, ..Options::default() };
    let prompt = |len: usize| Request { prompt: vec![65; len], ..Request::default() };
    scheduler.submit(prompt(1), &options).unwrap();
    scheduler.step();
    let long = scheduler.submit(prompt(80), &options).unwrap();
    let short = scheduler.submit(prompt(2), &options).unwrap();
    let (mut first_long, mut first_short) = (None, None);
    for step in 1..25 {
        let updates = scheduler.step();
        let count = |wanted| {
            let of = |update: &&Update| matches!(update, Update::Token { handle, .. } if *handle == wanted);
            updates.iter().filter(of).count()
        };
        assert_eq!(count(0), 1, "step {step}");
        first_long = first_long.or((count(long) > 0).then_some(step));
        first_short = first_short.or((count(short) > 0).then_some(step));
    }
    // Ten pieces of 8, between which the short prompt had its turn.
    assert_eq!((first_short, first_long), (Some(2), Some(11)));
    assert_eq!(scheduler.timing().prefill_tokens, 83);
}

#[test]
fn a_prompt_that_was_read_once_is_forked() {
    let model = model();
    let mut runner = ModelRunner::new(&model);
    let prompt: Vec<u32> = b"Once upon a time".map(u32::from).to_vec();
    let sampling = Sampling { seed: 4, repetition_penalty: 1.1, ..Sampling::default() };
    let options = Options { sampling, max_tokens: 15, ..Options::default() };
    let whole: Vec<Request> =
        (0..4).map(|id| Request { prompt: prompt.clone(), id, ..Request::default() }).collect();
    let read = alone(&mut runner, &whole[0], &Options { max_tokens: 0, ..options.clone() });
    let forks: Vec<Request> = (0..4)
        .map(|id| Request {
            id,
            state: Some(read.state.clone()),
            history: prompt.clone(),
            logits: read.logits.clone(),
            ..Request::default()
        })
        .collect();
    let silent = &mut |_: elapid_infer::Event<'_>| ControlFlow::Continue(());
    let forked = generate(&mut runner, &forks, &options, silent).unwrap().sequences;
    for (request, forked) in whole.iter().zip(&forked) {
        same(forked, &alone(&mut runner, request, &options));
    }
    assert_ne!(forked[0].tokens, forked[1].tokens);
    // The fork's own state was a value.
    assert_eq!(read.state.positions, [16]);

    // The last token of a sequence is sampled anew from its state and logits.
    let ten = Options { max_tokens: 10, ..options.clone() };
    let first = alone(&mut runner, &whole[2], &ten);
    let rest = Request {
        id: 2,
        history: [&prompt[..], &first.tokens[..9]].concat(),
        state: Some(first.state),
        logits: first.logits,
        ..Request::default()
    };
    let rest = generate(&mut runner, &[rest], &Options { max_tokens: 6, ..options }, silent);
    let all = [&first.tokens[..9], &rest.unwrap().sequences[0].tokens].concat();
    assert_eq!(all, forked[2].tokens);
}

#[test]
fn a_full_queue_and_wrong_requests_are_refused() {
    let model = model();
    let limits = Limits { slots: 1, prefill_tokens: 8, queue: 2 };
    let mut scheduler = Scheduler::new(ModelRunner::new(&model), limits).unwrap();
    let options = Options { max_tokens: 2, ..Options::default() };
    let request = |prompt: &[u32]| Request { prompt: prompt.to_vec(), ..Request::default() };
    assert_eq!(scheduler.submit(request(&[1]), &options).unwrap(), 0);
    assert_eq!(scheduler.submit(request(&[2]), &options).unwrap(), 1);
    let error = scheduler.submit(request(&[3]), &options).unwrap_err();
    assert!(matches!(error, Error::QueueFull { limit: 2 }), "{error}");
    assert_eq!((scheduler.waiting(), scheduler.running()), (2, 0));
    scheduler.step();
    assert_eq!(scheduler.waiting(), 1);
    // The first has ended in that step; its slot goes to the second.
    scheduler.step();
    assert!(!scheduler.cancel(0));
    assert!(!scheduler.cancel(99));

    let mut fails = |request: Request, options: &Options| {
        scheduler.submit(request, options).unwrap_err().to_string()
    };
    assert!(fails(request(&[]), &options).contains("empty"));
    assert!(fails(request(&[256]), &options).contains("token 256"));
    let bad = Options { chunk: 0, ..options.clone() };
    assert!(fails(request(&[1]), &bad).starts_with("chunk"));
    let bad = Sampling { top_p: 2.0, ..Sampling::default() };
    let bad = Options { sampling: bad, ..options.clone() };
    assert!(fails(request(&[1]), &bad).starts_with("top_p"));
    let state = Some(model.fresh_state(1).unwrap());
    let no_logits = Request { state: state.clone(), ..Request::default() };
    assert!(fails(no_logits, &options).contains("empty"));
    let few = Some(Arc::from([0.0f32; 3]));
    let few = Request { state, logits: few, ..Request::default() };
    assert!(fails(few, &options).starts_with("logits"));
    let limits = Limits { slots: 0, ..limits };
    let error = Scheduler::new(ModelRunner::new(&model), limits).err().unwrap();
    assert!(error.to_string().starts_with("slots"));
}

#[test]
fn a_sequence_that_fails_leaves_the_others_alone() {
    let model = model();
    let limits = Limits { slots: 2, ..Limits::default() };
    let mut scheduler = Scheduler::new(ModelRunner::new(&model), limits).unwrap();
    let options = Options { max_tokens: 5, ..Options::default() };
    // A NaN in one sequence's state.
    let mut state = model.fresh_state(1).unwrap();
    let layer = state.layers[0]
        .iter()
        .map(|(name, tensor)| (name.to_owned().into(), Tensor::filled(f32::NAN, tensor.shape())));
    state.layers[0] = elapid_models::LayerState::new(layer.collect::<Vec<_>>());
    let prompt: Vec<u32> = b"abc".map(u32::from).to_vec();
    let good = Request { prompt: prompt.clone(), ..Request::default() };
    let bad = Request { state: Some(state), ..good.clone() };
    scheduler.submit(bad, &options).unwrap();
    scheduler.submit(good.clone(), &options).unwrap();
    let mut failed = 0;
    let mut finished = None;
    while !scheduler.is_idle() {
        for update in scheduler.step() {
            match update {
                Update::Failed { handle, error } => {
                    assert_eq!(handle, 0);
                    assert!(error.to_string().contains("NaN"), "{error}");
                    failed += 1;
                }
                Update::Finished { handle, generated } => {
                    assert_eq!(handle, 1);
                    finished = Some(generated);
                }
                Update::Token { handle, .. } => assert_eq!(handle, 1),
            }
        }
    }
    assert_eq!(failed, 1);
    same(&finished.unwrap(), &alone(&mut ModelRunner::new(&model), &good, &options));
}

/// Fails on its third call.
struct Flaky<'a>(ModelRunner<'a>, usize);

impl Runner for Flaky<'_> {
    fn config(&self) -> &MambaConfig {
        self.0.config()
    }

    fn fresh_state(&self, slots: usize) -> elapid_infer::Result<State> {
        self.0.fresh_state(slots)
    }

    fn check_state(&self, state: &State) -> elapid_infer::Result<()> {
        self.0.check_state(state)
    }

    fn run(
        &mut self,
        ids: &[u32],
        sequences: &Sequences,
        state: Option<State>,
        wanted: &[usize],
        receive: &mut elapid_infer::Receiver<'_>,
    ) -> elapid_infer::Result<State> {
        self.1 += 1;
        if self.1 == 3 {
            let found = "a broken machine".to_owned();
            return Err(Error::Option { name: "machine", expected: "a whole one", found });
        }
        self.0.run(ids, sequences, state, wanted, receive)
    }
}

#[test]
fn a_failing_runner_fails_what_ran_and_goes_on_with_the_rest() {
    let model = model();
    let limits = Limits { slots: 1, ..Limits::default() };
    let mut scheduler = Scheduler::new(Flaky(ModelRunner::new(&model), 0), limits).unwrap();
    let options = Options { max_tokens: 4, ..Options::default() };
    let request = Request { prompt: vec![65, 66], ..Request::default() };
    scheduler.submit(request.clone(), &options).unwrap();
    scheduler.submit(request.clone(), &options).unwrap();
    let mut ends = Vec::new();
    while !scheduler.is_idle() {
        for update in scheduler.step() {
            match update {
                Update::Failed { handle, error } => {
                    assert!(error.to_string().contains("broken machine"));
                    ends.push((handle, None));
                }
                Update::Finished { handle, generated } => ends.push((handle, Some(generated))),
                Update::Token { .. } => {}
            }
        }
    }
    assert!(matches!(ends.as_slice(), [(0, None), (1, Some(_))]), "{ends:?}");
    let expected = alone(&mut ModelRunner::new(&model), &request, &options);
    same(ends[1].1.as_ref().unwrap(), &expected);
}
