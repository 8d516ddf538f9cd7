//! A whole training loop by hand: `cargo run --release -p elapid --example train_tiny`.
//!
//! Trains a byte-level Mamba of 60,000 parameters on this very file and prints the loss as it falls.

use elapid::tensor::autograd::backward;
use elapid::train::config::OptimizerConfig;
use elapid::train::optimizer::AdamW;
use elapid::{Context, LanguageModel, MambaConfig, Sequences, Tensor};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let text = include_bytes!("train_tiny.rs");
    let mut model = LanguageModel::new(&MambaConfig::bytes(48, 2), 0)?;
    let mut optimizer = AdamW::new(&OptimizerConfig::default(), &mut model)?;

    // Four windows of 128 bytes a step, end to end; each predicts the byte after every byte.
    let sequences = Sequences::uniform(4, 128);
    for step in 0..60 {
        let (mut ids, mut targets) = (Vec::new(), Vec::new());
        for window in 0..sequences.len() {
            let start = (step * 4 + window) * 97 % (text.len() - 129);
            ids.extend(text[start..start + 128].iter().map(|&byte| u32::from(byte)));
            targets.extend(text[start + 1..start + 129].iter().map(|&byte| i64::from(byte)));
        }
        let ids = Tensor::from_slice(&ids, [ids.len()])?;

        let mut parameters = Vec::new();
        model.visit(&mut |parameter| {
            parameters.push(parameter.tensor.clone());
            Ok(())
        })?;
        let (loss, _state) = model.loss(&ids, &targets, &sequences, None, &mut Context::new())?;
        let gradients = backward(&[(&loss, None)], &parameters.iter().collect::<Vec<_>>())?;
        drop(parameters);
        optimizer.step(&mut model, &gradients, 3e-3, 1.0)?;
        if step % 10 == 0 || step == 59 {
            let bits = f64::from(loss.item::<f32>()?) / std::f64::consts::LN_2;
            println!("step {step:2}: {bits:.3} bits per byte");
        }
    }
    Ok(())
}
