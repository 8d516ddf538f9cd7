//! The decode engine of a GPU, on the host's emulation and on a card: against the model on the host, batches against
//! their sequences alone, and states as values.

mod arrivals;

use std::ops::ControlFlow;

use arrivals::gpus;
use elapid_infer::{
    Event, GpuEngine, Logits, ModelRunner, Options, Request, Runner, Sampling, generate,
};
use elapid_models::{LanguageModel, MambaConfig, NormKind, State};
use elapid_ops::decode_step::Encoding;
use elapid_tensor::cuda::Gpu;
use elapid_tensor::{DType, Device, Sequence, Sequences};

fn configs() -> [MambaConfig; 2] {
    let bytes = MambaConfig { vocab_size: 60, ..MambaConfig::bytes(32, 2) };
    let odd = MambaConfig {
        norm: NormKind::Layer,
        bias: true,
        tie_embeddings: false,
        d_model: 20,
        d_state: 8,
        d_conv: 3,
        ..bytes.clone()
    };
    [bytes, odd]
}

/// The engine as it gives logits, from which tokens are chosen on the host.
struct OnHost<'a, 'm>(&'a mut GpuEngine<'m>);

impl Runner for OnHost<'_, '_> {
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
        self.0.run(ids, sequences, state, wanted, receive)
    }
}

fn placed(gpu: &Gpu, config: &MambaConfig) -> LanguageModel {
    let mut model = LanguageModel::new(config, 7).unwrap();
    model.place(Device::Cuda(gpu.id()), DType::BF16).unwrap();
    model
}

/// One token for each slot that `ids` names: logits of each, and the state.
fn step(runner: &mut dyn Runner, ids: &[(usize, u32)], state: State) -> (Vec<Vec<f32>>, State) {
    let sequences = ids.iter().enumerate().map(|(start, &(slot, _))| Sequence {
        start,
        len: 1,
        slot,
        continued: true,
        position: state.positions[slot],
        id: slot as u64,
    });
    let sequences = Sequences::new(sequences.collect(), state.slots()).unwrap();
    let tokens: Vec<u32> = ids.iter().map(|&(_, id)| id).collect();
    let wanted: Vec<usize> = (0..ids.len()).collect();
    let width = runner.config().padded_vocab_size();
    let mut rows = Vec::new();
    let mut receive = |logits: Logits<'_>| {
        assert_eq!(logits.first, rows.len());
        rows.extend(logits.values.chunks(width).map(<[f32]>::to_vec));
        ControlFlow::Continue(())
    };
    let state = runner.run(&tokens, &sequences, Some(state), &wanted, &mut receive).unwrap();
    (rows, state)
}

/// Norm of the difference over the norm of what is wanted.
fn distance(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let difference = square(&mut got.iter().zip(want).map(|(g, w)| f64::from(g - w)));
    (difference / square(&mut want.iter().map(|&w| f64::from(w)))).sqrt()
}

#[test]
fn decode_steps_follow_the_model_on_the_host() {
    for gpu in gpus("the engine") {
        for config in configs() {
            for (encoding, tolerance) in [(Encoding::Bf16, 1.5e-2), (Encoding::Q8, 3e-2)] {
                let mut on_gpu = placed(&gpu, &config);
                let mut engine = GpuEngine::new(&mut on_gpu, encoding).unwrap();
                assert!(engine.check().unwrap() > config.vocab_size);
                let model = LanguageModel::new(&config, 7).unwrap();
                let mut host = ModelRunner::new(&model);
                let mut states = (engine.fresh_state(3).unwrap(), host.fresh_state(3).unwrap());
                for turn in 0..4u32 {
                    // The second slot sits out a turn.
                    let ids: Vec<(usize, u32)> = [2, 1, 0]
                        .into_iter()
                        .filter(|&s| turn != 2 || s != 1)
                        .map(|s| (s, 7 * turn + s as u32))
                        .collect();
                    let (got, want);
                    (got, states.0) = step(&mut engine, &ids, states.0);
                    (want, states.1) = step(&mut host, &ids, states.1);
                    for (got, want) in got.iter().zip(&want) {
                        let off = distance(got, want);
                        assert!(off < tolerance, "{encoding:?}, turn {turn}: {off:e}");
                    }
                    assert_eq!(states.0.positions, states.1.positions);
                }
            }
        }
    }
}

#[test]
fn a_state_that_is_kept_keeps_its_values() {
    for gpu in gpus("the engine") {
        let mut on_gpu = placed(&gpu, &configs()[0]);
        let mut engine = GpuEngine::new(&mut on_gpu, Encoding::Bf16).unwrap();
        let state = engine.fresh_state(2).unwrap();
        let ids = [(0, 5), (1, 9)];
        let (_, once) = step(&mut engine, &ids, state);
        let kept = once.clone();
        let (first, twice) = step(&mut engine, &ids, once);
        let (second, again) = step(&mut engine, &ids, kept.clone());
        assert_eq!(first, second);
        let (third, _) = step(&mut engine, &ids, kept);
        assert_eq!(first, third);
        let (next, _) = step(&mut engine, &ids, twice);
        let (next_again, _) = step(&mut engine, &ids, again);
        assert_eq!(next, next_again);
        assert_ne!(first, next);
    }
}

#[test]
fn a_batch_generates_what_its_sequences_do_alone() {
    for gpu in gpus("the engine") {
        for encoding in [Encoding::Bf16, Encoding::Q8] {
            let mut on_gpu = placed(&gpu, &configs()[0]);
            let mut engine = GpuEngine::new(&mut on_gpu, encoding).unwrap();
            let request =
                |prompt: &[u32], id| Request { prompt: prompt.to_vec(), id, ..Request::default() };
            let requests = [request(&[3, 1, 4], 1), request(&[1], 2), request(&[5; 9], 3)];
            for sampling in [Sampling::greedy(), Sampling { seed: 4, ..Sampling::default() }] {
                // A token that comes by chance lets sequences leave at different times.
                let end_of_sequence = vec![11, 23, 42];
                let options = Options {
                    sampling,
                    max_tokens: 10,
                    end_of_sequence,
                    chunk: 4,
                    ..Options::default()
                };
                let mut silent = |_: Event<'_>| ControlFlow::Continue(());
                let mut run = |requests: &[Request]| {
                    generate(&mut engine, requests, &options, &mut silent).unwrap().sequences
                };
                let together = run(&requests);
                for (request, together) in requests.iter().zip(&together) {
                    let alone = run(std::slice::from_ref(request)).remove(0);
                    assert_eq!(together.tokens, alone.tokens);
                    let values = |state: &State| -> Vec<f64> {
                        let tensors = state.layers.iter().flat_map(|layer| layer.iter());
                        tensors.flat_map(|(_, tensor)| tensor.to_f64_vec().unwrap()).collect()
                    };
                    assert_eq!(values(&together.state), values(&alone.state));
                }
            }
        }
    }
}

#[test]
fn tokens_chosen_on_the_card_are_those_of_the_sampler() {
    use elapid_infer::{Sampler, Start};
    let samplings = [
        Sampling::greedy(),
        Sampling { seed: 5, temperature: 0.8, ..Sampling::default() },
        Sampling { seed: 6, top_k: 7, ..Sampling::default() },
        Sampling { seed: 7, top_p: 0.7, ..Sampling::default() },
        Sampling { seed: 8, min_p: 0.3, temperature: 0.5, ..Sampling::default() },
        Sampling {
            seed: 9,
            top_k: 30,
            top_p: 0.8,
            min_p: 0.05,
            repetition_penalty: 1.5,
            repetition_window: 4,
            ..Sampling::default()
        },
    ];
    for gpu in gpus("the engine") {
        let config = &configs()[0];
        let mut on_gpu = placed(&gpu, config);
        let mut engine = GpuEngine::new(&mut on_gpu, Encoding::Bf16).unwrap();
        for sampling in &samplings {
            let mut sampler = Sampler::new(sampling, config.vocab_size).unwrap();
            // On the host: steps that give logits.
            let mut histories: Vec<Vec<u32>> = vec![vec![3, 9, 3], vec![40], vec![7, 7]];
            let mut state = engine.fresh_state(3).unwrap();
            let wanted = [6usize, 2, 5];
            for _ in 0..6 {
                let going = |s: &usize| histories[*s].len() < [3, 1, 2][*s] + wanted[*s];
                let slots: Vec<usize> = (0..3).filter(going).collect();
                let ids: Vec<(usize, u32)> =
                    slots.iter().map(|&s| (s, *histories[s].last().unwrap())).collect();
                let rows;
                (rows, state) = step(&mut engine, &ids, state);
                for (&slot, row) in slots.iter().zip(&rows) {
                    let position = state.positions[slot];
                    let token =
                        sampler.sample(row, &histories[slot], 70 + slot as u64, position).unwrap();
                    histories[slot].push(token);
                }
            }
            // On the card, two steps ahead of the host.
            let prompts: [&[u32]; 3] = [&[3, 9, 3], &[40], &[7, 7]];
            let starts: Vec<Start<'_>> = (0..3)
                .map(|s| Start { id: 70 + s as u64, history: prompts[s], max_tokens: wanted[s] })
                .collect();
            let fresh = engine.fresh_state(3).unwrap();
            let mut steps = engine.sample(fresh, &starts, sampling, &[]).unwrap();
            let mut tokens: Vec<Vec<u32>> = prompts.iter().map(|p| p.to_vec()).collect();
            while steps.running() {
                while steps.pending() < 2 {
                    steps.launch().unwrap();
                }
                for (sequence, sampled) in steps.take().unwrap() {
                    tokens[sequence].push(sampled.token);
                }
            }
            let after = steps.finish().unwrap();
            assert_eq!(tokens, histories, "{sampling:?}");
            assert_eq!(after.positions, state.positions);
            for (a, b) in after.layers.iter().zip(&state.layers) {
                for ((_, a), (_, b)) in a.iter().zip(b.iter()) {
                    assert_eq!(a.to_f64_vec().unwrap(), b.to_f64_vec().unwrap());
                }
            }
        }
    }
}

#[test]
fn one_sequence_gets_the_same_tokens_chosen_on_the_card() {
    for gpu in gpus("the engine") {
        let config = MambaConfig::bytes(32, 2);
        let mut on_gpu = placed(&gpu, &config);
        let mut engine = GpuEngine::new(&mut on_gpu, Encoding::Bf16).unwrap();
        let request = Request { prompt: vec![3, 1, 4], id: 5, ..Request::default() };
        let run = |engine: &mut GpuEngine<'_>, options: &Options, on_card: bool, most: usize| {
            let mut events = Vec::new();
            let mut on_event = |event: Event<'_>| {
                if event.sequence == 0 {
                    events.push((event.token, event.text.to_owned()));
                }
                if events.len() < most { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            };
            let requests = std::slice::from_ref(&request);
            let made = match on_card {
                true => generate(engine, requests, options, &mut on_event),
                false => generate(&mut OnHost(engine), requests, options, &mut on_event),
            };
            let made = made.unwrap();
            (made.sequences.into_iter().next().unwrap(), events)
        };
        let sampling = Sampling { seed: 4, ..Sampling::default() };
        let all = Options { sampling, max_tokens: 12, ..Options::default() };
        let (made, events) = run(&mut engine, &all, false, usize::MAX);
        // To its length, to a token that ends it, to a stop string.
        let ended = Options { end_of_sequence: vec![made.tokens[6]], ..all.clone() };
        let stop = events.iter().map(|(_, text)| text.as_str()).find(|text| !text.is_empty());
        let stopped =
            Options { stop: stop.map(str::to_owned).into_iter().collect(), ..all.clone() };
        for options in [&all, &ended, &stopped] {
            let (host, host_events) = run(&mut engine, options, false, usize::MAX);
            let (card, card_events) = run(&mut engine, options, true, usize::MAX);
            assert_eq!((card.tokens, card.finish), (host.tokens, host.finish));
            assert_eq!((card.text, card_events), (host.text, host_events));
            assert_eq!(card.state.positions, host.state.positions);
            for (a, b) in card.state.layers.iter().zip(&host.state.layers) {
                for ((_, a), (_, b)) in a.iter().zip(b.iter()) {
                    assert_eq!(a.to_f64_vec().unwrap(), b.to_f64_vec().unwrap());
                }
            }
        }
        // Interrupted: the state has read every token but the last.
        let (card, events) = run(&mut engine, &all, true, 3);
        assert_eq!(card.tokens, made.tokens[..card.tokens.len()]);
        assert!((3..12).contains(&card.tokens.len()), "{}", card.tokens.len());
        assert_eq!(events.len(), card.tokens.len());
        assert_eq!(card.state.positions[0] as usize, request.prompt.len() + events.len() - 1);
    }
}
