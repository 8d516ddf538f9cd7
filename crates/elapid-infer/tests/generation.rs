//! Generation as a whole on small random models: batches, chunks, states, stops and wrong calls.

use std::ops::ControlFlow;

use elapid_infer::{
    Event, Finish, Generated, ModelRunner, Options, Request, Sampling, forward, generate,
};
use elapid_models::{LanguageModel, MambaConfig, State};
use elapid_tensor::Tensor;
use proptest::prelude::*;

fn bytes_model() -> LanguageModel {
    LanguageModel::new(&MambaConfig::bytes(24, 3), 5).unwrap()
}

fn silent(_: Event<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn request(prompt: &str, id: u64) -> Request {
    Request { prompt: prompt.bytes().map(u32::from).collect(), id, ..Request::default() }
}

fn all(model: &LanguageModel, requests: &[Request], options: &Options) -> Vec<Generated> {
    generate(&mut ModelRunner::new(model), requests, options, &mut silent).unwrap().sequences
}

fn bits(state: &State) -> Vec<Vec<u32>> {
    state
        .layers
        .iter()
        .flat_map(|layer| layer.iter().map(|(_, tensor)| tensor))
        .map(|tensor| tensor.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect())
        .collect()
}

/// Logits of all tokens, [T, V].
fn logits(model: &LanguageModel, sequences: &[Vec<u32>], chunk: usize) -> (Vec<f32>, State) {
    let mut rows = Vec::new();
    let state = forward(&mut ModelRunner::new(model), sequences, None, chunk, |piece| {
        assert_eq!(piece.row * 256, rows.len());
        rows.extend_from_slice(piece.logits);
        Ok::<_, Box<dyn std::error::Error>>(())
    });
    (rows, state.unwrap())
}

fn prompts() -> Vec<Request> {
    vec![
        request("a", 11),
        request("The quick brown fox jumps over the lazy dog", 12),
        request("\n\n\n", 13),
        request("xyz xyz xyz xyz xyz", 14),
    ]
}

#[test]
fn a_batch_gives_each_sequence_what_it_gets_alone() {
    let model = bytes_model();
    let samplings = [
        Sampling::greedy(),
        Sampling { seed: 9, ..Sampling::default() },
        Sampling { seed: 9, top_k: 40, top_p: 0.9, repetition_penalty: 1.3, ..Sampling::default() },
    ];
    for sampling in samplings {
        // A stop that comes by chance lets sequences leave the batch at different times.
        let stop = vec!["e".into(), "5".into(), "\u{1}".into()];
        let options = Options { sampling, max_tokens: 40, stop, chunk: 16, ..Options::default() };
        let together = all(&model, &prompts(), &options);
        for (request, together) in prompts().iter().zip(&together) {
            let alone = all(&model, std::slice::from_ref(request), &options).remove(0);
            assert_eq!(together.tokens, alone.tokens);
            assert_eq!(together.text, alone.text);
            assert_eq!(together.finish, alone.finish);
            assert_eq!(together.state.positions, alone.state.positions);
            assert_eq!(bits(&together.state), bits(&alone.state));
        }
    }
}

#[test]
fn seeds_and_ids_make_a_difference() {
    let model = bytes_model();
    let sample = |seed, id| {
        let sampling = Sampling { seed, ..Sampling::default() };
        let options = Options { sampling, max_tokens: 20, ..Options::default() };
        all(&model, &[request("same", id)], &options).remove(0).tokens
    };
    assert_eq!(sample(1, 1), sample(1, 1));
    assert_ne!(sample(1, 1), sample(2, 1));
    assert_ne!(sample(1, 1), sample(1, 2));
}

#[test]
fn going_on_from_a_state_is_one_run() {
    let model = bytes_model();
    let sampling = Sampling { seed: 3, ..Sampling::default() };
    let options =
        |max_tokens| Options { sampling: sampling.clone(), max_tokens, ..Options::default() };
    let whole = all(&model, &[request("Once upon", 7)], &options(24)).remove(0);
    let first = all(&model, &[request("Once upon", 7)], &options(10)).remove(0);
    let next = Request {
        prompt: vec![*first.tokens.last().unwrap()],
        id: 7,
        state: Some(first.state.clone()),
        ..Request::default()
    };
    let second = all(&model, std::slice::from_ref(&next), &options(14)).remove(0);
    assert_eq!(whole.tokens, [first.tokens, second.tokens].concat());
    assert_eq!(bits(&whole.state), bits(&second.state));
    assert_eq!(second.state.positions, [9 + 23]);
    // The given state was a value: it is still what it was.
    assert_eq!(next.state.unwrap().positions, [9 + 9]);
}

#[test]
fn max_tokens_zero_only_reads() {
    let model = bytes_model();
    let options = Options { max_tokens: 0, ..Options::default() };
    let read = all(&model, &[request("hello", 0)], &options).remove(0);
    assert!(read.tokens.is_empty() && read.text.is_empty());
    assert_eq!((read.finish, read.state.positions[0]), (Finish::Length, 5));
    let (_, state) = logits(&model, &[b"hello".map(u32::from).to_vec()], 2048);
    assert_eq!(bits(&read.state), bits(&state));
}

#[test]
fn text_comes_in_events_and_stops_before_the_stop_string() {
    let model = bytes_model();
    let sampling = Sampling { seed: 2, ..Sampling::default() };
    let free = Options { sampling, max_tokens: 60, ..Options::default() };
    let reference = all(&model, &[request("go", 0)], &free).remove(0);
    assert_eq!(reference.finish, Finish::Length);
    let bytes: Vec<u8> = reference.tokens.iter().map(|&token| token as u8).collect();
    assert_eq!(reference.text, String::from_utf8_lossy(&bytes));

    // Two neighbouring ASCII bytes of that text make a stop string.
    let at = (10..58).find(|&i| bytes[i].is_ascii() && bytes[i + 1].is_ascii()).unwrap();
    let stop = String::from_utf8(bytes[at..at + 2].to_vec()).unwrap();
    let options = Options { stop: vec![stop.clone()], ..free };
    let mut shown = String::new();
    let mut tokens = Vec::new();
    let stopped =
        generate(&mut ModelRunner::new(&model), &[request("go", 0)], &options, &mut |event| {
            shown += event.text;
            tokens.push(event.token);
            ControlFlow::Continue(())
        });
    let stopped = stopped.unwrap().sequences.remove(0);
    assert_eq!(stopped.finish, Finish::Stop);
    assert_eq!(stopped.text, shown);
    assert_eq!(stopped.tokens, tokens);
    assert!(!shown.contains(&stop));
    let end = bytes.windows(2).position(|pair| pair == stop.as_bytes()).unwrap();
    assert_eq!(shown, String::from_utf8_lossy(&bytes[..end]));
    assert_eq!(stopped.tokens.len(), end + 2);
}

#[test]
fn the_receiver_may_interrupt_and_a_token_may_end() {
    let model = bytes_model();
    let options = Options { max_tokens: 50, ..Options::default() };
    let mut count = 0;
    let generation = generate(&mut ModelRunner::new(&model), &prompts(), &options, &mut |_| {
        count += 1;
        if count == 10 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let sequences = generation.unwrap().sequences;
    assert!(sequences.iter().all(|s| s.finish == Finish::Interrupted && s.tokens.len() == 3));

    let last = sequences[0].tokens[2];
    let options = Options { end_of_sequence: vec![last], ..options };
    let ended = all(&model, &prompts()[..1], &options).remove(0);
    assert_eq!(ended.finish, Finish::EndOfSequence);
    assert_eq!(ended.tokens.last(), Some(&last));
    assert!(ended.tokens.len() <= 3);
}

#[test]
fn padding_rows_are_never_sampled() {
    let config = MambaConfig { vocab_size: 5, ..MambaConfig::bytes(16, 1) };
    assert_eq!(config.padded_vocab_size(), 8);
    let model = LanguageModel::new(&config, 1).unwrap();
    let sampling = Sampling { temperature: 50.0, ..Sampling::default() };
    let options = Options { sampling, max_tokens: 300, ..Options::default() };
    let request = Request { prompt: vec![0, 4], ..Request::default() };
    let generated = all(&model, &[request], &options).remove(0);
    assert!(generated.tokens.iter().all(|&token| token < 5));
    assert!((0..5).all(|token| generated.tokens.contains(&token)));
    assert_eq!(generated.text, "");
}

#[test]
fn wrong_calls_are_errors() {
    let model = bytes_model();
    let fails = |requests: &[Request], options: &Options| {
        generate(&mut ModelRunner::new(&model), requests, options, &mut silent)
            .unwrap_err()
            .to_string()
    };
    let options = Options { max_tokens: 1, ..Options::default() };
    let message = fails(&[request("a", 0), request("", 1)], &options);
    assert!(message.contains("sequence 1 is empty"), "{message}");
    let wild = Request { prompt: vec![1, 256], ..Request::default() };
    let message = fails(&[wild], &options);
    assert!(message.contains("token 256 at place 1"), "{message}");
    let other = LanguageModel::new(&MambaConfig::bytes(16, 3), 5).unwrap().fresh_state(1).unwrap();
    let message = fails(&[Request { state: Some(other), ..request("a", 0) }], &options);
    assert!(message.contains("conv_state"), "{message}");
    let two = Request { state: Some(model.fresh_state(2).unwrap()), ..request("a", 0) };
    assert!(fails(&[two], &options).contains("2 slots"));
    let message = fails(&[request("a", 0)], &Options { chunk: 0, ..options.clone() });
    assert!(message.starts_with("chunk"), "{message}");

    let ids = LanguageModel::new(&MambaConfig { vocab_size: 300, ..MambaConfig::bytes(16, 1) }, 0);
    let stop = Options { stop: vec!["x".into()], ..options };
    let error =
        generate(&mut ModelRunner::new(&ids.unwrap()), &[request("a", 0)], &stop, &mut silent)
            .unwrap_err();
    assert!(error.to_string().starts_with("stop"), "{error}");
}

#[test]
fn damaged_weights_are_found_out() {
    let mut model = bytes_model();
    model
        .visit(&mut |parameter| {
            if parameter.name == "backbone.norm_f.weight" {
                *parameter.tensor = Tensor::filled(f32::NAN, [24]);
            }
            Ok(())
        })
        .unwrap();
    let error = generate(
        &mut ModelRunner::new(&model),
        &[request("abc", 0)],
        &Options::default(),
        &mut silent,
    );
    let error = error.unwrap_err().to_string();
    assert!(error.contains("position 3 is NaN"), "{error}");
}

#[test]
fn no_request_is_no_work() {
    assert!(all(&bytes_model(), &[], &Options::default()).is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn reading_in_chunks_is_reading_at_once(
        lengths in prop::collection::vec(0usize..40, 1..4),
        chunk in 1usize..20,
    ) {
        let model = bytes_model();
        let sequences: Vec<Vec<u32>> = lengths
            .iter()
            .map(|&length| (0..length as u32).map(|t| t * 37 % 256).collect())
            .collect();
        let (whole, whole_state) = logits(&model, &sequences, 4096);
        let (parts, parts_state) = logits(&model, &sequences, chunk);
        prop_assert_eq!(whole.len(), parts.len());
        for (a, b) in whole.iter().zip(&parts) {
            prop_assert!((a - b).abs() <= 1e-5 * (1.0 + a.abs()), "{} {}", a, b);
        }
        prop_assert_eq!(&whole_state.positions, &parts_state.positions);
        let values = |state: &State| -> Vec<f32> {
            bits(state).concat().into_iter().map(f32::from_bits).collect()
        };
        for (a, b) in values(&whole_state).iter().zip(&values(&parts_state)) {
            prop_assert!((a - b).abs() <= 1e-5 * (1.0 + a.abs()), "{} {}", a, b);
        }
    }
}
