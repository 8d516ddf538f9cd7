//! The golden Mamba-1 model: logits, states, greedy tokens, loss and every gradient, as transformers
//! computes them, within the tolerances that were stated with the values.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use elapid_formats::{TensorFile, hf};
use elapid_infer::{ModelRunner, Options, Request, Sampling, forward, generate};
use elapid_models::{Context, LanguageModel, State};
use elapid_tensor::cuda::{Gpu, GpuId};
use elapid_tensor::{DType, Device, Sequences, Tensor, autograd};

/// Logits and states, absolute.
const LOGITS: f64 = 2e-4;
const LOSS: f64 = 1e-5;
/// Relative to the largest gradient of the parameter.
const GRADIENT: f64 = 5e-5;

/// The golden models lie in ELAPID_GOLDEN, or else in the checkout.
fn folder() -> PathBuf {
    let checkout =
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../elapid-formats/tests/fixtures/golden");
    std::env::var_os("ELAPID_GOLDEN").map_or_else(checkout, PathBuf::from).join("mamba1")
}

fn expected() -> TensorFile {
    TensorFile::open(&folder().join("expected.safetensors")).unwrap()
}

fn ids(file: &TensorFile, name: &str) -> Vec<u32> {
    file.tensor(name).unwrap().to_f64_vec().unwrap().into_iter().map(|id| id as u32).collect()
}

fn values(file: &TensorFile, name: &str) -> Vec<f64> {
    file.tensor(name).unwrap().to_f64_vec().unwrap()
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let worse = |worst: f64, d: f64| if d.is_nan() { f64::INFINITY } else { worst.max(d) };
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, worse)
}

/// The model on the host, on the emulated GPU and on a card, as far as they are there.
fn models(name: &str) -> Vec<LanguageModel> {
    let load = || hf::load_model(&folder().join(name)).unwrap();
    let gpus = [("emulation", Gpu::emulated()), ("card", Gpu::open(0))];
    let gpus = gpus.into_iter().filter_map(|(what, gpu)| {
        let gpu = gpu.inspect_err(|error| eprintln!("SKIPPED: the model on the {what}: {error}"));
        let mut model = load();
        model.place(Device::Cuda(gpu.ok()?.id()), DType::F32).unwrap();
        Some(model)
    });
    std::iter::once(load()).chain(gpus).collect()
}

/// Logits [T, V] and the state after the prompt.
fn run(model: &LanguageModel, prompt: &[u32], chunk: usize) -> (Vec<f64>, State) {
    let mut logits = Vec::new();
    let state = forward(&mut ModelRunner::new(model), &[prompt.to_vec()], None, chunk, |piece| {
        logits.extend(piece.logits.iter().map(|&logit| f64::from(logit)));
        Ok::<_, Box<dyn std::error::Error>>(())
    });
    (logits, state.unwrap())
}

#[test]
fn logits_and_states_of_prompts() {
    for model in models("hf") {
        let expected = expected();
        for prompt in 0..2 {
            let input = ids(&expected, &format!("prompt{prompt}.input_ids"));
            let goal = values(&expected, &format!("prompt{prompt}.logits"));
            // The emulation is slow: one short step costs it as much as a long one.
            let emulated = model.device() == Device::Cuda(GpuId::Emulated);
            let chunks: &[usize] = if emulated { &[2048, 150] } else { &[2048, 100, 7] };
            for &chunk in chunks {
                let (logits, state) = run(&model, &input, chunk);
                let difference = largest_difference(&logits, &goal);
                assert!(difference <= LOGITS, "prompt {prompt}, chunk {chunk}: {difference:e}");
                for (i, layer) in state.layers.iter().enumerate() {
                    let name = |field| format!("prompt{prompt}.cache.layers.{i}.{field}");
                    let ssm = layer.get("ssm_state").unwrap().to_f64_vec().unwrap();
                    let difference =
                        largest_difference(&ssm, &values(&expected, &name("ssm_state")));
                    assert!(difference <= LOGITS, "{}: {difference:e}", name("ssm_state"));
                    // The cache has the last W inputs; W - 1 are enough.
                    let conv = layer.get("conv_state").unwrap().to_f64_vec().unwrap();
                    let goal = values(&expected, &name("conv_state"));
                    let goal: Vec<f64> = goal.chunks(4).flat_map(|row| row[1..].to_vec()).collect();
                    let difference = largest_difference(&conv, &goal);
                    assert!(difference <= LOGITS, "{}: {difference:e}", name("conv_state"));
                }
                assert_eq!(state.positions, [input.len() as u64]);
            }
        }
    }
}

#[test]
fn greedy_continuations() {
    for model in models("hf") {
        let expected = expected();
        let requests: Vec<Request> = (0..2)
            .map(|prompt| Request {
                prompt: ids(&expected, &format!("prompt{prompt}.input_ids")),
                id: prompt,
                ..Request::default()
            })
            .collect();
        let options =
            Options { sampling: Sampling::greedy(), max_tokens: 32, ..Options::default() };
        let generation = generate(&mut ModelRunner::new(&model), &requests, &options, &mut |_| {
            ControlFlow::Continue(())
        });
        for (prompt, generated) in generation.unwrap().sequences.iter().enumerate() {
            assert_eq!(generated.tokens, ids(&expected, &format!("prompt{prompt}.greedy_ids")));
        }
    }
}

#[test]
fn decoding_leaves_other_threads_alone() {
    // On a card both threads work in one stream; a product's kernels stay together there.
    for model in models("hf") {
        let repeats = match model.device() {
            Device::Cuda(GpuId::Card(_)) => 60,
            _ => 2,
        };
        let expected = expected();
        let prompt = ids(&expected, "prompt0.input_ids");
        let request = Request { prompt: prompt.clone(), ..Request::default() };
        let (alone, _) = run(&model, &prompt, 7);
        let options = Options { sampling: Sampling::greedy(), max_tokens: 8, ..Options::default() };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..repeats {
                    let mut runner = ModelRunner::new(&model);
                    let request = std::slice::from_ref(&request);
                    generate(&mut runner, request, &options, &mut |_| ControlFlow::Continue(()))
                        .unwrap();
                }
            });
            for turn in 0..repeats {
                let (beside, _) = run(&model, &prompt, 7);
                assert!(alone == beside, "{}, turn {turn}", model.device());
            }
        });
    }
}

#[test]
fn weights_stored_as_bf16() {
    for model in models("hf_bf16") {
        let expected = expected();
        for prompt in 0..2 {
            let input = ids(&expected, &format!("prompt{prompt}.input_ids"));
            let (logits, _) = run(&model, &input, 2048);
            let goal = values(&expected, &format!("prompt{prompt}.logits_bf16_weights_last8"));
            let difference = largest_difference(&logits[logits.len() - goal.len()..], &goal);
            assert!(difference <= LOGITS, "prompt {prompt}: {difference:e}");
        }
    }
}

#[test]
fn documents_packed_in_one_row() {
    for model in models("hf") {
        let expected = expected();
        let input = ids(&expected, "packed.input_ids");
        let borders: Vec<usize> =
            ids(&expected, "packed.cu_seqlens").into_iter().map(|t| t as usize).collect();
        let targets: Vec<i64> = expected.tensor("packed.targets").unwrap().to_vec().unwrap();
        let sequences = Sequences::from_cu_seqlens(&borders).unwrap();
        let tensor = Tensor::from_slice(&input, [input.len()]).unwrap();
        let (hidden, _) = model.hidden(&tensor, &sequences, None, &mut Context::new()).unwrap();
        let logits = model.logits(&hidden).unwrap().to_f64_vec().unwrap();
        let difference = largest_difference(&logits, &values(&expected, "packed.logits"));
        assert!(difference <= LOGITS, "{difference:e}");
        let (loss, _) =
            model.loss(&tensor, &targets, &sequences, None, &mut Context::new()).unwrap();
        let difference = (f64::from(loss.item::<f32>().unwrap())
            - values(&expected, "packed.loss_mean")[0])
            .abs();
        assert!(difference <= LOSS, "{difference:e}");
    }
}

#[test]
fn loss_and_every_gradient() {
    for mut model in models("hf") {
        let expected = expected();
        let input = ids(&expected, "batch.input_ids");
        let labels: Vec<i64> = expected.tensor("batch.labels").unwrap().to_vec().unwrap();
        // Labels are not shifted in the fixture: position t is scored against label t + 1 of its row.
        let targets: Vec<i64> =
            labels.chunks(24).flat_map(|row| row[1..].iter().copied().chain([-100])).collect();
        let tensor = Tensor::from_slice(&input, [48]).unwrap();
        let sequences = Sequences::uniform(2, 24);
        let (loss, _) =
            model.loss(&tensor, &targets, &sequences, None, &mut Context::new()).unwrap();
        let value = f64::from(loss.item::<f32>().unwrap());
        assert!((value - values(&expected, "batch.loss")[0]).abs() <= LOSS, "{value}");

        let mut parameters = Vec::new();
        model
            .visit(&mut |parameter| {
                parameters.push((parameter.name.clone(), parameter.tensor.clone()));
                Ok(())
            })
            .unwrap();
        let inputs: Vec<&Tensor> = parameters.iter().map(|(_, tensor)| tensor).collect();
        let gradients = autograd::backward(&[(&loss, None)], &inputs).unwrap();
        let wanted = expected.names().iter().filter(|name| name.starts_with("grad.")).count();
        assert_eq!(parameters.len(), wanted);
        for ((name, _), gradient) in parameters.iter().zip(gradients) {
            let gradient = gradient.unwrap_or_else(|| panic!("{name} has no gradient"));
            let gradient = gradient.to_f64_vec().unwrap();
            let goal = values(&expected, &format!("grad.{name}"));
            let largest = goal.iter().fold(0.0f64, |a, b| a.max(b.abs()));
            let difference = largest_difference(&gradient, &goal) / largest;
            assert!(difference <= GRADIENT, "{name}: {difference:e}");
        }
    }
}
