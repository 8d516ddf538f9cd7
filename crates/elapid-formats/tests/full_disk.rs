//! A disk that is full: a small file system in memory, where the system allows one.
#![cfg(target_os = "linux")]

mod sample;

use std::fs;
use std::path::Path;
use std::process::Command;

use elapid_formats::checkpoint::{Contents, Store};
use elapid_formats::{Fingerprint, hf, load_state, save_state};
use elapid_models::{LanguageModel, MambaConfig};
use elapid_tensor::DType;
use sample::{bits, entries, optimizer, parameters, state};
use serde_json::json;

struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// None, with a line that says so, without the right to mount.
    fn new(kilobytes: usize) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={kilobytes}k"), "tmpfs"])
            .arg(folder.path())
            .output()
            .is_ok_and(|output| output.status.success());
        if !mounted {
            println!("skipped: a tmpfs cannot be mounted here");
            return None;
        }
        Some(Self(folder))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

fn save(store: &Store, step: u64, model: &mut LanguageModel) -> elapid_formats::Result<()> {
    let tensors = optimizer(model);
    let contents =
        Contents { step, model, tensors: &tensors, state: None, meta: json!({}), config_toml: "" };
    store.save(contents).map(drop)
}

#[test]
fn a_checkpoint_that_does_not_fit_leaves_the_last_one() {
    let Some(disk) = SmallDisk::new(512) else { return };
    let store = Store::new(disk.path(), 3);
    let mut model = LanguageModel::new(&MambaConfig::bytes(32, 2), 1).unwrap();
    save(&store, 1, &mut model).unwrap();
    let mut step = 1;
    let error = loop {
        step += 1;
        assert!(step < 9, "the disk is never full");
        if let Err(error) = save(&store, step, &mut model) {
            break error.to_string();
        }
    };
    assert!(
        error.contains("No space left") && error.contains(disk.path().to_str().unwrap()),
        "{error}"
    );
    let expected: Vec<String> = (1..step).map(|step| format!("step-{step:08}")).collect();
    assert_eq!(entries(disk.path()), expected);
    let checkpoint = store.latest().unwrap().checkpoint.unwrap();
    assert_eq!(checkpoint.step(), step - 1);
    assert_eq!(parameters(&mut checkpoint.load_model().unwrap()), parameters(&mut model));
    // Replacing a checkpoint in place fails as safely.
    assert!(save(&store, step - 1, &mut model).is_err());
    assert_eq!(store.latest().unwrap().checkpoint.unwrap().step(), step - 1);
    // With room again it goes on.
    fs::remove_dir_all(store.folder(1)).unwrap();
    save(&store, step, &mut model).unwrap();
    assert_eq!(store.latest().unwrap().checkpoint.unwrap().step(), step);
}

#[test]
fn a_state_and_a_model_that_do_not_fit_leave_the_old_files() {
    let Some(disk) = SmallDisk::new(256) else { return };
    let mut model = LanguageModel::new(&MambaConfig::bytes(48, 2), 1).unwrap();
    let fingerprint = Fingerprint::of_config(model.config());
    let path = disk.path().join("state.safetensors");
    let old = state(&model, 2);
    save_state(&path, &old, &fingerprint).unwrap();
    let error = save_state(&path, &state(&model, 40), &fingerprint).unwrap_err().to_string();
    assert!(error.contains("No space left") && error.contains(path.to_str().unwrap()), "{error}");
    assert_eq!(bits(&load_state(&path, &model, &fingerprint).unwrap()), bits(&old));

    let folder = disk.path().join("model");
    hf::save_model(&folder, &mut model, DType::BF16).unwrap();
    let before = fs::read(folder.join(hf::WEIGHTS_FILE)).unwrap();
    assert!(hf::save_model(&folder, &mut model, DType::F32).is_err());
    assert_eq!(fs::read(folder.join(hf::WEIGHTS_FILE)).unwrap(), before);
    assert!(hf::save_model(&disk.path().join("new"), &mut model, DType::F32).is_err());
    assert_eq!(entries(disk.path()), ["model", "state.safetensors"]);
    assert_eq!(entries(&folder), [hf::CONFIG_FILE, hf::WEIGHTS_FILE]);
}
