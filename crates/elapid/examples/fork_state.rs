//! State is a value: read a prompt once, fork its state, go on in two ways, and save it.
//! `cargo run --release -p elapid --example fork_state`.

use std::ops::ControlFlow;

use elapid::formats::{Fingerprint, load_state, save_state, state_hash};
use elapid::{LanguageModel, MambaConfig, ModelRunner, Options, Request, Sampling, generate};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Random weights here; `elapid::formats::hf::load_model(folder)` reads a trained model.
    let model = LanguageModel::new(&MambaConfig::bytes(64, 2), 0)?;
    let read = |prompt: &str, state, max_tokens, seed| {
        let request = Request {
            prompt: prompt.bytes().map(u32::from).collect(),
            state,
            ..Request::default()
        };
        let sampling = Sampling { seed, ..Sampling::default() };
        let options = Options { sampling, max_tokens, ..Options::default() };
        generate(&mut ModelRunner::new(&model), &[request], &options, &mut |_| {
            ControlFlow::Continue(())
        })
    };

    let prompt = read("Once upon a time", None, 0, 0)?;
    let state = prompt.sequences[0].state.clone();
    println!("after {:?} tokens: state {:032x}", state.positions, state_hash(&state)?);

    // A fork costs nothing until one of the two is written.
    for (ending, seed) in [(", a snake", 1), (", a bird", 2)] {
        let generation = read(ending, Some(state.clone()), 24, seed)?;
        println!("{ending}: {:?}", generation.sequences[0].text);
    }

    let path = std::env::temp_dir().join("elapid-example-state.safetensors");
    let fingerprint = Fingerprint::of_config(model.config());
    save_state(&path, &state, &fingerprint)?;
    let loaded = load_state(&path, &model, &fingerprint)?;
    assert_eq!(state_hash(&loaded)?, state_hash(&state)?);
    println!("saved to and read back from {}", path.display());
    std::fs::remove_file(path)?;
    Ok(())
}
