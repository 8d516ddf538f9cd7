//! Training checkpoints: round trips, damage, killed saves, and what is kept.

mod sample;

use std::fs;
use std::path::Path;

use elapid_formats::checkpoint::{Checkpoint, Contents, Store, resolve_model};
use elapid_formats::hf;
use sample::{bits, entries, model, optimizer, parameters, state};
use serde_json::json;

fn save(store: &Store, step: u64) {
    let mut model = model();
    let tensors = optimizer(&mut model);
    let contents = Contents {
        step,
        model: &mut model,
        tensors: &tensors,
        state: None,
        meta: json!({ "step": step }),
        config_toml: "[train]\n",
    };
    store.save(contents).unwrap();
}

#[test]
fn everything_comes_back() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::new(root.path(), 2);
    let mut model = model();
    let carried = state(&model, 3);
    let tensors = optimizer(&mut model);
    let meta = json!({
        "rng": { "seed": u64::MAX, "stream": 3, "counter": 1u64 << 63 },
        "best": 0.1 + 0.2, "tiny": f64::MIN_POSITIVE, "odd": 1.0 / 3.0e-300,
        "loader": [1, 2.5, "x", null],
    });
    let config_toml = "[model]\nd_model = 8 # ε\n";
    let contents = Contents {
        step: 1000,
        model: &mut model,
        tensors: &tensors,
        state: Some(&carried),
        meta: meta.clone(),
        config_toml,
    };
    let path = store.save(contents).unwrap();
    assert_eq!(path, root.path().join("step-00001000"));
    assert_eq!(
        entries(&path),
        [
            "config.json",
            "config.toml",
            "model.safetensors",
            "optimizer.safetensors",
            "state.safetensors",
            "training.json"
        ]
    );

    let latest = store.latest().unwrap();
    assert!(latest.skipped.is_empty());
    let checkpoint = latest.checkpoint.unwrap();
    assert_eq!((checkpoint.step(), checkpoint.path()), (1000, path.as_path()));
    assert_eq!(checkpoint.config_toml(), config_toml);
    assert_eq!(checkpoint.meta(), &meta);
    for key in ["best", "tiny", "odd"] {
        let (ours, theirs) = (checkpoint.meta()[key].as_f64(), meta[key].as_f64());
        assert_eq!(ours.map(f64::to_bits), theirs.map(f64::to_bits), "{key}");
    }
    assert_eq!(&checkpoint.model_config().unwrap(), model.config());
    let mut loaded = checkpoint.load_model().unwrap();
    assert_eq!(parameters(&mut loaded), parameters(&mut model));
    let mut other = elapid_models::LanguageModel::empty(model.config()).unwrap();
    checkpoint.load_weights(&mut other).unwrap();
    assert_eq!(parameters(&mut other), parameters(&mut model));
    assert_eq!(bits(&checkpoint.state(&loaded).unwrap().unwrap()), bits(&carried));

    let mut expected: Vec<_> = tensors.iter().collect();
    expected.sort_by(|a, b| b.1.dtype().size().cmp(&a.1.dtype().size()).then(a.0.cmp(&b.0)));
    let read = checkpoint.tensors().unwrap();
    assert_eq!(read.len(), expected.len());
    for ((name, tensor), (own, original)) in read.iter().zip(expected) {
        assert_eq!(
            (name, tensor.dtype(), tensor.shape()),
            (own, original.dtype(), original.shape())
        );
        assert_eq!(tensor.to_f64_vec().unwrap(), original.to_f64_vec().unwrap(), "{name}");
    }
    // The folder is a model as it stands.
    assert_eq!(parameters(&mut hf::load_model(&path).unwrap()), parameters(&mut model));
}

#[test]
fn the_newest_and_the_best_are_kept() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::new(root.path(), 2);
    assert!(store.latest().unwrap().checkpoint.is_none());
    assert!(store.best().is_none() && store.mark_best(10).is_err());
    save(&store, 10);
    store.mark_best(10).unwrap();
    for step in [20, 30, 40] {
        save(&store, step);
    }
    assert_eq!(store.steps().unwrap(), [10, 30, 40]);
    assert_eq!(store.best(), Some(10));
    store.mark_best(40).unwrap();
    save(&store, 50);
    assert_eq!(store.steps().unwrap(), [40, 50]);
    assert_eq!(entries(root.path()), ["best", "step-00000040", "step-00000050"]);

    assert_eq!(resolve_model(root.path()).unwrap(), store.folder(50));
    assert_eq!(resolve_model(&root.path().join("best")).unwrap(), store.folder(40));
    assert_eq!(resolve_model(&store.folder(40)).unwrap(), store.folder(40));
    // Going on from an earlier step never removes what was just written.
    save(&Store::new(root.path(), 1), 45);
    assert_eq!(store.steps().unwrap(), [40, 45, 50]);
    // Saving a step again replaces it.
    save(&store, 45);
    assert_eq!(store.steps().unwrap(), [40, 45, 50]);
}

fn damage(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(path, bytes).unwrap();
}

#[test]
fn damaged_checkpoints_are_named_and_skipped() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::new(root.path(), 9);
    for step in 1..=7 {
        save(&store, step);
    }
    damage(&store.folder(7).join("model.safetensors"));
    damage(&store.folder(6).join("optimizer.safetensors"));
    damage(&store.folder(5).join("config.json"));
    damage(&store.folder(4).join("training.json"));
    fs::remove_file(store.folder(3).join("config.toml")).unwrap();
    fs::remove_file(store.folder(2).join("training.json")).unwrap();
    let latest = store.latest().unwrap();
    assert_eq!(latest.checkpoint.unwrap().step(), 1);
    let named = [
        "model.safetensors",
        "optimizer.safetensors",
        "config.json",
        "training.json",
        "config.toml",
        "training.json",
    ];
    assert_eq!(latest.skipped.len(), named.len());
    for ((folder, error), name) in latest.skipped.iter().zip(named) {
        let text = error.to_string();
        assert!(text.contains(folder.join(name).to_str().unwrap()), "{text}");
    }
    damage(&store.folder(1).join("config.toml"));
    assert!(store.latest().unwrap().checkpoint.is_none());
    assert!(resolve_model(root.path()).is_err());
}

#[test]
fn a_killed_save_leaves_nothing_that_counts() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::new(root.path(), 3);
    save(&store, 10);
    // Killed while it wrote step 20.
    let half = root.path().join(".step-00000020.4194304-0-17.tmp");
    fs::create_dir(&half).unwrap();
    fs::write(half.join("model.safetensors"), b"half").unwrap();
    assert_eq!(store.steps().unwrap(), [10]);
    assert_eq!(store.latest().unwrap().checkpoint.unwrap().step(), 10);
    assert_eq!(entries(root.path()), ["step-00000010"]);
    // Killed while it replaced step 10: the old folder is moved away, the new one not yet in place.
    fs::rename(store.folder(10), root.path().join(".step-00000010.4194304-0-18.old")).unwrap();
    fs::create_dir(root.path().join(".step-00000010.4194304-0-17.tmp")).unwrap();
    assert_eq!(store.latest().unwrap().checkpoint.unwrap().step(), 10);
    assert_eq!(entries(root.path()), ["step-00000010"]);
    // Or killed after it had: the new one stays.
    fs::create_dir(root.path().join(".step-00000010.4194304-0-18.old")).unwrap();
    save(&store, 20);
    assert_eq!(entries(root.path()), ["step-00000010", "step-00000020"]);
    Checkpoint::open(&store.folder(10)).unwrap();
}
