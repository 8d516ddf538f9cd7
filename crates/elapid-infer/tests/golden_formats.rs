//! The golden Mamba-1 and FalconMamba models from every format that they can be converted to: logits, cached
//! states and greedy continuations, f32 and bf16; for FalconMamba also loss and every gradient. On the host, and
//! FalconMamba on the emulated GPU and a card, as far as they are there.
//!
//! With weights in f32 all are compared with the golden values. With weights in bf16 there are golden logits of the last
//! eight tokens of each prompt: the golden file itself is compared with these, and every other file gives the bits of it,
//! tokens, logits and states; but GGUF, which holds A instead of its logarithm, so that A differs in its last bits.

mod by_hand;

use std::path::{Path, PathBuf};

use elapid_formats::convert::{save_hugging_face, save_npz, save_original};
use elapid_formats::gguf::{Plan, WeightTypes, save_gguf, vocabulary_of};
use elapid_formats::{ModelSource, TensorFile, hf, load_model};
use elapid_infer::{CpuEngine, ModelRunner, Runner, forward};
use elapid_models::{Context, LanguageModel, MambaConfig, NormKind, State};
use elapid_ops::blocks::Encoding;
use elapid_tensor::cuda::Gpu;
use elapid_tensor::{DType, Device, Sequences, Tensor, autograd};

/// Logits and states, absolute.
const LOGITS: f64 = 2e-4;
const LOSS: f64 = 1e-5;
/// Relative to the largest gradient of the parameter.
const GRADIENT: f64 = 5e-5;

/// The golden models lie in ELAPID_GOLDEN, or else in the checkout.
fn golden(model: &str) -> PathBuf {
    let checkout =
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../elapid-formats/tests/fixtures/golden");
    std::env::var_os("ELAPID_GOLDEN").map_or_else(checkout, PathBuf::from).join(model)
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

fn run(runner: &mut dyn Runner, ids: &[u32], state: Option<State>) -> (Vec<f64>, State) {
    let mut logits = Vec::new();
    let state = forward(runner, &[ids.to_vec()], state, 2048, |piece| {
        logits.extend(piece.logits.iter().map(|&logit| f64::from(logit)));
        Ok::<_, Box<dyn std::error::Error>>(())
    });
    (logits, state.unwrap())
}

/// Logits and states of both prompts, and what follows them.
fn check_prompts(runner: &mut dyn Runner, expected: &Expected, what: &str) {
    let rows = runner.config().padded_vocab_size();
    for prompt in 0..2 {
        let name = |field: &str| format!("prompt{prompt}.{field}");
        let (logits, state) = run(runner, &expected.ids(&name("input_ids")), None);
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
        let (tokens, _, _) = continued(runner, &logits, state);
        assert_eq!(tokens, expected.ids(&name("greedy_ids")), "{what}");
    }
}

/// The 32 tokens that follow, each the best after the one before, with the logits after the last and the state there.
fn continued(
    runner: &mut dyn Runner,
    logits: &[f64],
    mut state: State,
) -> (Vec<u32>, Vec<f64>, State) {
    let rows = runner.config().padded_vocab_size();
    let mut last = logits[logits.len() - rows..].to_vec();
    let mut tokens = Vec::new();
    for _ in 0..32 {
        let best = (0..rows).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap() as u32;
        tokens.push(best);
        (last, state) = run(runner, &[best], Some(state));
    }
    (tokens, last, state)
}

/// All that a runner makes of a prompt.
struct Made {
    /// Of every token.
    logits: Vec<f64>,
    /// After the prompt, and after what follows it.
    states: Vec<f64>,
    tokens: Vec<u32>,
    last: Vec<f64>,
}

impl Made {
    fn of(runner: &mut dyn Runner, ids: &[u32]) -> Self {
        let (logits, state) = run(runner, ids, None);
        let mut states = values(&state);
        let (tokens, last, state) = continued(runner, &logits, state);
        states.extend(values(&state));
        Self { logits, states, tokens, last }
    }

    /// Both prompts with weights that were rounded to bf16: the golden logits of the last eight tokens.
    fn of_golden(runner: &mut dyn Runner, expected: &Expected, what: &str) -> [Self; 2] {
        [0, 1].map(|prompt| {
            let made = Self::of(runner, &expected.ids(&format!("prompt{prompt}.input_ids")));
            let goal = expected.values(&format!("prompt{prompt}.logits_bf16_weights_last8"));
            close(&made.logits[made.logits.len() - goal.len()..], &goal, LOGITS, what);
            made
        })
    }

    /// The same tokens, and logits and states that are no further away than `tolerance`; 0 for the same bits.
    fn check(&self, goal: &Self, tolerance: f64, what: &str) {
        assert_eq!(self.tokens, goal.tokens, "{what}");
        let parts = [
            ("logits", &self.logits, &goal.logits),
            ("states", &self.states, &goal.states),
            ("last logits", &self.last, &goal.last),
        ];
        for (part, found, goal) in parts {
            close(found, goal, tolerance, &format!("{what}: {part}"));
            if tolerance == 0.0 {
                let same = found.iter().zip(goal).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{what}: {part}: zeros of other signs");
            }
        }
    }
}

/// All values of a state.
fn values(state: &State) -> Vec<f64> {
    let tensors = state.layers.iter().flat_map(|layer| {
        ["conv_state", "ssm_state"].map(|name| layer.get(name).unwrap().to_f64_vec().unwrap())
    });
    tensors.flatten().collect()
}

/// The model's file in GGUF, with projections and embedding in `encoding`, or as they are.
fn to_gguf(source: &ModelSource, target: &Path, encoding: Option<Encoding>) {
    let types = WeightTypes { projections: encoding, embedding: None };
    let plan = Plan::new(source, types).unwrap();
    save_gguf(source, &plan, vocabulary_of(source).unwrap(), target, &mut |_| {}).unwrap();
}

/// Both that run it: the model that a file becomes, and the engine over the file as it is.
fn with_runners(source: &ModelSource, mut check: impl FnMut(&mut dyn Runner, &str)) {
    let model = source.load().unwrap();
    check(&mut ModelRunner::new(&model), "the model");
    check(&mut CpuEngine::from_source(source, None, 2).unwrap(), "the engine");
}

/// The formats that `source` can have, each with a file or folder of it in `folder`.
fn converted(source: &ModelSource, model: &str, folder: &Path, dtype: DType) -> Vec<PathBuf> {
    let path = |name: &str| folder.join(name);
    let mut targets = vec![path("hf"), path("model.npz"), path("model.gguf")];
    save_hugging_face(source, &targets[0], Some(dtype)).unwrap();
    save_npz(source, &targets[1], Some(dtype)).unwrap();
    // From the rounded file, as GGUF itself rounds projections and embedding only.
    to_gguf(&ModelSource::open(&targets[0]).unwrap(), &targets[2], None);
    if model == "mamba1" {
        targets.push(path("original"));
        save_original(source, &targets[3], Some(dtype)).unwrap();
        targets.push(targets[3].join("pytorch_model.bin"));
    }
    for (name, shards, write) in [
        ("shards", 3, by_hand::safetensors as by_hand::Writer),
        ("legacy", 1, by_hand::legacy_pytorch),
        ("legacy shards", 2, by_hand::legacy_pytorch),
    ] {
        by_hand::save(&targets[0], &path(name), shards, write);
        targets.push(path(name));
    }
    targets
}

#[test]
fn from_every_format() {
    for (model, originals) in [("mamba1", &["hf", "original"][..]), ("falcon_mamba", &["hf"])] {
        let expected = Expected::of(model);
        for original in originals {
            let source = ModelSource::open(&golden(model).join(original)).unwrap();
            with_runners(&source, |runner, what| check_prompts(runner, &expected, what));
            let folder = tempfile::tempdir().unwrap();
            for target in converted(&source, model, folder.path(), DType::F32) {
                let source = ModelSource::open(&target).unwrap();
                let file = format!("{model}/{original} in {}", target.display());
                with_runners(&source, |runner, what| {
                    check_prompts(runner, &expected, &format!("{file}, {what}"));
                });
            }
        }
    }
}

#[test]
fn bf16_from_every_format() {
    for (model, originals) in [("mamba1", &["hf", "original"][..]), ("falcon_mamba", &["hf"])] {
        let expected = Expected::of(model);
        let rounded = ModelSource::open(&golden(model).join("hf_bf16")).unwrap();
        let mut goals = Vec::new();
        with_runners(&rounded, |runner, what| {
            let what = format!("{model}/hf_bf16, {what}");
            goals.push(Made::of_golden(runner, &expected, &what));
        });
        for original in originals.iter().copied().chain(["hf_bf16"]) {
            let source = ModelSource::open(&golden(model).join(original)).unwrap();
            let folder = tempfile::tempdir().unwrap();
            for target in converted(&source, model, folder.path(), DType::BF16) {
                let source = ModelSource::open(&target).unwrap();
                let gguf = target.extension().is_some_and(|end| end == "gguf");
                let tolerance = if gguf { LOGITS } else { 0.0 };
                let mut goals = goals.iter();
                with_runners(&source, |runner, what| {
                    let what =
                        format!("{model}/{original} as bf16 in {}, {what}", target.display());
                    for (prompt, goal) in goals.next().unwrap().iter().enumerate() {
                        let ids = expected.ids(&format!("prompt{prompt}.input_ids"));
                        Made::of(runner, &ids).check(goal, tolerance, &what);
                    }
                });
            }
        }
    }
}

/// The engine's logits and states are those of the model that the file becomes.
fn check_like_model(source: &ModelSource, what: &str) {
    let ids: Vec<u32> = (0..300).map(|i| (i * i * 31 + i * 7 + 5) % 256).collect();
    let model = source.load().unwrap();
    let (goal, goal_state) = run(&mut ModelRunner::new(&model), &ids, None);
    let mut engine = CpuEngine::from_source(source, None, 2).unwrap();
    let (logits, state) = run(&mut engine, &ids, None);
    close(&logits, &goal, LOGITS, what);
    for (layer, goal) in state.layers.iter().zip(&goal_state.layers) {
        for name in ["conv_state", "ssm_state"] {
            let [found, goal] = [layer, goal].map(|layer| layer.get(name).unwrap().to_f64_vec());
            close(&found.unwrap(), &goal.unwrap(), LOGITS, what);
        }
    }
}

#[test]
fn halves_in_gguf_and_on_the_engine() {
    let folder = tempfile::tempdir().unwrap();
    for model in ["mamba1", "falcon_mamba"] {
        let source = ModelSource::open(&golden(model).join("hf")).unwrap();
        for encoding in [Encoding::F16, Encoding::BF16] {
            let file = folder.path().join(format!("{model}-{encoding}.gguf"));
            to_gguf(&source, &file, Some(encoding));
            let half = ModelSource::open(&file).unwrap();
            assert_eq!(CpuEngine::from_source(&half, None, 1).unwrap().encoding(), encoding);
            check_like_model(&half, &format!("{model} in {encoding}"));
        }
    }
}

/// MambaByte: LayerNorm with bias over 256 bytes; no golden values, so beside the model that is tested by its own.
#[test]
fn mambabyte_on_the_engine_from_every_format() {
    let config = MambaConfig { norm: NormKind::Layer, ..MambaConfig::bytes(64, 3) };
    let mut model = LanguageModel::new(&config, 11).unwrap();
    model
        .visit(&mut |parameter| {
            if parameter.name.ends_with("norm.bias") || parameter.name.ends_with("norm_f.bias") {
                let values = parameter.tensor.data_mut::<f32>()?;
                values.iter_mut().enumerate().for_each(|(i, v)| *v = (i % 9) as f32 * 0.05 - 0.2);
            }
            Ok(())
        })
        .unwrap();
    for dtype in [DType::F32, DType::BF16] {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        hf::save_model(&path("hf"), &mut model, dtype).unwrap();
        let source = ModelSource::open(&path("hf")).unwrap();
        assert_eq!(source.config().norm, NormKind::Layer);
        save_npz(&source, &path("model.npz"), None).unwrap();
        to_gguf(&source, &path("model.gguf"), None);
        save_original(&source, &path("original"), None).unwrap();
        for file in ["hf", "model.npz", "model.gguf", "original"] {
            let source = ModelSource::open(&path(file)).unwrap();
            assert_eq!(source.config().norm, NormKind::Layer, "{file}");
            check_like_model(&source, &format!("{file} in {dtype}"));
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
        let (logits, state) = run(&mut ModelRunner::new(&model), &input, None);
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
