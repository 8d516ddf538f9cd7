//! Prompts that are read in one call, of different lengths, new and continued, get what each gets alone, by every runner.

mod arrivals;

use std::collections::HashMap;

use arrivals::{Case, Watched, alone, check_chosen, gpus, same, take};
use elapid_infer::{
    CpuEngine, GpuEngine, Limits, ModelRunner, Options, Request, Runner, Sampling, Scheduler,
    Update,
};
use elapid_models::{LanguageModel, LayerState, MambaConfig, State};
use elapid_ops::blocks::Encoding;
use elapid_ops::decode_step;
use elapid_tensor::{DType, Device, Tensor};

/// Prompts of one token, of a few, of more than a chunk and of one token more; some come in the middle.
fn cases() -> Vec<Case> {
    let cases = [(3, 0), (161, 0), (1, 0), (190, 0), (7, 2), (2, 2), (1, 3)];
    let cases = cases.into_iter().enumerate().map(|(i, (length, arrival))| Case {
        seen: 0,
        prompt: (0..length).map(|t| (t * 37 + t / 11 + i as u32) % 256).collect(),
        max_tokens: [3, 2, 5, 1, 4, 0, 2][i],
        sampling: Sampling {
            temperature: if i % 2 == 0 { 0.0 } else { 0.8 },
            seed: 3,
            ..Sampling::default()
        },
        stop: false,
        chunk: 160,
        arrival,
        cancelled: None,
    });
    cases.collect()
}

/// Checks the cases, which are read in few calls: as they come, and for throughput.
fn check(runner: impl Runner, chosen_by_host: bool, limits: &[Limits]) {
    let mut watched = Watched::new(runner);
    for &limits in limits {
        watched.read.clear();
        check_chosen(&mut watched, &cases(), limits, |_, _| chosen_by_host);
        let together = watched.read.iter().filter(|lengths| lengths.len() > 1).count();
        assert!(watched.read[0].len() == 4 && together >= 2, "{:?}", watched.read);
    }
}

fn limits(runner: &dyn Runner) -> [Limits; 2] {
    let as_they_come = Limits { slots: 5, prefill_tokens: 400, ..Limits::default() };
    [Limits { together: 2, ..Limits::throughput(runner, 5) }, as_they_come]
}

#[test]
fn on_the_cpu_each_prompt_gives_what_it_gives_alone() {
    let mut model = LanguageModel::new(&MambaConfig::bytes(256, 1), 5).unwrap();
    let runner = ModelRunner::new(&model);
    let both = limits(&runner);
    check(runner, true, &both);
    for encoding in [Encoding::BF16, Encoding::Q8_0] {
        let engine = CpuEngine::from_model(&mut model, Some(encoding), 2).unwrap();
        check(engine, true, &both);
    }
}

#[test]
fn on_a_gpu_each_prompt_gives_what_it_gives_alone() {
    for gpu in gpus("prompts") {
        let mut model = LanguageModel::new(&MambaConfig::bytes(32, 1), 5).unwrap();
        model.place(Device::Cuda(gpu.id()), DType::BF16).unwrap();
        let encoding = decode_step::Encoding::Bf16;
        let engine = GpuEngine::new(&mut model, encoding).unwrap();
        let both = limits(&engine);
        check(engine, false, &both);
        // Steps of others round states, so that only prompts that are read first are what they are alone.
        let engine = GpuEngine::new(&mut model, encoding).unwrap().with_state(DType::BF16).unwrap();
        check(engine, false, &both[..1]);
        // The model itself: logits of all prompts, among them one whose last token is a call of its own where it is alone.
        let mut watched = Watched::new(ModelRunner::new(&model));
        let read_only = cases().into_iter().map(|case| Case { max_tokens: 1, ..case });
        check_chosen(&mut watched, &read_only.collect::<Vec<_>>(), both[0], |_, _| true);
        assert_eq!(watched.read[0], [3, 160, 1, 160]);
    }
}

/// A bad prompt between good ones of the same call fails; the others are as they are alone.
fn check_failing(runner: &mut dyn Runner, fresh: State) {
    let options = Options { max_tokens: 4, chunk: 8, ..Options::default() };
    let mut state = fresh;
    let layer = state.layers[0]
        .iter()
        .map(|(name, tensor)| (name.to_owned().into(), Tensor::filled(f32::NAN, tensor.shape())));
    state.layers[0] = LayerState::new(layer.collect::<Vec<_>>());
    let good =
        |length: u32, id| Request { prompt: (0..length).collect(), id, ..Request::default() };
    let requests =
        [good(11, 0), Request { state: Some(state), ..good(9, 1) }, good(1, 2), good(20, 3)];
    let limits = Limits::throughput(&*runner, 4);
    let mut scheduler = Scheduler::new(&mut *runner, limits).unwrap();
    for request in &requests {
        scheduler.submit(request.clone(), &options).unwrap();
    }
    // What is no token of the model is refused before it joins.
    assert!(scheduler.submit(good(300, 4), &options).is_err());
    let (mut got, mut failed) = (HashMap::new(), Vec::new());
    while !scheduler.is_idle() {
        let (bad, fine) = scheduler
            .step()
            .into_iter()
            .partition::<Vec<_>, _>(|update| matches!(update, Update::Failed { .. }));
        take(&mut got, fine);
        failed.extend(bad);
    }
    drop(scheduler);
    match failed.as_slice() {
        [Update::Failed { handle: 1, error }] => {
            assert!(error.to_string().contains("NaN"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    for (handle, got) in got {
        let found = got.end.unwrap();
        let mut expected = alone(runner, &requests[handle as usize], &options);
        expected.logits = expected.logits.filter(|_| found.logits.is_some());
        same(&found, &expected);
    }
}

#[test]
fn a_prompt_that_fails_leaves_those_read_with_it_alone() {
    let mut model = LanguageModel::new(&MambaConfig::bytes(32, 1), 5).unwrap();
    let fresh = model.fresh_state(1).unwrap();
    check_failing(&mut ModelRunner::new(&model), fresh.clone());
    for gpu in gpus("prompts") {
        model.place(Device::Cuda(gpu.id()), DType::BF16).unwrap();
        let mut engine = GpuEngine::new(&mut model, decode_step::Encoding::Bf16).unwrap();
        check_failing(&mut engine, fresh.clone());
        drop(engine);
    }
}
