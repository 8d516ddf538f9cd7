//! The golden Mamba-1 and FalconMamba models from every format that they can be converted to: logits, cached
//! states and greedy continuations, f32 and bf16; for FalconMamba also loss and every gradient. On the host, and
//! FalconMamba on the emulated GPU and a card, as far as they are there.

use std::path::{Path, PathBuf};

use elapid_formats::convert::{save_hugging_face, save_npz, save_original};
use elapid_formats::{ModelSource, TensorFile, load_model};
use elapid_infer::{ModelRunner, forward};
use elapid_models::{Context, LanguageModel, State};
use elapid_tensor::cuda::Gpu;
use elapid_tensor::{DType, Device, Sequences, Tensor, autograd};

/// Logits and states, absolute.
const LOGITS: f64 = 2e-4;
const LOSS: f64 = 1e-5;
/// Relative to the largest gradient of the parameter.
const GRADIENT: f64 = 5e-5;

fn golden(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../elapid-formats/tests/fixtures/golden")
        .join(model)
}

struct Expected(TensorFile);

impl Expected {
    fn of(model: &str) -> Self {
        Self(TensorFile::open(&golden(model).join("expected.safetensors")).unwrap())
    }

    fn values(&self, name: &str) -> Vec<f64> {
        self.0.tensor(name).unwrap().to_f64_vec().unwrap()
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.values(name).into_iter().map(|id| id as u32).collect()
    }
}

fn close(a: &[f64], b: &[f64], tolerance: f64, what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= tolerance, "{what}: {a} and {b} at {i}");
    }
}

fn run(model: &LanguageModel, ids: &[u32], state: Option<State>) -> (Vec<f64>, State) {
    let mut logits = Vec::new();
    let state = forward(&mut ModelRunner::new(model), &[ids.to_vec()], state, 2048, |piece| {
        logits.extend(piece.logits.iter().map(|&logit| f64::from(logit)));
        Ok::<_, Box<dyn std::error::Error>>(())
    });
    (logits, state.unwrap())
}

/// Logits and states of both prompts, and what follows them.
fn check_prompts(model: &LanguageModel, expected: &Expected, what: &str) {
    let rows = model.config().padded_vocab_size();
    for prompt in 0..2 {
        let name = |field: &str| format!("prompt{prompt}.{field}");
        let (logits, mut state) = run(model, &expected.ids(&name("input_ids")), None);
        let at = |position: u32| &logits[position as usize * rows..(position as usize + 1) * rows];
        let found: Vec<f64> =
            expected.ids(&name("positions")).into_iter().flat_map(|p| at(p).to_vec()).collect();
        close(&found, &expected.values(&name("logits")), LOGITS, &format!("{what}: logits"));
        for (i, layer) in state.layers.iter().enumerate() {
            let name = |field| name(&format!("cache.layers.{i}.{field}"));
            let ssm = layer.get("ssm_state").unwrap().to_f64_vec().unwrap();
            close(&ssm, &expected.values(&name("ssm_state")), LOGITS, &name("ssm_state"));
            // The cache has the last W inputs; W - 1 are enough.
            let conv = layer.get("conv_state").unwrap().to_f64_vec().unwrap();
            let goal = expected.values(&name("conv_state"));
            let goal: Vec<f64> = goal.chunks(4).flat_map(|row| row[1..].to_vec()).collect();
            close(&conv, &goal, LOGITS, &name("conv_state"));
        }
        let mut last = logits[logits.len() - rows..].to_vec();
        let mut tokens = Vec::new();
        for _ in 0..32 {
            let best = (0..rows).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap() as u32;
            tokens.push(best);
            (last, state) = run(model, &[best], Some(state));
        }
        assert_eq!(tokens, expected.ids(&name("greedy_ids")), "{what}");
    }
}

/// The last eight logits of both prompts with weights that were rounded to bf16.
fn check_rounded(model: &LanguageModel, expected: &Expected, what: &str) {
    for prompt in 0..2 {
        let (logits, _) = run(model, &expected.ids(&format!("prompt{prompt}.input_ids")), None);
        let goal = expected.values(&format!("prompt{prompt}.logits_bf16_weights_last8"));
        close(&logits[logits.len() - goal.len()..], &goal, LOGITS, what);
    }
}

#[test]
fn from_every_format() {
    for (model, originals) in [("mamba1", &["hf", "original"][..]), ("falcon_mamba", &["hf"])] {
        let expected = Expected::of(model);
        for original in originals {
            let source = ModelSource::open(&golden(model).join(original)).unwrap();
            check_prompts(&source.load().unwrap(), &expected, original);
            for dtype in [DType::F32, DType::BF16] {
                let folder = tempfile::tempdir().unwrap();
                let path = |name: &str| folder.path().join(name);
                let mut targets = vec![path("hf"), path("model.npz")];
                save_hugging_face(&source, &targets[0], Some(dtype)).unwrap();
                save_npz(&source, &targets[1], Some(dtype)).unwrap();
                if model == "mamba1" {
                    targets.push(path("original"));
                    save_original(&source, &targets[2], Some(dtype)).unwrap();
                    targets.push(targets[2].join("pytorch_model.bin"));
                }
                for target in targets {
                    let what = format!("{model}/{original} as {dtype} in {}", target.display());
                    let loaded = load_model(&target).unwrap();
                    match dtype {
                        DType::F32 => check_prompts(&loaded, &expected, &what),
                        _ => check_rounded(&loaded, &expected, &what),
                    }
                }
            }
        }
    }
}

/// FalconMamba on every device that is there.
fn falcons() -> Vec<LanguageModel> {
    let load = || load_model(&golden("falcon_mamba").join("hf")).unwrap();
    let gpus = [("emulation", Gpu::emulated()), ("card", Gpu::open(0))];
    let gpus = gpus.into_iter().filter_map(|(what, gpu)| {
        let gpu = gpu.inspect_err(|error| eprintln!("SKIPPED: the model on the {what}: {error}"));
        let mut model = load();
        model.place(Device::Cuda(gpu.ok()?.id()), DType::F32).unwrap();
        Some(model)
    });
    std::iter::once(load()).chain(gpus).collect()
}

#[test]
fn falcon_mamba_on_every_device() {
    let expected = Expected::of("falcon_mamba");
    for model in falcons() {
        let input = expected.ids("prompt0.input_ids");
        let (logits, state) = run(&model, &input, None);
        close(&logits, &expected.values("prompt0.logits"), LOGITS, "logits");
        for (i, layer) in state.layers.iter().enumerate() {
            let ssm = layer.get("ssm_state").unwrap().to_f64_vec().unwrap();
            let name = format!("prompt0.cache.layers.{i}.ssm_state");
            close(&ssm, &expected.values(&name), LOGITS, &name);
        }
        // Documents in one row do not see each other.
        let borders: Vec<usize> =
            expected.ids("packed.cu_seqlens").into_iter().map(|t| t as usize).collect();
        let input = expected.ids("packed.input_ids");
        let tensor = Tensor::from_slice(&input, [input.len()]).unwrap();
        let sequences = Sequences::from_cu_seqlens(&borders).unwrap();
        let (hidden, _) = model.hidden(&tensor, &sequences, None, &mut Context::new()).unwrap();
        let logits = model.logits(&hidden).unwrap().to_f64_vec().unwrap();
        close(&logits, &expected.values("packed.logits"), LOGITS, "packed logits");
    }
}

#[test]
fn falcon_mamba_loss_and_every_gradient() {
    let expected = Expected::of("falcon_mamba");
    for mut model in falcons() {
        let input = expected.ids("batch.input_ids");
        let labels = expected.values("batch.labels");
        // Labels are not shifted in the fixture: position t is scored against label t + 1 of its row.
        let targets: Vec<i64> = labels
            .chunks(24)
            .flat_map(|row| row[1..].iter().map(|&label| label as i64).chain([-100]))
            .collect();
        let tensor = Tensor::from_slice(&input, [48]).unwrap();
        let sequences = Sequences::uniform(2, 24);
        let (loss, _) =
            model.loss(&tensor, &targets, &sequences, None, &mut Context::new()).unwrap();
        let value = f64::from(loss.item::<f32>().unwrap());
        close(&[value], &expected.values("batch.loss"), LOSS, "loss");
        let mut parameters = Vec::new();
        model
            .visit(&mut |parameter| {
                parameters.push((parameter.name.clone(), parameter.tensor.clone()));
                Ok(())
            })
            .unwrap();
        let inputs: Vec<&Tensor> = parameters.iter().map(|(_, tensor)| tensor).collect();
        let gradients = autograd::backward(&[(&loss, None)], &inputs).unwrap();
        let names = expected.0.names();
        assert_eq!(parameters.len(), names.iter().filter(|name| name.starts_with("grad.")).count());
        for ((name, _), gradient) in parameters.iter().zip(gradients) {
            let gradient = gradient.unwrap_or_else(|| panic!("{name} has no gradient"));
            let goal = expected.values(&format!("grad.{name}"));
            let largest = goal.iter().fold(0.0f64, |a, b| a.max(b.abs()));
            close(&gradient.to_f64_vec().unwrap(), &goal, GRADIENT * largest, name);
        }
    }
}
