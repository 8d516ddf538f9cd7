//! Requests that come, go and are cancelled at any time get what each gets alone, by a plain loop.

mod arrivals;

use std::ops::ControlFlow;
use std::sync::Arc;

use arrivals::{Case, alone, case, check, model, same};
use elapid_infer::{
    CpuEngine, Error, Limits, ModelRunner, Options, Request, Runner, Sampling, Scheduler, Update,
    generate,
};
use elapid_models::{LanguageModel, MambaConfig, State};
use elapid_ops::blocks::Encoding;
use elapid_tensor::cuda::Gpu;
use elapid_tensor::{DType, Device, Sequences, Tensor};
use proptest::prelude::*;

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
    let limits = Limits { slots: 1, prefill_tokens: 8, queue: 2, ..Limits::default() };
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
