//! Recomputation of a whole segment of the model.

use super::{Backward, Saved, backward, no_grad, record, with_grad};
use crate::{Result, Tensor};

/// Runs `f` without keeping anything but its inputs; backward runs it again, recorded, and differentiates
/// that run. Gradients flow to the listed inputs only, so every parameter that `f` uses must be listed.
///
/// # Errors
/// Those of `f`.
pub fn checkpoint<F>(inputs: &[&Tensor], f: F) -> Result<Vec<Tensor>>
where
    F: Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
{
    let detached: Vec<Tensor> = inputs.iter().map(|tensor| tensor.detach()).collect();
    let outputs = no_grad(|| f(&detached))?;
    Ok(record("checkpoint", inputs, outputs, || {
        let saved: Vec<Saved> = inputs.iter().map(|&tensor| Saved::new(tensor)).collect();
        move |context: &mut Backward| {
            let mut leaves = Vec::with_capacity(saved.len());
            for (i, saved) in saved.iter().enumerate() {
                let tensor = saved.get()?;
                leaves.push(if context.needs(i) { tensor.requires_grad() } else { tensor });
            }
            let outputs = with_grad(|| f(&leaves))?;
            let mut roots = Vec::new();
            for (i, output) in outputs.iter().enumerate() {
                if output.tracks_grad()
                    && let Some(grad) = context.take_grad(i)
                {
                    roots.push((output, Some(grad)));
                }
            }
            let wanted: Vec<&Tensor> = leaves.iter().filter(|leaf| leaf.tracks_grad()).collect();
            let mut grads = backward(&roots, &wanted)?.into_iter();
            Ok(leaves
                .iter()
                .map(|leaf| if leaf.tracks_grad() { grads.next().flatten() } else { None })
                .collect())
        }
    }))
}
