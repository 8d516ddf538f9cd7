//! Weights into a model, every one of them checked by name, shape and type.

use std::collections::BTreeSet;
use std::path::Path;

use elapid_models::{Kind, LanguageModel, MambaConfig, Parameter};
use elapid_tensor::DType;

use super::weights::Weights;
use super::{HEAD, load_config};
use crate::{Error, Result, TensorProblem};

/// Problems listed in one error; a wrong configuration makes every tensor wrong.
const LISTED: usize = 8;

/// Reads a model folder.
///
/// A head that is stored beside the embedding though the configuration ties them is accepted if it has the
/// same values; else the model gets a head of its own, as in transformers.
///
/// # Errors
/// If a file is missing or damaged, the model is not a Mamba, or a tensor is missing, unexpected or of
/// another shape or type than the configuration says.
pub fn load_model(folder: &Path) -> Result<LanguageModel> {
    // Without weights, say so, even if the configuration is not readable either.
    let weights = Weights::open(folder)?;
    let config = load_config(folder)?;
    let tie_embeddings = config.tie_embeddings && !weights.has_own_head()?;
    let config = MambaConfig { tie_embeddings, ..config };
    weights.check_size(&config)?;
    let mut model = LanguageModel::empty(&config)?;
    fill(&weights, &mut model)?;
    Ok(model)
}

/// Reads the weights of a model folder into a model that exists.
///
/// # Errors
/// As [`load_model`]; the model may then be partly overwritten.
pub fn load_weights(folder: &Path, model: &mut LanguageModel) -> Result<()> {
    fill(&Weights::open(folder)?, model)
}

fn fill(weights: &Weights, model: &mut LanguageModel) -> Result<()> {
    let mut problems = Vec::new();
    let mut unused: BTreeSet<&str> = weights.names().collect();
    let mut failed = None;
    model.visit(&mut |parameter| {
        unused.remove(parameter.name.as_str());
        match fill_one(weights, parameter) {
            Ok(None) => {}
            Ok(Some(problem)) => problems.push(problem),
            Err(error) => failed = failed.take().or(Some(error)),
        }
        Ok(())
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    if model.config().tie_embeddings && unused.remove(HEAD) && weights.has_own_head()? {
        problems.push(TensorProblem {
            name: HEAD.into(),
            expected: "the values of the embedding, as the head is tied".into(),
            found: "others".into(),
        });
    }
    for name in unused {
        problems.push(TensorProblem {
            name: name.into(),
            expected: "no such tensor".into(),
            found: weights.find(name).map_or(String::new(), |(file, own)| {
                format!(
                    "{:?} {}",
                    file.shape(own).unwrap_or_default(),
                    file.dtype_name(own).unwrap_or_default()
                )
            }),
        });
    }
    if problems.is_empty() {
        return Ok(());
    }
    let total = problems.len();
    problems.truncate(LISTED);
    Err(Error::Tensors { path: weights.path.clone(), problems, total })
}

/// The shape of a parameter in files.
pub(super) fn stored_shape(kind: Kind, shape: &[usize]) -> Vec<usize> {
    match (kind, shape) {
        (Kind::Convolution, &[channels, taps]) => vec![channels, 1, taps],
        _ => shape.to_vec(),
    }
}

fn fill_one(weights: &Weights, parameter: Parameter<'_>) -> Result<Option<TensorProblem>> {
    let expected = stored_shape(parameter.kind, &parameter.tensor.shape());
    let problem = |found: String| {
        let expected = format!("{expected:?} F32, BF16 or F16");
        Ok(Some(TensorProblem { name: parameter.name.clone(), expected, found }))
    };
    let Some((file, own)) = weights.find(&parameter.name) else {
        return problem("no such tensor".into());
    };
    let shape = file.shape(own).unwrap_or_default();
    let known = matches!(file.dtype(own), Some(DType::F32 | DType::BF16 | DType::F16));
    if shape != expected || !known {
        return problem(format!("{shape:?} {}", file.dtype_name(own).unwrap_or_default()));
    }
    file.read_f32(own, parameter.tensor.data_mut::<f32>()?)?;
    Ok(None)
}
