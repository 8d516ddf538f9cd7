//! Keys that say the same in different ways: an override of one makes the written others void, since
//! whoever sets epochs on the command line means to replace the steps of the file.

use super::ModelConfig;
use super::keys::field_names;

const ALTERNATIVES: [&[&str]; 5] = [
    &["train.steps", "train.epochs", "train.tokens"],
    &["train.batch_size", "train.batch_tokens"],
    &["schedule.warmup_steps", "schedule.warmup_fraction"],
    &["schedule.final_lr", "schedule.final_lr_fraction"],
    &["data.paths", "data.synthetic"],
];

/// The written keys that the override `key=value` makes void.
pub(crate) fn replaced_by(key: &str, value: &str) -> Vec<String> {
    let void: &[&str] = match key {
        "schedule.kind" if value.trim_matches(['"', '\'']) == "constant" => {
            &["schedule.final_lr", "schedule.final_lr_fraction"]
        }
        "data.synthetic.task" => &["data.paths", "data.validation_paths"],
        "model.init_from" => {
            let keys = field_names::<ModelConfig>().iter();
            return keys.filter(|k| **k != "init_from").map(|k| format!("model.{k}")).collect();
        }
        _ => ALTERNATIVES.into_iter().find(|group| group.contains(&key)).unwrap_or(&[]),
    };
    void.iter().filter(|other| **other != key).map(ToString::to_string).collect()
}
