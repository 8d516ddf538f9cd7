//! Whether a model computes right where it is: a pass of a few tokens, each of whose activations is
//! computed once more in plain f64 from the activations before it and from the weights as they were read.
//!
//! A kernel that is wrong on a device, a weight that arrived damaged there, or one that is no number shows
//! as the first output that differs, and is named. At load some output rows of every weight are looked at;
//! `elapid doctor` looks at all of them.

pub(crate) mod reference;

use std::collections::BTreeMap;

use elapid_formats::ModelSource;
use elapid_models::{Context, LanguageModel, MambaConfig};
use elapid_tensor::autograd::no_grad;
use elapid_tensor::{DType, Device, Sequences, Tensor};
use rayon::prelude::*;

use crate::{Error, Result};
use reference::{Parameters, Reference};

/// How much is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// So many output rows of each weight, in runs of up to eight neighbours.
    Sampled(usize),
    /// Every one.
    All,
}

/// Rows that kernels take together.
const RUN: usize = 8;

impl Rows {
    /// A run of every weight, in other places of other layers: enough to see a wrong kernel at once.
    pub const AT_LOAD: Self = Self::Sampled(8);

    /// The rows of `0..count` to look at; `salt` lets neighbouring layers look at different ones.
    pub(crate) fn of(self, count: usize, salt: usize) -> Vec<usize> {
        match self {
            Self::Sampled(rows) if rows < count => {
                let run = rows.clamp(1, RUN);
                let (runs, places) = (rows / run, count.div_ceil(run));
                let mut chosen: Vec<usize> = (0..runs)
                    .map(|i| (i * places / runs + salt * 7 + i) % places * run)
                    .flat_map(|start| start..count.min(start + run))
                    .collect();
                chosen.sort_unstable();
                chosen.dedup();
                chosen
            }
            _ => (0..count).collect(),
        }
    }
}

/// Values of a pass by the name of the module that made them, in f64 on the host.
pub type Trace = BTreeMap<String, Vec<f64>>;

/// What was compared.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Checked {
    /// Number of values.
    pub values: usize,
    /// The largest difference, as a share of what rounding explains.
    pub worst: f64,
}

impl Checked {
    pub(crate) fn add(&mut self, other: Self) {
        self.values += other.values;
        self.worst = self.worst.max(other.worst);
    }
}

/// The weights as they were read, against which a model is checked later. Those of a model share its memory
/// until it is moved or changed.
pub struct SelfCheck<'a> {
    config: MambaConfig,
    weights: Box<dyn Parameters + 'a>,
}

impl SelfCheck<'static> {
    /// Takes note of the weights of a model on the host.
    ///
    /// # Errors
    /// If they are somewhere else.
    pub fn of(model: &mut LanguageModel) -> Result<Self> {
        let mut weights: BTreeMap<String, Tensor> = BTreeMap::new();
        model.visit(&mut |parameter| {
            // Somewhere else they could not be read.
            parameter.tensor.data::<f32>()?;
            weights.insert(parameter.name, parameter.tensor.detach());
            Ok(())
        })?;
        Ok(Self { config: model.config().clone(), weights: Box::new(weights) })
    }
}

impl<'a> SelfCheck<'a> {
    /// The weights of a model's files, of which only what is looked at is read.
    pub fn of_source(source: &'a ModelSource) -> Self {
        Self { config: source.config().clone(), weights: Box::new(source) }
    }

    /// Runs a few tokens through the model where it is now, and compares.
    ///
    /// # Errors
    /// [`Error::SelfCheck`] with the first tensor that is wrong.
    pub fn check(&self, model: &mut LanguageModel, rows: Rows) -> Result<Checked> {
        let trace = self.trace(model)?;
        let outcome = self.compare(&trace, model.compute(), rows);
        match outcome {
            Err(Error::SelfCheck { tensor, found, expected, place }) => {
                // A damaged weight is named rather than the kernel that read it.
                let tensor = self.damaged(model, &tensor)?.unwrap_or(tensor);
                Err(Error::SelfCheck { tensor, found, expected, place })
            }
            other => other,
        }
    }

    /// Two tokens that every vocabulary has, or as many as the convolution has taps, so that each is read.
    fn tokens(&self) -> Vec<u32> {
        let last = self.config.vocab_size.saturating_sub(1);
        let count = self.config.d_conv.max(2);
        (0..count).map(|i| u32::try_from(last / (i + 2)).unwrap_or(0)).collect()
    }

    /// All activations of the tokens, and their logits.
    ///
    /// # Errors
    /// Those of the model.
    pub fn trace(&self, model: &LanguageModel) -> Result<Trace> {
        no_grad(|| {
            let tokens = self.tokens();
            let mut taken: Vec<(String, Tensor)> = Vec::new();
            let mut tap = |name: &str, tensor: &Tensor| taken.push((name.into(), tensor.clone()));
            let ids = Tensor::from_slice(&tokens, [tokens.len()])?;
            let sequences = Sequences::fresh(&[tokens.len()]);
            let mut context = Context::tapped(&mut tap);
            let (hidden, _) = model.hidden(&ids, &sequences, None, &mut context)?;
            let logits = model.logits(&hidden)?;
            taken.push(("logits".into(), logits));
            let (names, tensors): (Vec<String>, Vec<Tensor>) = taken.into_iter().unzip();
            let values = Tensor::all_to_host(&tensors)?;
            let named = names.into_par_iter().zip(values);
            named.map(|(name, tensor)| Ok((name, tensor.to_f64_vec()?))).collect()
        })
    }

    /// Compares the activations of a pass that computed in `compute` with the reference.
    ///
    /// # Errors
    /// [`Error::SelfCheck`] with the first tensor that is wrong.
    pub fn compare(&self, trace: &Trace, compute: DType, rows: Rows) -> Result<Checked> {
        let mut reference = Reference::new(&self.config, &*self.weights, trace, compute, rows);
        reference.run(&self.tokens())?;
        Ok(reference.checked)
    }

    /// The first of the weights that `tensor` stands for whose values are not those that were read.
    fn damaged(&self, model: &mut LanguageModel, tensor: &str) -> Result<Option<String>> {
        let mut found = None;
        let module = tensor.rsplit_once('.').map_or(tensor, |(module, _)| module);
        model.visit(&mut |parameter| {
            let near = parameter.name.starts_with(module) || parameter.name == tensor;
            if found.is_some() || !near {
                return Ok(());
            }
            let now = parameter.tensor.to(Device::Cpu)?;
            let count = self.weights.elements(&parameter.name).unwrap_or(0);
            let same = match (now.data::<f32>(), self.weights.read(&parameter.name, 0..count)) {
                (Ok(now), Ok(read)) => {
                    now.iter().zip(&*read).all(|(a, b)| a.to_bits() == b.to_bits())
                }
                _ => false,
            };
            if !same {
                found = Some(parameter.name);
            }
            Ok(())
        })?;
        Ok(found)
    }
}
