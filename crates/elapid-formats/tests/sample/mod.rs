//! Small models, states and files that the tests of this crate share.
#![allow(dead_code, reason = "every test program uses a part")]

use std::fs;
use std::path::{Path, PathBuf};

use elapid_models::{LanguageModel, LayerState, MambaConfig, State};
use elapid_tensor::{Tensor, rng::Rng};

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden/mamba1").join(name)
}

pub fn config() -> MambaConfig {
    MambaConfig { vocab_size: 13, d_state: 4, dt_rank: Some(2), ..MambaConfig::bytes(8, 2) }
}

pub fn model() -> LanguageModel {
    LanguageModel::new(&config(), 7).unwrap()
}

/// Names, shapes and bits of every parameter.
pub fn parameters(model: &mut LanguageModel) -> Vec<(String, Vec<usize>, Vec<u32>)> {
    let mut all = Vec::new();
    model
        .visit(&mut |parameter| {
            let bits = parameter.tensor.to_vec::<f32>()?.into_iter().map(f32::to_bits).collect();
            all.push((parameter.name, parameter.tensor.shape().to_vec(), bits));
            Ok(())
        })
        .unwrap();
    all
}

pub fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed, 0);
    (0..len).map(|_| rng.normal() as f32).collect()
}

/// A state with values for a model.
pub fn state(model: &LanguageModel, slots: usize) -> State {
    let layers = model.state_shapes(slots).into_iter().enumerate().map(|(i, shapes)| {
        LayerState::new(shapes.into_iter().enumerate().map(|(j, (name, shape))| {
            let values = values(shape.elements(), (10 * i + j) as u64);
            (name.into(), Tensor::from_slice(&values, shape).unwrap())
        }))
    });
    State { layers: layers.collect(), positions: (0..slots as u64).map(|i| 1000 + i).collect() }
}

/// Names and bits of a state.
pub fn bits(state: &State) -> Vec<(String, Vec<usize>, Vec<u32>)> {
    let mut all = Vec::new();
    for (i, layer) in state.layers.iter().enumerate() {
        for (name, tensor) in layer.iter() {
            let bits = tensor.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
            all.push((format!("{i}.{name}"), tensor.shape().to_vec(), bits));
        }
    }
    all.sort();
    all
}

/// Names of a folder's entries.
pub fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The optimizer's part of a checkpoint.
pub fn optimizer(model: &mut LanguageModel) -> Vec<(String, Tensor)> {
    let mut tensors = vec![("step".to_owned(), Tensor::scalar(12i64))];
    for (i, (name, shape, _)) in parameters(model).into_iter().enumerate() {
        let values = values(shape.iter().product(), i as u64);
        tensors.push((
            format!("exp_avg.{name}"),
            Tensor::from_slice(&values, shape.as_slice()).unwrap(),
        ));
    }
    tensors
}
