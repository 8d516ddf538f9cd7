//! The CPU engine against the golden values, against the model that it stands for, and against itself: one by one and
//! in batches, whole and divided, on one thread and on several.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use elapid_formats::{ModelSource, TensorFile};
use elapid_infer::{
    CpuEngine, Logits, ModelRunner, Options, Request, Runner, Sampling, forward, generate,
};
use elapid_models::{Kind, LanguageModel, MambaConfig, NormKind, State};
use elapid_ops::blocks::{Encoding, dequantize, quantize};
use elapid_tensor::{Sequence, Sequences, Tensor};

/// Logits and states in f32, absolute.
const LOGITS: f64 = 2e-4;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../elapid-formats/tests/fixtures/golden/mamba1")
}

fn values(file: &TensorFile, name: &str) -> Vec<f64> {
    file.tensor(name).unwrap().to_f64_vec().unwrap()
}

fn ids(file: &TensorFile, name: &str) -> Vec<u32> {
    values(file, name).into_iter().map(|id| id as u32).collect()
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let worse = |worst: f64, d: f64| if d.is_nan() { f64::INFINITY } else { worst.max(d) };
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, worse)
}

/// Logits [T, V] of sequences end to end, and the state.
fn read(runner: &mut dyn Runner, sequences: &[Vec<u32>], chunk: usize) -> (Vec<f64>, State) {
    let mut logits = Vec::new();
    let state = forward(runner, sequences, None, chunk, |piece| {
        logits.extend(piece.logits.iter().map(|&logit| f64::from(logit)));
        Ok::<_, Box<dyn std::error::Error>>(())
    });
    (logits, state.unwrap())
}

fn bits(state: &State) -> Vec<Vec<u32>> {
    let tensors = state.layers.iter().flat_map(|layer| layer.iter());
    let bits =
        |tensor: &Tensor| tensor.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
    tensors.map(|(_, tensor)| bits(tensor)).collect()
}

#[test]
fn golden_logits_states_and_greedy_tokens() {
    let expected = TensorFile::open(&golden().join("expected.safetensors")).unwrap();
    let source = ModelSource::open(&golden().join("hf")).unwrap();
    let mut engine = CpuEngine::from_source(&source, None, 2).unwrap();
    for prompt in 0..2 {
        let input = ids(&expected, &format!("prompt{prompt}.input_ids"));
        for chunk in [2048, 7, 1] {
            let (logits, state) = read(&mut engine, std::slice::from_ref(&input), chunk);
            let goal = values(&expected, &format!("prompt{prompt}.logits"));
            let difference = largest_difference(&logits, &goal);
            assert!(difference <= LOGITS, "prompt {prompt}, chunk {chunk}: {difference:e}");
            for (i, layer) in state.layers.iter().enumerate() {
                let name = |field| format!("prompt{prompt}.cache.layers.{i}.{field}");
                let ssm = layer.get("ssm_state").unwrap().to_f64_vec().unwrap();
                let difference = largest_difference(&ssm, &values(&expected, &name("ssm_state")));
                assert!(difference <= LOGITS, "{}: {difference:e}", name("ssm_state"));
                let conv = layer.get("conv_state").unwrap().to_f64_vec().unwrap();
                let goal = values(&expected, &name("conv_state"));
                let goal: Vec<f64> = goal.chunks(4).flat_map(|row| row[1..].to_vec()).collect();
                assert!(largest_difference(&conv, &goal) <= LOGITS, "{}", name("conv_state"));
            }
        }
    }
    let requests: Vec<Request> = (0..2)
        .map(|prompt| Request {
            prompt: ids(&expected, &format!("prompt{prompt}.input_ids")),
            id: prompt,
            state: None,
            ..Request::default()
        })
        .collect();
    let options = Options { sampling: Sampling::greedy(), max_tokens: 32, ..Options::default() };
    let made = generate(&mut engine, &requests, &options, &mut |_| ControlFlow::Continue(()));
    for (prompt, generated) in made.unwrap().sequences.iter().enumerate() {
        assert_eq!(generated.tokens, ids(&expected, &format!("prompt{prompt}.greedy_ids")));
    }
}

#[test]
fn golden_weights_stored_as_bf16() {
    let expected = TensorFile::open(&golden().join("expected.safetensors")).unwrap();
    let source = ModelSource::open(&golden().join("hf_bf16")).unwrap();
    let mut engine = CpuEngine::from_source(&source, None, 2).unwrap();
    assert_eq!(engine.encoding(), Encoding::BF16);
    for prompt in 0..2 {
        let input = ids(&expected, &format!("prompt{prompt}.input_ids"));
        let (logits, _) = read(&mut engine, &[input], 2048);
        let goal = values(&expected, &format!("prompt{prompt}.logits_bf16_weights_last8"));
        let difference = largest_difference(&logits[logits.len() - goal.len()..], &goal);
        assert!(difference <= LOGITS, "prompt {prompt}: {difference:e}");
    }
}

fn config() -> MambaConfig {
    MambaConfig {
        norm: NormKind::Layer,
        bias: true,
        mixer_rms_eps: Some(1e-6),
        ..MambaConfig::bytes(256, 2)
    }
}

/// A model whose projections and embedding have values of the encoding.
fn rounded(encoding: Encoding) -> LanguageModel {
    let mut model = LanguageModel::new(&config(), 3).unwrap();
    model
        .visit(&mut |parameter| {
            let shape = parameter.tensor.shape();
            let mut values = parameter.tensor.to_vec::<f32>().unwrap();
            if matches!(parameter.kind, Kind::Projection | Kind::Embedding) {
                let columns = parameter.tensor.dim(1);
                let bytes = quantize(encoding, columns, &values).unwrap();
                dequantize(encoding, &bytes, &mut values).unwrap();
            } else if matches!(parameter.kind, Kind::Bias) {
                // Biases of zero would test nothing.
                for (i, value) in values.iter_mut().enumerate() {
                    *value += (i % 7) as f32 * 0.03 - 0.1;
                }
            }
            *parameter.tensor = Tensor::from_slice(&values, shape).unwrap();
            Ok(())
        })
        .unwrap();
    model
}

fn tokens(seed: u32, count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i * 31 + i * 7 + seed * 101) % 256).collect()
}

#[test]
fn every_encoding_is_the_model_with_the_values_that_it_stands_for() {
    let prompt = tokens(1, 40);
    for encoding in Encoding::ALL {
        let mut model = rounded(encoding);
        let (goal, _) = read(&mut ModelRunner::new(&model), std::slice::from_ref(&prompt), 2048);
        let mut engine = CpuEngine::from_model(&mut model, Some(encoding), 2).unwrap();
        assert_eq!(engine.encoding(), encoding);
        let (logits, _) = read(&mut engine, std::slice::from_ref(&prompt), 2048);
        let rms = |x: &mut dyn Iterator<Item = f64>| {
            (x.map(|x| x * x).sum::<f64>() / goal.len() as f64).sqrt()
        };
        let error = rms(&mut logits.iter().zip(&goal).map(|(a, b)| a - b));
        let size = rms(&mut goal.iter().copied());
        // Inputs are rounded to eight bits beside integers: about a hundredth of their size.
        let bound = if encoding.is_quantized() { 0.03 } else { 2e-5 };
        assert!(error <= bound * size, "{encoding}: {error:e} of {size:e}");
    }
}

#[test]
fn bits_depend_on_nothing_but_the_sequence() {
    for encoding in Encoding::ALL {
        // The long one is more than the engine takes at once.
        let long = if encoding == Encoding::Q8_0 { 260 } else { 20 };
        let lengths = [1, 9, 0, 2, long];
        let prompts: Vec<Vec<u32>> =
            lengths.iter().enumerate().map(|(i, &n)| tokens(i as u32, n)).collect();
        let mut model = rounded(encoding);
        let mut engine =
            |threads| CpuEngine::from_model(&mut model, Some(encoding), threads).unwrap();
        let mut one = engine(1);
        let (together, state) = read(&mut one, &prompts, 2048);
        for threads in [2, 3] {
            let (again, again_state) = read(&mut engine(threads), &prompts, 2048);
            assert!(again == together, "{encoding}, {threads} threads");
            assert_eq!(bits(&again_state), bits(&state));
        }
        let mut row = 0;
        for (slot, prompt) in prompts.iter().enumerate() {
            for chunk in [2048, 7] {
                let (alone, alone_state) = read(&mut one, std::slice::from_ref(prompt), chunk);
                let same = &together[row * 256..][..prompt.len() * 256];
                assert!(alone == same, "{encoding}, prompt {slot}, chunk {chunk}");
                assert_eq!(bits(&alone_state), bits(&state.select(&[slot]).unwrap()));
            }
            row += prompt.len();
        }
    }
}

#[test]
fn decoding_a_batch_is_decoding_one_by_one() {
    for encoding in [Encoding::BF16, Encoding::Q8_0, Encoding::Q4_K] {
        let mut model = rounded(encoding);
        let mut engine = CpuEngine::from_model(&mut model, Some(encoding), 2).unwrap();
        let requests: Vec<Request> = (0..9)
            .map(|i| Request {
                prompt: tokens(i, 1 + 3 * i as usize),
                id: u64::from(i),
                state: None,
                ..Request::default()
            })
            .collect();
        let sampling = Sampling { seed: 4, ..Sampling::default() };
        let options = Options { sampling, max_tokens: 12, chunk: 16, ..Options::default() };
        let mut run = |requests: &[Request]| {
            let made =
                generate(&mut engine, requests, &options, &mut |_| ControlFlow::Continue(()));
            made.unwrap().sequences
        };
        for (request, together) in requests.iter().zip(run(&requests)) {
            let alone = run(std::slice::from_ref(request)).remove(0);
            assert_eq!(alone.tokens, together.tokens, "{encoding}");
            assert_eq!(bits(&alone.state), bits(&together.state), "{encoding}");
        }
    }
}

#[test]
fn a_prompt_may_be_cut_anywhere() {
    let prompt = tokens(3, 300);
    for encoding in [Encoding::F32, Encoding::F16, Encoding::Q4_0] {
        let mut model = rounded(encoding);
        let mut engine = CpuEngine::from_model(&mut model, Some(encoding), 2).unwrap();
        let (whole, state) = read(&mut engine, std::slice::from_ref(&prompt), 2048);
        // Around the numbers of tokens at which kernels and chunks change.
        for cut in [1, 2, 3, 4, 5, 8, 9, 31, 47, 48, 49, 96, 255, 256, 257, 299] {
            let mut logits = Vec::new();
            let mut carried = None;
            for part in [&prompt[..cut], &prompt[cut..]] {
                let after = forward(&mut engine, &[part.to_vec()], carried.take(), 2048, |piece| {
                    logits.extend(piece.logits.iter().map(|&logit| f64::from(logit)));
                    Ok::<_, Box<dyn std::error::Error>>(())
                });
                carried = Some(after.unwrap());
            }
            assert!(logits == whole, "{encoding}, cut at {cut}");
            assert_eq!(bits(&carried.unwrap()), bits(&state), "{encoding}, cut at {cut}");
        }
    }
}

#[test]
fn slots_that_no_sequence_uses_stay_and_given_states_are_values() {
    let mut model = rounded(Encoding::F32);
    let mut engine = CpuEngine::from_model(&mut model, None, 2).unwrap();
    let (_, state) = read(&mut engine, &[tokens(1, 9), tokens(2, 4), tokens(3, 6)], 2048);
    let sequences = vec![
        Sequence { start: 0, len: 2, slot: 2, continued: true, position: 6, id: 0 },
        Sequence { start: 2, len: 0, slot: 0, continued: false, position: 0, id: 0 },
    ];
    let sequences = Sequences::new(sequences, 3).unwrap();
    let before = bits(&state);
    let mut seen = Vec::new();
    let mut receive = |logits: Logits<'_>| {
        seen.push((logits.first, logits.values.len()));
        ControlFlow::Continue(())
    };
    let after = engine.run(&[5, 6], &sequences, Some(state.clone()), &[1], &mut receive).unwrap();
    assert_eq!(seen, [(0, 256)]);
    assert_eq!(bits(&state), before);
    assert_eq!(bits(&after.select(&[1]).unwrap()), bits(&state.select(&[1]).unwrap()));
    assert!(bits(&after.select(&[0]).unwrap()).iter().flatten().all(|&bits| bits == 0));
    assert_eq!(after.positions, [0, 4, 8]);
}

#[test]
fn wrong_calls_are_errors() {
    let mut model = LanguageModel::new(&MambaConfig::bytes(24, 2), 1).unwrap();
    let mut engine = CpuEngine::from_model(&mut model, Some(Encoding::Q4_K), 1).unwrap();
    // Rows of 24 and 48 are no blocks of any size.
    assert_eq!(engine.encoding(), Encoding::F32);
    let mut run = |ids: &[u32], state: Option<State>, wanted: &[usize]| {
        let sequences = Sequences::uniform(1, 2);
        let mut receive = |_: Logits<'_>| ControlFlow::Continue(());
        engine
            .run(ids, &sequences, state, wanted, &mut receive)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    assert!(run(&[1], None, &[]).contains("1 ids for 2 tokens"));
    assert!(run(&[1, 256], None, &[]).contains("token 256"));
    assert!(run(&[1, 2], None, &[2]).contains("token 2 of 2"));
    assert!(run(&[1, 2], None, &[1, 0]).contains("ascending"));
    let other = LanguageModel::new(&MambaConfig::bytes(16, 2), 1).unwrap();
    assert!(run(&[1, 2], Some(other.fresh_state(1).unwrap()), &[]).contains("conv_state"));
    let state = model.fresh_state(2).unwrap();
    assert!(run(&[1, 2], Some(state), &[]).contains("2 slots"));
    model
        .visit(&mut |parameter| {
            if parameter.name.ends_with("layers.1.mixer.out_proj.weight") {
                let shape = parameter.tensor.shape();
                *parameter.tensor = Tensor::filled(f32::NAN, shape);
            }
            Ok(())
        })
        .unwrap();
    let error = CpuEngine::from_model(&mut model, Some(Encoding::BF16), 1).map(|_| ());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("layers.1.mixer.out_proj.weight") && error.contains("NaN"), "{error}");
}
