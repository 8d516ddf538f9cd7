//! Batches whose tokens the decode engine of a GPU chooses itself get what each sequence gets alone, by logits and the
//! host's sampler; on the emulation and on a card.

mod arrivals;

use std::sync::Arc;

use arrivals::{Case, Watched, alone, case, check_chosen, gpus, same};
use elapid_infer::{GpuEngine, Limits, Options, Request, Sampling, Scheduler, Update};
use elapid_models::{LanguageModel, MambaConfig};
use elapid_ops::decode_step;
use elapid_tensor::{DType, Device, Tensor};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;

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
    for gpu in gpus("the scheduler") {
        let mut model = LanguageModel::new(&MambaConfig::bytes(32, 2), 5).unwrap();
        model.place(Device::Cuda(gpu.id()), DType::BF16).unwrap();
        for (encoding, slots) in [(decode_step::Encoding::Bf16, 3), (decode_step::Encoding::Q8, 10)]
        {
            let mut counted = Watched::new(GpuEngine::new(&mut model, encoding).unwrap());
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
    for gpu in gpus("the scheduler") {
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
    for gpu in gpus("the scheduler") {
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
