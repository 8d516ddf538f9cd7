//! Times training steps of the byte-level model of the benchmarks (d 256, 8 layers, 8 x 512 tokens), without
//! data or optimizer: `cargo run --release -p elapid-models --example step_speed [STEPS]`.

use std::time::Instant;

use elapid_models::{Context, LanguageModel, MambaConfig};
use elapid_tensor::autograd::backward;
use elapid_tensor::{Sequences, Tensor, memory};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let steps: usize = std::env::args().nth(1).map_or(Ok(5), |text| text.parse())?;
    let mut model = LanguageModel::new(&MambaConfig::bytes(256, 8), 0)?;
    let sequences = Sequences::uniform(8, 512);
    let tokens: Vec<u32> = (0..sequences.tokens() as u32).map(|i| i * 31 % 251).collect();
    let ids = Tensor::from_slice(&tokens, [tokens.len()])?;
    let targets: Vec<i64> = tokens.iter().map(|&id| i64::from((id + 31) % 251)).collect();
    for step in 0..steps {
        let mut parameters = Vec::new();
        model.visit(&mut |parameter| {
            parameters.push(parameter.tensor.clone());
            Ok(())
        })?;
        let start = Instant::now();
        let (loss, state) = model.loss(&ids, &targets, &sequences, None, &mut Context::new())?;
        drop(state);
        let forward = start.elapsed();
        backward(&[(&loss, None)], &parameters.iter().collect::<Vec<_>>())?;
        let all = start.elapsed();
        println!(
            "step {step}: loss {:.4}, forward {:.0} ms, backward {:.0} ms, {:.0} tokens/s, peak {} MB",
            loss.item::<f32>()?,
            forward.as_secs_f64() * 1e3,
            (all - forward).as_secs_f64() * 1e3,
            tokens.len() as f64 / all.as_secs_f64(),
            memory::usage().peak / 1_000_000
        );
    }
    Ok(())
}
