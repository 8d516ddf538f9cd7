//! Tensors against a configuration: every name and shape, before any weight is read; and weights into a model.

use std::collections::BTreeSet;

use elapid_models::{Kind, LanguageModel, MambaConfig, parameter_outlines};
use elapid_tensor::{Device, Tensor};

use super::stored_tensor::first_not_finite;
use super::weights::Weights;
use crate::hf::{EMBEDDINGS, HEAD};
use crate::{Error, Result, TensorProblem};

/// Problems listed in one error; a wrong configuration makes every tensor wrong.
const LISTED: usize = 8;

/// The shape of a parameter in files.
pub(crate) fn stored_shape(kind: Kind, shape: &[usize]) -> Vec<usize> {
    match (kind, shape) {
        (Kind::Convolution, &[channels, taps]) => vec![channels, 1, taps],
        _ => shape.to_vec(),
    }
}

/// Checks that the tensors are exactly those of the configuration. A tied head may be there too if it has the
/// values of the embedding.
pub(super) fn check(weights: &Weights, config: &MambaConfig) -> Result<()> {
    check_size(weights, config)?;
    let mut problems = Vec::new();
    let mut unused: BTreeSet<&str> = weights.tensors.keys().map(String::as_str).collect();
    for outline in parameter_outlines(config) {
        unused.remove(outline.name.as_str());
        let expected = stored_shape(outline.kind, &outline.shape);
        let found = match weights.tensors.get(&outline.name) {
            Some(tensor) if tensor.shape == expected => continue,
            Some(tensor) => format!("{:?} {}", tensor.shape, tensor.type_name()),
            None => "no such tensor".into(),
        };
        problems.push(TensorProblem {
            name: outline.name,
            expected: format!("{expected:?}"),
            found,
        });
    }
    if config.tie_embeddings && unused.remove(HEAD) && weights.has_own_head() {
        problems.push(TensorProblem {
            name: HEAD.into(),
            expected: "the values of the embedding, as the head is tied".into(),
            found: "others".into(),
        });
    }
    for name in unused {
        let tensor = &weights.tensors[name];
        problems.push(TensorProblem {
            name: name.into(),
            expected: "no such tensor".into(),
            found: format!("{:?} {}", tensor.shape, tensor.type_name()),
        });
    }
    refuse(weights, problems)
}

/// Writes the weights into a model on the host that they were checked against, whose parameters go to `device`.
///
/// # Errors
/// If a weight is infinite or no number, naming its tensor, or the device cannot be used or is full.
pub(super) fn fill(weights: &Weights, model: &mut LanguageModel, device: Device) -> Result<()> {
    let gpu = device.gpu()?;
    let mut problems = Vec::new();
    let mut failed = None;
    model.visit(&mut |parameter| {
        let Some(tensor) = weights.tensors.get(&parameter.name) else { return Ok(()) };
        let mut passing = Vec::new();
        let values = match &gpu {
            // The model's own memory on the host is never touched.
            Some(_) => {
                passing.resize(parameter.tensor.elements(), 0.0);
                &mut passing
            }
            None => parameter.tensor.data_mut::<f32>()?,
        };
        failed = failed.take().or(tensor.read_f32(values).err());
        if let Some(at) = first_not_finite(values) {
            problems.push(TensorProblem {
                name: parameter.name,
                expected: "finite weights".into(),
                found: format!("{} at element {at}", values[at]),
            });
        }
        if let Some(gpu) = &gpu {
            let buffer = gpu.upload(&passing).map_err(elapid_tensor::Error::from)?;
            let moved = Tensor::from_device(buffer, parameter.tensor.shape())?;
            let tracked = parameter.tensor.tracks_grad();
            *parameter.tensor = if tracked { moved.requires_grad() } else { moved };
            tensor.bytes.release();
        }
        Ok(())
    })?;
    match failed {
        Some(error) => Err(error),
        None => refuse(weights, problems),
    }
}

fn refuse(weights: &Weights, mut problems: Vec<TensorProblem>) -> Result<()> {
    if problems.is_empty() {
        return Ok(());
    }
    let total = problems.len();
    problems.truncate(LISTED);
    Err(Error::Tensors { path: weights.path.clone(), problems, total })
}

/// Refuses a configuration that needs far more memory than the files can fill, before any is taken.
fn check_size(weights: &Weights, config: &MambaConfig) -> Result<()> {
    let names = weights.tensors.keys();
    let layers = names.filter_map(|name| layer_index(name)).max().map_or(0, |last| last + 1);
    if config.n_layer > layers {
        return Err(Error::Mismatch {
            path: weights.path.clone(),
            what: "number of layers",
            expected: format!("{} as in the configuration", config.n_layer),
            found: layers.to_string(),
        });
    }
    let wide = |n: usize| n as u128;
    let (d, inner) = (wide(config.d_model), wide(config.expand) * wide(config.d_model));
    let per_channel = wide(config.d_conv)
        + 3 * d
        + 3 * wide(config.d_state)
        + 2 * wide(config.dt_rank.unwrap_or(config.d_model.div_ceil(16)));
    let rows = wide(config.padded_vocab_size());
    let needed = rows * d + wide(config.n_layer) * inner * per_channel;
    let held: u128 = weights.tensors.values().map(|tensor| wide(tensor.elements())).sum();
    if needed > 2 * held + (1 << 14) {
        let shape = weights.tensors.get(EMBEDDINGS).map(|tensor| tensor.shape.as_slice());
        return Err(Error::Mismatch {
            path: weights.path.clone(),
            what: "number of parameters",
            expected: format!("about {needed} as in the configuration (embedding [{rows}, {d}])"),
            found: format!("{held} (embedding {:?})", shape.unwrap_or_default()),
        });
    }
    Ok(())
}

/// The 7 of `backbone.layers.7.norm.weight`.
fn layer_index(name: &str) -> Option<usize> {
    let rest = name.strip_prefix("backbone.layers.")?;
    rest.split_once('.')?.0.parse::<usize>().ok().filter(|&index| index < usize::MAX)
}
