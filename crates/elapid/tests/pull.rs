//! `elapid pull` and `--model OWNER/NAME` from a hub on this machine.

#[path = "../../elapid-formats/tests/hub_server/mod.rs"]
mod hub_server;
mod program;

use std::process::Stdio;

use hub_server::{Fault, HubServer, commit};
use program::{Outcome, Program};

const NAME: &str = "some-one/mamba-tiny";

/// A hub that has the small model of the program's folder, and calls that go there.
struct Place {
    program: Program,
    server: HubServer,
}

impl Place {
    fn new() -> Self {
        let program = Program::with_model();
        let read = |name: &str| std::fs::read(program.path("model").join(name)).unwrap();
        let files = ["config.json", "model.safetensors"].map(|name| (name, read(name)));
        Self { server: HubServer::start().with(NAME, &files), program }
    }

    fn run(&self, arguments: &[&str]) -> Outcome {
        self.run_with(arguments, &[])
    }

    fn run_with(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Outcome {
        let mut command = self.program.command(arguments);
        for name in ["HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"] {
            command.env_remove(name);
        }
        for name in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
            command.env_remove(name);
        }
        command.env("HF_HOME", self.program.path("home")).env("HF_ENDPOINT", &self.server.endpoint);
        command.envs(variables.iter().copied()).stdin(Stdio::null());
        Outcome::of(command.output().unwrap())
    }
}

#[test]
fn a_pulled_model_is_used_by_its_name_and_by_its_path() {
    let place = Place::new();
    let pulled = place.run(&["pull", NAME]);
    assert!(pulled.err.contains("model.safetensors: "), "{}", pulled.err);
    assert!(pulled.err.contains(&format!("{NAME} at {}", &commit(1)[..12])), "{}", pulled.err);
    let path = pulled.ok().trim().to_owned();
    assert!(path.contains("models--some-one--mamba-tiny"), "{path}");
    let report = place.run(&["pull", NAME, "--json"]).json();
    assert_eq!(report["model"], path.as_str());
    assert_eq!(report["commit"], commit(1));
    assert_eq!(report["files"][1]["name"], "model.safetensors");
    assert_eq!(report["files"][1]["received_bytes"], 0);

    place.server.forget();
    let generate =
        |model: &str| place.run(&["generate", "--model", model, "-n", "8", "--seed", "1"]).ok();
    let text = generate("model");
    assert_eq!(generate(NAME), text);
    assert_eq!(generate(&path), text);
    place.run(&["doctor", "--model", NAME, "--offline"]).ok();
    place.run(&["inspect", NAME]).ok();
    // Every command that takes a model takes its name.
    place.program.write("text.txt", "The snake");
    place.program.write("ids.json", "[1, 2]");
    for call in [
        "eval --model {} --perplexity text.txt",
        "forward --model {} --tokens ids.json --out logits.safetensors",
        "convert {} model.npz",
        "quantize {} model.gguf --type q8_0",
    ] {
        let call = call.replace("{}", NAME);
        place.run(&call.split(' ').collect::<Vec<_>>()).ok();
    }
    assert!(place.server.seen().is_empty());
}

#[test]
fn what_is_missing_is_downloaded_and_a_broken_download_goes_on() {
    let place = Place::new();
    place.server.fail("model.safetensors", &[Fault::Cut(20_000)]);
    let outcome = place.run(&["generate", "--model", NAME, "-n", "4", "--seed", "1"]);
    assert!(outcome.err.contains("trying again from byte"), "{}", outcome.err);
    outcome.ok();
    let bodies = place.server.bodies("model.safetensors");
    assert_eq!(bodies.len(), 2);
    assert!(bodies[1].range.as_deref().unwrap().starts_with("bytes="));
}

#[test]
fn wrong_names_and_refusals_end_in_one_line() {
    let place = Place::new();
    place.run(&["pull", "mamba"]).fails(2, &["\"mamba\"", "OWNER/NAME"]);
    place.run(&["pull", "a/b@c", "--revision", "d"]).fails(2, &["--revision"]);
    place.run(&["pull", NAME, "--revision", "v2"]).fails(1, &["no revision \"v2\""]);
    place.run(&["pull", NAME, "--file", "x.gguf"]).fails(1, &["x.gguf", "model.safetensors"]);
    place.run(&["pull", "no-one/nothing"]).fails(1, &["no model no-one/nothing"]);
    place.run(&["pull", NAME, "--offline"]).fails(1, &[NAME, "--offline"]);
    let offline = [("HF_HUB_OFFLINE", "1")];
    let generate = ["generate", "--model", NAME];
    place.run_with(&generate, &offline).fails(1, &[NAME, "HF_HUB_OFFLINE"]);
    place
        .run(&["generate", "--model", "no-one/nothing"])
        .fails(1, &["there is no no-one/nothing here", "no model"]);
    // A mistake in a path is not looked for on the network.
    place.server.forget();
    place.run(&["generate", "--model", "model/best"]).fails(1, &["cannot open", "model/best"]);
    assert!(place.server.seen().is_empty());
    let nobody = [("HF_ENDPOINT", "http://127.0.0.1:9")];
    place.run_with(&["pull", NAME], &nobody).fails(1, &["cannot reach http://127.0.0.1:9"]);
}

#[test]
fn the_token_opens_private_models_and_another_cache_is_used() {
    let place = Place::new();
    place.server.change(NAME, |own| own.token = Some("secret".into()));
    place.run(&["pull", NAME]).fails(1, &["private", "HF_TOKEN"]);
    std::fs::create_dir_all(place.program.path("home")).unwrap();
    place.program.write("home/token", "secret\n");
    place.run(&["pull", NAME]).ok();
    place.run_with(&["pull", NAME], &[("HF_TOKEN", "wrong")]).fails(1, &["refuses access"]);
    let path = place.run(&["pull", NAME, "--cache-dir", "other"]).ok();
    assert!(path.starts_with("other"), "{path}");
    assert!(place.program.path("other/models--some-one--mamba-tiny/refs/main").exists());
}
