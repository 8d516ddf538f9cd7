//! Finding the first tensor that is not finite, when a step has gone wrong.

use elapid_data::Batch;
use elapid_models::{Context, LanguageModel, State};
use elapid_tensor::{DType, Tensor, autograd::no_grad};

use crate::error::Result;

/// The first bad tensor in the order parameters, activations, gradients; each in the order of the model.
///
/// Runs the batch once more, so it costs a forward pass.
///
/// # Errors
/// Those of the forward pass.
pub fn first_bad_tensor(
    model: &mut LanguageModel,
    batch: &Batch,
    state: Option<State>,
    gradients: &[Option<Tensor>],
) -> Result<Option<String>> {
    let mut names = Vec::new();
    let mut bad_parameter = None;
    model.visit(&mut |parameter| {
        if bad_parameter.is_none() && !is_finite(parameter.tensor) {
            bad_parameter = Some(format!("parameter {}", parameter.name));
        }
        names.push(parameter.name);
        Ok(())
    })?;
    if bad_parameter.is_some() {
        return Ok(bad_parameter);
    }
    if let Some(state) = &state {
        for (i, layer) in state.layers.iter().enumerate() {
            for (name, tensor) in layer.iter() {
                if !is_finite(tensor) {
                    return Ok(Some(format!("carried state layers.{i}.{name}")));
                }
            }
        }
    }
    let mut bad_activation = None;
    {
        let mut tap = |name: &str, tensor: &Tensor| {
            if bad_activation.is_none() && !is_finite(tensor) {
                bad_activation = Some(format!("activation {name}"));
            }
        };
        let ids = Tensor::from_slice(&batch.ids, [batch.ids.len()])?;
        let mut context = Context::tapped(&mut tap);
        no_grad(|| model.loss(&ids, &batch.targets, &batch.sequences, state, &mut context))?;
    }
    if bad_activation.is_some() {
        return Ok(bad_activation);
    }
    let bad = names
        .iter()
        .zip(gradients)
        .find(|(_, gradient)| gradient.as_ref().is_some_and(|g| !is_finite(g)));
    Ok(bad.map(|(name, _)| format!("gradient of {name}")))
}

fn is_finite(tensor: &Tensor) -> bool {
    if tensor.dtype() != DType::F32 {
        return true;
    }
    tensor.to_vec::<f32>().is_ok_and(|values| values.iter().all(|v| v.is_finite()))
}
