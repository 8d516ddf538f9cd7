//! The configuration as its users meet it: files, overrides, mistakes.

use std::path::{Path, PathBuf};

use elapid_models::NormKind;

use super::*;

const SMALL: &str =
    "[model]\nd_model = 64\nn_layer = 2\n\n[data]\npaths = \"text\"\n\n[train]\nsteps = 10\n";

fn load(text: &str, overrides: &[&str]) -> Result<RunConfig> {
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    RunConfig::parse(text, Some(Path::new("run.toml")), &overrides)
}

/// The message of the error that `line`, appended to a table of the small configuration, causes.
fn complaint(table: &str, line: &str) -> String {
    let text = SMALL.replace(&format!("[{table}]\n"), &format!("[{table}]\n{line}\n"));
    let text = if text == SMALL { format!("{SMALL}[{table}]\n{line}\n") } else { text };
    match load(&text, &[]) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("[{table}] {line} was accepted"),
    }
}

#[test]
fn every_example_loads_and_survives_a_round_trip() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let mut seen = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let config = RunConfig::load(&path, &[]).unwrap_or_else(|e| panic!("{e}"));
        let resolved = config.resolved();
        let text = resolved.to_toml();
        let again = load(&text, &[]).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(again, resolved, "{}", path.display());
        assert_eq!(again.to_toml(), text, "{}", path.display());
        assert_eq!(again.model.shape(), config.model.shape());
        assert!(config.differences(&again).is_empty());
        seen.push(path.file_stem().unwrap().to_string_lossy().into_owned());
    }
    for name in ["mamba-130m", "bytes-small", "induction-heads-small", "mambabyte-353m"] {
        assert!(seen.iter().any(|s| s == name), "configs/{name}.toml is missing");
    }
}

#[test]
fn what_is_not_written_is_default() {
    let config = load(SMALL, &[]).unwrap();
    assert_eq!(config.data.paths, ["text"], "one string is a list of one");
    assert_eq!(config.optimizer, OptimizerConfig::default());
    assert_eq!(config.tokens_per_batch(), 8 * 512);
    let shape = config.model.shape().unwrap();
    assert_eq!((shape.dt_rank(), shape.vocab_size, shape.d_state), (4, 256, 16));
}

#[test]
fn overrides_reach_every_table() {
    let overrides = [
        "optimizer.lr=3e-4",
        "train.out=runs/second try",
        "data.paths=[\"a\", \"b\"]",
        "data.separator=7",
        "model.norm=layer",
        "schedule.kind=constant",
        "train.steps=20",
    ];
    let config = load(SMALL, &overrides).unwrap();
    assert_eq!(config.optimizer.lr, 3e-4);
    assert_eq!(config.train.out, PathBuf::from("runs/second try"));
    assert_eq!(config.data.paths, ["a", "b"]);
    assert_eq!(config.data.separator.as_deref(), Some("7"), "text where text is wanted");
    assert_eq!(config.model.norm, Some(NormKind::Layer));
    assert_eq!(config.schedule.kind, ScheduleKind::Constant);
    assert_eq!(config.train.steps, Some(20));
}

#[test]
fn an_override_replaces_what_says_the_same_in_another_way() {
    let text = format!("{SMALL}[schedule]\nwarmup_steps = 5\nfinal_lr = 1e-5\n");
    let config = load(&text, &["train.epochs=2", "schedule.warmup_fraction=0.1"]).unwrap();
    assert_eq!((config.train.steps, config.train.epochs), (None, Some(2.0)));
    assert_eq!((config.schedule.warmup_steps, config.schedule.warmup_fraction), (None, Some(0.1)));
    let config = load(&text, &["schedule.kind=constant"]).unwrap();
    assert_eq!(config.schedule.final_lr, None);
    let config = load(&text, &["model.init_from=runs/a/model"]).unwrap();
    assert_eq!((config.model.d_model, config.model.shape()), (None, None));
    let config = load(&text, &["data.synthetic.task=selective-copying"]).unwrap();
    assert!(config.data.paths.is_empty());
    let task = "[model]\npreset = \"mamba-130m\"\n[data.synthetic]\ntask = \"induction-heads\"\n";
    let task = format!("{task}[train]\nsteps = 1\n");
    assert_eq!(load(&task, &["data.paths=text"]).unwrap().data.synthetic, None);
    // Two overrides that contradict each other are a mistake.
    let message = load(SMALL, &["train.epochs=2", "train.tokens=5"]).unwrap_err().to_string();
    assert!(
        message.starts_with("--set train.tokens=5: ") && message.contains("only one of"),
        "{message}"
    );
}

#[test]
fn unknown_keys_name_file_line_and_neighbour() {
    let message = complaint("optimizer", "learning_rate = 1");
    assert!(message.starts_with("run.toml:11: unknown key `optimizer.learning_rate`"), "{message}");
    for (table, line, neighbour) in [
        ("optimizer", "weigth_decay = 0", "optimizer.weight_decay"),
        ("train", "batchsize = 4", "train.batch_size"),
        ("train", "lr = 1e-3", "optimizer.lr"),
        ("model", "d_modle = 4", "model.d_model"),
        ("data", "contxt = 4", "data.context"),
        ("data.synthetic", "tsk = \"x\"", "data.synthetic.task"),
        ("schedule", "warmup = 10", "schedule.warmup_steps"),
        ("optimiser", "lr = 1", "optimizer"),
    ] {
        let message = complaint(table, line);
        assert!(message.contains("unknown key"), "{message}");
        assert!(message.contains(&format!("nearest valid key is `{neighbour}`")), "{message}");
    }
    let message = load(SMALL, &["optimizer.beta=1"]).unwrap_err().to_string();
    assert!(message.starts_with("--set optimizer.beta=1: unknown key"), "{message}");
    assert!(message.contains("`optimizer.betas`"), "{message}");
    let message = load(SMALL, &["trian.steps=1"]).unwrap_err().to_string();
    assert!(message.starts_with("--set trian.steps=1: unknown key `trian`"), "{message}");
    let message = load(&format!("seed = 3\n{SMALL}"), &[]).unwrap_err().to_string();
    assert!(message.starts_with("run.toml:1: ") && message.contains("`train.seed`"), "{message}");
}

#[test]
fn wrong_types_say_what_was_expected() {
    for (table, line, words) in [
        ("optimizer", "lr = \"fast\"", "`optimizer.lr`: expected a number, found string \"fast\""),
        ("train", "batch_size = -1", "expected a whole number, 0 or more, found integer `-1`"),
        ("train", "batch_size = 1.5", "found floating point `1.5`"),
        ("train", "keep_best = 1", "expected true or false, found integer `1`"),
        ("data", "extensions = 3", "expected a string or a list of strings, found integer `3`"),
        ("schedule", "kind = \"cosin\"", "expected `constant` or `cosine`, found `cosin`"),
        ("model", "dt_rank = \"big\"", "expected \"auto\" or a whole number, found string \"big\""),
        ("optimizer", "betas = [0.9]", "`optimizer.betas`"),
        ("data", "synthetic = \"induction-heads\"", "`data.synthetic`: expected a table"),
    ] {
        let message = complaint(table, line);
        assert!(message.contains(words), "{message}");
        assert!(message.starts_with("run.toml:"), "{message}");
    }
    let message = load("optimizer = 3\n", &[]).unwrap_err().to_string();
    assert!(message.starts_with("run.toml:1: `optimizer`: expected a table"), "{message}");
}

#[test]
fn values_out_of_range_are_refused() {
    for (table, line, words) in [
        ("optimizer", "lr = 0.0", "expected a number above 0, found 0"),
        ("optimizer", "lr = nan", "found NaN"),
        ("optimizer", "betas = [0.9, 1.0]", "`optimizer.betas`"),
        ("optimizer", "recurrence_lr_factor = 0.0", "`optimizer.recurrence_lr_factor`"),
        ("optimizer", "recurrence_lr_factor = inf", "`optimizer.recurrence_lr_factor`"),
        ("optimizer", "clip_norm = -1", "expected a number, 0 or more, found -1"),
        ("optimizer", "max_grad_norm_factor = 0.5", "0 or a number above 1"),
        ("schedule", "warmup_fraction = 1.0", "up to, not including, 1"),
        ("schedule", "warmup_steps = 10", "fewer than train.steps = 10"),
        ("schedule", "final_lr = 1.0", "optimizer.lr = 0.001"),
        ("schedule", "kind = \"constant\"\nfinal_lr = 0.0", "`schedule.final_lr`"),
        ("schedule", "warmup_steps = 1\nwarmup_fraction = 0.1", "only one of"),
        ("train", "epochs = 1", "only one of steps, epochs, tokens"),
        ("train", "batch_size = 0", "from 1 to"),
        ("train", "batch_size = 4\nbatch_tokens = 4096", "batch_size and batch_tokens"),
        ("train", "batch_tokens = 511", "at least one sequence of 512 tokens"),
        ("train", "accumulation = 0", "`train.accumulation`"),
        ("train", "keep_last = 0", "`train.keep_last`"),
        ("data", "context = 1", "`data.context`"),
        ("data", "validation_fraction = 1.0", "`data.validation_fraction`"),
        ("data", "separator = \"\"", "at least one character"),
        ("data", "carry_state = true\npacking = \"greedy\"", "`data.carry_state`"),
        ("data", "synthetic = { task = \"induction-heads\" }", "no files beside data.synthetic"),
        ("data", "synthetic = { length = 8 }", "`data.synthetic.task`"),
        ("model", "dt_max = 1e-9", "`model.dt_min`: expected at most dt_max"),
        ("model", "embedding_std = 0.0", "`model.embedding_std`: expected a positive number"),
        ("model", "preset = \"mamba-130\"", "did you mean \"mamba-130m\"?"),
        ("model", "init_from = \"model\"", "model.init_from, which brings its own shape"),
        ("model", "d_conv = 0", "`model.d_conv`: expected 1 to 16777216"),
        ("log", "every = 0", "`log.every`"),
    ] {
        let message = complaint(table, line);
        assert!(message.contains(words), "{line}: {message}");
        assert!(message.starts_with("run.toml:"), "{message}");
    }
    let message = load("[data]\npaths = []\n", &[]).unwrap_err().to_string();
    assert!(message.contains("model.preset, or model.d_model and model.n_layer"), "{message}");
    let message = load("[model]\npreset = \"mamba-130m\"\n[data]\npaths = []\n", &[]).unwrap_err();
    assert!(message.to_string().contains("at least one file, folder or glob"), "{message}");
}

#[test]
fn every_key_of_a_written_out_run_is_known() {
    // What the structs write is what they read: no field is lost by a renaming.
    let task = SyntheticConfig { eval_lengths: vec![64, 128], ..Default::default() };
    let mut config = load(SMALL, &[]).unwrap();
    config.data.synthetic = Some(task);
    let table = Table::try_from(config.resolved()).unwrap();
    for section in sections() {
        let mut written = Some(&table);
        for part in section.name.split('.').filter(|p| !p.is_empty()) {
            written = written.and_then(|t| t.get(part)).and_then(Value::as_table);
        }
        for key in written.unwrap().keys() {
            assert!(section.keys.contains(&key.as_str()), "[{}] {key}", section.name);
        }
    }
}

#[test]
fn differences_are_named() {
    let one = load(SMALL, &[]).unwrap();
    let two = load(SMALL, &["optimizer.lr=0.5", "data.separator=\"x\""]).unwrap();
    let pair = |a: &str, b: &str| (Some(a.to_string()), Some(b.to_string()));
    let found = one.differences(&two);
    assert_eq!(found.len(), 2, "{found:?}");
    assert_eq!(found[0], ("data.separator".into(), None, Some("\"x\"".into())));
    let (ours, theirs) = pair("0.001", "0.5");
    assert_eq!(found[1], ("optimizer.lr".into(), ours, theirs));
}

#[test]
fn unreadable_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("none.toml");
    let message = RunConfig::load(&path, &[]).unwrap_err().to_string();
    assert!(message.starts_with("cannot read ") && message.contains("none.toml"), "{message}");
    let path = folder.path().join("bytes.toml");
    std::fs::write(&path, b"[train]\n# \xff\n").unwrap();
    let message = RunConfig::load(&path, &[]).unwrap_err().to_string();
    assert!(message.contains("bytes.toml:2: not valid TOML: byte 10 is not UTF-8"), "{message}");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    /// Whatever a file or an override holds, the answer is a configuration or an error.
    #[test]
    fn hostile_text_never_panics(
        text in "[a-z\\[\\]=.\"\n #{},0-9_-]{0,80}",
        set in "[a-z.=\"{}\\[\\]0-9 ]{0,30}",
    ) {
        let _ = load(&text, &[&set]);
        let _ = load(SMALL, &[&set]);
        let _ = load(&format!("{SMALL}{text}"), &[]);
    }
}
