//! Continuous batching: requests of any length come and go between steps, each with its own options.
//! `cargo run --release -p elapid --example batched`.

use elapid::infer::{Limits, ModelRunner, Scheduler, Update};
use elapid::{LanguageModel, MambaConfig, Options, Request, Sampling};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Random weights here; `elapid::formats::hf::load_model(folder)` reads a trained model.
    let model = LanguageModel::new(&MambaConfig::bytes(64, 2), 0)?;
    let limits = Limits { slots: 2, prefill_tokens: 256, queue: 100, ..Limits::default() };
    let mut scheduler = Scheduler::new(ModelRunner::new(&model), limits)?;

    let mut prompts = ["The snake ", "Once upon a time", "fn main() {", "1, 2, 3,"].iter().zip(0..);
    loop {
        // A server would look at its socket here; what waits does not disturb what runs.
        if let Some((prompt, id)) = prompts.next() {
            let request = Request {
                prompt: prompt.bytes().map(u32::from).collect(),
                id,
                ..Request::default()
            };
            let sampling = Sampling { temperature: 0.8, seed: id, ..Sampling::default() };
            let options =
                Options { sampling, max_tokens: 8 + 8 * id as usize, ..Options::default() };
            let handle = scheduler.submit(request, &options)?;
            println!("{handle}: {prompt:?} has come");
        }
        for update in scheduler.step() {
            match update {
                Update::Token { .. } => {}
                Update::Finished { handle, generated } => {
                    println!("{handle}: {:?}, {:?}", generated.text, generated.finish);
                }
                Update::Failed { handle, error } => println!("{handle}: {error}"),
            }
        }
        if scheduler.is_idle() {
            return Ok(());
        }
    }
}
