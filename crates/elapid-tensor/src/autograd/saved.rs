//! What operations keep for their backward: values, or the recipe to make them again.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Meta, no_grad};
use crate::{Error, Result, Tensor};

/// A tensor kept for backward, without its graph.
pub struct Saved(Kept);

enum Kept {
    Values(Tensor),
    Recipe(Arc<Recipe>, usize),
}

impl Saved {
    /// Keeps the tensor's values, or, if it was made under [`rematerialize`], its recipe.
    pub fn new(tensor: &Tensor) -> Self {
        match tensor.meta.as_ref().and_then(|meta| meta.recipe.clone()) {
            Some((recipe, output)) => Self(Kept::Recipe(recipe, output)),
            None => Self(Kept::Values(tensor.detach())),
        }
    }

    /// The values. A recipe is carried out on the first call and its result shared until the last
    /// operation that saved it has run.
    ///
    /// # Errors
    /// If making the tensor again fails.
    pub fn get(&self) -> Result<Tensor> {
        match &self.0 {
            Kept::Values(tensor) => Ok(tensor.clone()),
            Kept::Recipe(recipe, output) => recipe.output(*output),
        }
    }
}

type Remake = Box<dyn Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync>;

pub(crate) struct Recipe {
    inputs: Vec<Saved>,
    remake: Remake,
    made: Mutex<Option<Vec<Tensor>>>,
}

impl Recipe {
    fn output(&self, index: usize) -> Result<Tensor> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.is_none() {
            let inputs = self.inputs.iter().map(Saved::get).collect::<Result<Vec<_>>>()?;
            *made = Some(no_grad(|| (self.remake)(&inputs))?);
        }
        made.as_ref()
            .and_then(|outputs| outputs.get(index))
            .cloned()
            .ok_or_else(|| Error::Graph(format!("a remade operation has no output {index}")))
    }
}

/// Runs `f` on the inputs; operations that save one of its results for backward keep the recipe (`f` and
/// its inputs) in place of the values, and `f` runs once more in backward.
///
/// For cheap results of inputs that are kept anyway, such as the convolution's output or the step Δ
/// (Mamba, section 3.3.2 and appendix D: selective recomputation).
///
/// # Errors
/// Those of `f`.
pub fn rematerialize<F>(inputs: &[&Tensor], f: F) -> Result<Vec<Tensor>>
where
    F: Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
{
    let given: Vec<Tensor> = inputs.iter().map(|&tensor| tensor.clone()).collect();
    let outputs = f(&given)?;
    Ok(with_recipe(outputs, inputs, f))
}

/// `outputs`, of which operations that save one for backward keep the recipe (`f` and `inputs`) in place of the
/// values: for results that came out together with something that is kept anyway, and can be made of it.
pub fn with_recipe<F>(mut outputs: Vec<Tensor>, inputs: &[&Tensor], f: F) -> Vec<Tensor>
where
    F: Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
{
    if !super::is_recording(inputs) {
        return outputs;
    }
    let recipe = Arc::new(Recipe {
        inputs: inputs.iter().map(|tensor| Saved::new(tensor)).collect(),
        remake: Box::new(f),
        made: Mutex::new(None),
    });
    for (i, output) in outputs.iter_mut().enumerate() {
        if let Some(meta) = &output.meta {
            output.meta = Some(Arc::new(Meta {
                identity: meta.identity(),
                recipe: Some((recipe.clone(), i)),
            }));
        }
    }
    outputs
}
