//! A process that is killed while it saves: another process starts over from its last checkpoint.

mod sample;

use std::process::{Command, Stdio};
use std::time::Duration;

use elapid_formats::checkpoint::{Contents, Store};
use elapid_formats::{Fingerprint, load_state, save_state};
use elapid_models::{LanguageModel, MambaConfig};
use sample::{bits, entries, optimizer, parameters, state};
use serde_json::json;

const FOLDER: &str = "ELAPID_TEST_KILLED_FOLDER";

fn model() -> LanguageModel {
    LanguageModel::new(&MambaConfig::bytes(64, 2), 1).unwrap()
}

/// Not a test by itself: the process that is killed. Saves until then.
#[test]
fn saver() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let folder = std::path::PathBuf::from(folder);
    let store = Store::new(&folder, 2);
    let mut model = model();
    let tensors = optimizer(&mut model);
    let fingerprint = Fingerprint::of_config(model.config());
    let state = state(&model, 8);
    for step in 1.. {
        let contents = Contents {
            // Some steps are saved twice, so that folders are replaced too.
            step: step / 2,
            model: &mut model,
            tensors: &tensors,
            state: None,
            meta: json!({}),
            config_toml: "",
        };
        store.save(contents).unwrap();
        save_state(&folder.join("state"), &state, &fingerprint).unwrap();
    }
}

#[test]
fn a_killed_process_costs_nothing_but_its_last_save() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(folder.path(), 2);
    let mut model = model();
    let expected = parameters(&mut model);
    let fingerprint = Fingerprint::of_config(model.config());
    let mut saved = false;
    for round in 0..12u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["saver", "--exact"])
            .env(FOLDER, folder.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(60 + 23 * round));
        child.kill().unwrap();
        child.wait().unwrap();

        let latest = store.latest().unwrap();
        assert!(latest.skipped.is_empty(), "{:?}", latest.skipped);
        if let Some(checkpoint) = latest.checkpoint {
            saved = true;
            assert_eq!(parameters(&mut checkpoint.load_model().unwrap()), expected);
        }
        let path = folder.path().join("state");
        if path.exists() {
            let loaded = load_state(&path, &model, &fingerprint).unwrap();
            assert_eq!(bits(&loaded), bits(&state(&model, 8)));
        }
    }
    assert!(saved, "no child lived long enough to save");
    save_state(&folder.path().join("state"), &state(&model, 8), &fingerprint).unwrap();
    let left: Vec<String> =
        entries(folder.path()).into_iter().filter(|name| name.starts_with('.')).collect();
    assert!(left.is_empty(), "{left:?}");
}
