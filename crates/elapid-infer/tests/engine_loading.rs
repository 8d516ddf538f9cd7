//! Loading the CPU engine: weights that are no numbers are named whatever was asked to be checked, files are used where
//! they are mapped, and the fingerprint of a file is that of the model it becomes.

use std::path::{Path, PathBuf};

use elapid_formats::{Fingerprint, ModelSource, TensorFile, load_continuation_checked, save_state};
use elapid_infer::{CpuEngine, Loading, ModelRunner, Rows, Runner, forward};
use elapid_models::State;
use elapid_ops::blocks::Encoding;

fn golden(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../elapid-formats/tests/fixtures/golden")
        .join(model)
}

/// A copy of the model whose tensor has the bytes `bits` at element `index`.
fn damaged(model: &str, tensor: &str, index: usize, bits: u32) -> (tempfile::TempDir, ModelSource) {
    let (from, folder) = (golden(model).join("hf"), tempfile::tempdir().unwrap());
    std::fs::copy(from.join("config.json"), folder.path().join("config.json")).unwrap();
    let mut bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let file = TensorFile::open(&from.join("model.safetensors")).unwrap();
    let whole = file.tensor(tensor).unwrap().to_vec::<f32>().unwrap();
    let own: Vec<u8> = whole.iter().flat_map(|value| value.to_le_bytes()).collect();
    let start = bytes.windows(own.len()).position(|window| window == own).unwrap();
    let at = start + index % whole.len() * 4;
    bytes[at..at + 4].copy_from_slice(&bits.to_le_bytes());
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    let source = ModelSource::open(folder.path()).unwrap();
    (folder, source)
}

#[test]
fn a_weight_that_is_no_number_is_named() {
    for model in ["mamba1", "falcon_mamba"] {
        let file = TensorFile::open(&golden(model).join("hf/model.safetensors")).unwrap();
        // The first layer has every kind.
        let names = file.names();
        let names = names.iter().filter(|name| !name.contains("layers") || name.contains("s.0."));
        for (i, name) in names.enumerate() {
            let bits = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][i % 3].to_bits();
            let (_folder, source) = damaged(model, name, 1009 * i + 77, bits);
            let given = [None, Some(Encoding::F32), Some(Encoding::BF16), Some(Encoding::Q8_0)];
            for (encoding, check) in given.into_iter().flat_map(|encoding| {
                [None, Some(Rows::AT_LOAD), Some(Rows::All)].map(|check| (encoding, check))
            }) {
                let loading = Loading { encoding, threads: 2, check, progress: &mut |_, _| {} };
                let error = CpuEngine::load(&source, loading).map(|_| ()).unwrap_err().to_string();
                let words = [name.as_str(), "finite"];
                assert!(words.iter().all(|word| error.contains(word)), "{name}: {error}");
            }
        }
    }
}

#[test]
fn progress_ends_with_everything() {
    let source = ModelSource::open(&golden("mamba1").join("hf")).unwrap();
    for encoding in [None, Some(Encoding::Q8_0)] {
        for check in [None, Some(Rows::AT_LOAD)] {
            let mut seen = Vec::new();
            let progress = &mut |done, all| seen.push((done, all));
            CpuEngine::load(&source, Loading { encoding, threads: 1, check, progress }).unwrap();
            assert!(seen.iter().all(|(done, all)| done <= all), "{seen:?}");
            let (done, all) = *seen.last().unwrap();
            assert!(encoding.is_some() || done == all, "{encoding:?}, {check:?}: {done} of {all}");
        }
    }
}

#[test]
fn states_go_from_the_model_to_the_engine_and_back() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["mamba1/hf", "mamba1/original", "falcon_mamba/hf"] {
        let source = ModelSource::open(&golden(name)).unwrap();
        let mut model = source.load().unwrap();
        let fingerprint = Fingerprint::of_source(&source).unwrap();
        assert_eq!(fingerprint, Fingerprint::of_model(&mut model).unwrap());

        let ids: Vec<u32> = (0..90).map(|i| i * 37 % 250).collect();
        let read = |runner: &mut dyn Runner, ids: &[u32], state: Option<State>| {
            let mut logits = Vec::new();
            let state = forward(runner, &[ids.to_vec()], state, 2048, |piece| {
                logits.extend_from_slice(piece.logits);
                Ok::<_, elapid_infer::Error>(())
            });
            (logits, state.unwrap())
        };
        let mut engine = CpuEngine::from_source(&source, None, 2).unwrap();
        let mut runner = ModelRunner::new(&model);
        let (whole, _) = read(&mut engine, &ids, None);
        let path = folder.path().join("half.state");
        for by_engine in [true, false] {
            let (first, second): (&mut dyn Runner, &mut dyn Runner) = match by_engine {
                true => (&mut engine, &mut runner),
                false => (&mut runner, &mut engine),
            };
            let (_, state) = read(first, &ids[..50], None);
            save_state(&path, &state, &fingerprint).unwrap();
            let check = |state: &State| second.check_state(state).map_err(|e| e.to_string());
            let config = source.config();
            let (state, _) =
                load_continuation_checked(&path, config, &fingerprint, &check).unwrap();
            assert_eq!(state.positions, [50]);
            let (rest, _) = read(second, &ids[50..], Some(state));
            let expected = &whole[whole.len() - rest.len()..];
            let worst = rest.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= 2e-4, "{name}, first the engine {by_engine}: {worst:e}");
        }
    }
}
