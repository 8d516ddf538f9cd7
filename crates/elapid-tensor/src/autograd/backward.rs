//! The reverse sweep.

use std::collections::{BinaryHeap, HashMap, HashSet};
use std::sync::{Arc, PoisonError};

use rayon::prelude::*;

use super::{Identity, Joined, Node, Place};
use crate::{DType, Error, Result, Tensor};

/// What an operation's backward function is given.
pub struct Backward {
    op: &'static str,
    grads: Vec<Option<Tensor>>,
    needs: Vec<bool>,
    /// What later consumers of the inputs gave so far.
    sums: Vec<Option<Tensor>>,
    /// The inputs that are parts of a tensor.
    parts: Vec<Option<(Arc<Joined>, usize)>>,
}

impl Backward {
    /// Gradient of an output; none if nothing used that output.
    pub fn grad(&self, output: usize) -> Option<&Tensor> {
        self.grads.get(output).and_then(Option::as_ref)
    }

    /// Gradient of an output, given away, so that a sole owner may change it in place.
    pub fn take_grad(&mut self, output: usize) -> Option<Tensor> {
        self.grads.get_mut(output).and_then(Option::take)
    }

    /// True if the gradient of this input is wanted by anybody.
    pub fn needs(&self, input: usize) -> bool {
        self.needs.get(input).copied().unwrap_or(false)
    }

    /// The sum of what other consumers of an input gave so far, given away: who takes it returns the gradient with it
    /// added.
    pub fn take_sum(&mut self, input: usize) -> Option<Tensor> {
        self.sums.get_mut(input).and_then(Option::take)
    }

    /// Where the gradient of an input may be written, if it is wanted in that type, is part of a tensor on a GPU, and
    /// nobody gave one before.
    ///
    /// # Errors
    /// If the GPU is full.
    pub fn place(&mut self, input: usize, dtype: DType) -> Result<Option<Place>> {
        if !self.needs(input) || self.sums.get(input).is_some_and(Option::is_some) {
            return Ok(None);
        }
        match self.parts.get_mut(input).and_then(Option::take) {
            Some((joined, index)) => joined.place(index, dtype),
            None => Ok(None),
        }
    }

    /// The operation's name.
    pub fn op(&self) -> &'static str {
        self.op
    }
}

/// A key of gradients: leaves by number, outputs by node and place.
#[derive(PartialEq, Eq, Hash, Clone, Copy)]
enum Key {
    Leaf(u64),
    Output(u64, usize),
}

fn key(identity: &Identity) -> Key {
    match identity {
        Identity::Leaf(number) => Key::Leaf(*number),
        Identity::Output(node, output) => Key::Output(node.number, *output),
    }
}

/// A node in the queue: the latest operation runs first, so all its consumers have run before it.
struct Latest(Arc<Node>);

impl PartialEq for Latest {
    fn eq(&self, other: &Self) -> bool {
        self.0.number == other.0.number
    }
}
impl Eq for Latest {}
impl PartialOrd for Latest {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Latest {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.number.cmp(&other.0.number)
    }
}

/// Gradients of `Σ_i <roots_i, given_i>` by the `inputs`, in their order; none for an input that no root
/// depends on. A root without a given gradient must have one element, and its gradient is 1. Inputs may be
/// leaves or results of operations (a recurrent state, say).
///
/// # Errors
/// If a root or input tracks no gradient, a given gradient has another shape than its root, part of the
/// graph was differentiated before, or an operation's backward fails.
pub fn backward(
    roots: &[(&Tensor, Option<Tensor>)],
    inputs: &[&Tensor],
) -> Result<Vec<Option<Tensor>>> {
    let mut wanted = HashSet::new();
    let mut input_keys = Vec::with_capacity(inputs.len());
    for (i, input) in inputs.iter().enumerate() {
        let identity = input.identity().ok_or_else(|| {
            Error::Graph(format!("input {i} (shape {}) tracks no gradient", input.shape()))
        })?;
        input_keys.push(key(&identity));
        wanted.insert(key(&identity));
    }

    let mut grads: HashMap<Key, Tensor> = HashMap::new();
    let mut queue = BinaryHeap::new();
    let mut queued = HashSet::new();
    let mut useful = Useful { wanted: &wanted, known: HashMap::new() };
    for (i, (root, given)) in roots.iter().enumerate() {
        let identity = root.identity().ok_or_else(|| {
            Error::Graph(format!("root {i} (shape {}) tracks no gradient", root.shape()))
        })?;
        let grad = match given {
            Some(grad) => {
                grad.expect_shape("backward", &format!("gradient of root {i}"), &root.shape())?;
                grad.detach()
            }
            None if root.elements() == 1 => {
                let one = match root.dtype() {
                    DType::F64 => Tensor::filled(1f64, root.shape()),
                    _ => Tensor::filled(1f32, root.shape()),
                };
                one.to(root.device())?
            }
            None => {
                return Err(root.shape_error(
                    "backward",
                    &format!("root {i}"),
                    "one element, or a given gradient",
                ));
            }
        };
        add_to(&mut grads, key(&identity), grad)?;
        if let Identity::Output(node, _) = identity
            && useful.reaches(&node)
            && queued.insert(node.number)
        {
            queue.push(Latest(node));
        }
    }

    let mut found: HashMap<Key, Tensor> = HashMap::new();
    super::no_grad(|| -> Result<()> {
        while let Some(Latest(node)) = queue.pop() {
            let mut outputs = Vec::with_capacity(node.outputs);
            for i in 0..node.outputs {
                let key = Key::Output(node.number, i);
                let grad = grads.remove(&key);
                if wanted.contains(&key)
                    && let Some(grad) = &grad
                {
                    found.insert(key, grad.clone());
                }
                outputs.push(grad);
            }
            let needs: Vec<bool> = node
                .inputs
                .iter()
                .map(|input| match input {
                    None => false,
                    Some(identity) => {
                        wanted.contains(&key(identity))
                            || matches!(identity, Identity::Output(node, _) if useful.reaches(node))
                    }
                })
                .collect();
            if !needs.contains(&true) || outputs.iter().all(Option::is_none) {
                continue;
            }
            let run = node.run.lock().unwrap_or_else(PoisonError::into_inner).take();
            let run = run.ok_or_else(|| {
                Error::Graph(format!(
                    "{}: this part of the graph was differentiated before",
                    node.op
                ))
            })?;
            let (sums, parts) = before(&node, &needs, &mut grads);
            let mut context = Backward { op: node.op, grads: outputs, needs, sums, parts };
            let input_grads = run(&mut context)?;
            for (identity, sum) in node.inputs.iter().zip(context.sums) {
                if let (Some(identity), Some(sum)) = (identity, sum) {
                    add_to(&mut grads, key(identity), sum)?;
                }
            }
            for ((identity, grad), needed) in
                node.inputs.iter().zip(input_grads).zip(&context.needs)
            {
                let (Some(identity), Some(grad), true) = (identity, grad, *needed) else {
                    continue;
                };
                add_to(&mut grads, key(identity), grad)?;
                if let Identity::Output(node, _) = identity
                    && queued.insert(node.number)
                {
                    queue.push(Latest(node.clone()));
                }
            }
        }
        Ok(())
    })?;
    Ok(input_keys.iter().map(|key| found.get(key).or_else(|| grads.get(key)).cloned()).collect())
}

type Parts = Vec<Option<(Arc<Joined>, usize)>>;

/// What the backward function of a node may build on: the sums of its inputs' gradients so far, taken out of `grads`,
/// and of which tensors they are parts. An input that stands there twice has neither.
fn before(
    node: &Node,
    needs: &[bool],
    grads: &mut HashMap<Key, Tensor>,
) -> (Vec<Option<Tensor>>, Parts) {
    let mut seen = HashSet::new();
    let twice: HashSet<Key> =
        node.inputs.iter().flatten().map(key).filter(|&key| !seen.insert(key)).collect();
    let once = |identity: &&Identity| !twice.contains(&key(identity));
    let wanted = node.inputs.iter().zip(needs);
    wanted
        .map(|(input, needed)| match input.as_ref().filter(once) {
            Some(identity) if *needed => {
                let part = match identity {
                    Identity::Output(from, i) => from.joined.clone().map(|joined| (joined, *i)),
                    Identity::Leaf(_) => None,
                };
                (grads.remove(&key(identity)), part)
            }
            _ => (None, None),
        })
        .unzip()
}

/// Which nodes lead to a wanted gradient.
struct Useful<'a> {
    wanted: &'a HashSet<Key>,
    known: HashMap<u64, bool>,
}

impl Useful<'_> {
    fn reaches(&mut self, node: &Arc<Node>) -> bool {
        let mut stack = vec![(node.clone(), 0usize)];
        while let Some((current, next)) = stack.pop() {
            if self.known.contains_key(&current.number) {
                continue;
            }
            let own =
                (0..current.outputs).any(|i| self.wanted.contains(&Key::Output(current.number, i)));
            if own {
                self.known.insert(current.number, true);
                continue;
            }
            let mut verdict = Some(false);
            let mut position = next;
            while let Some(input) = current.inputs.get(position) {
                match input {
                    Some(Identity::Leaf(number)) if self.wanted.contains(&Key::Leaf(*number)) => {
                        verdict = Some(true);
                        break;
                    }
                    Some(Identity::Output(earlier, _)) => match self.known.get(&earlier.number) {
                        Some(true) => {
                            verdict = Some(true);
                            break;
                        }
                        Some(false) => {}
                        None => {
                            stack.push((current.clone(), position));
                            stack.push((earlier.clone(), 0));
                            verdict = None;
                            break;
                        }
                    },
                    _ => {}
                }
                position += 1;
            }
            if let Some(verdict) = verdict {
                self.known.insert(current.number, verdict);
            }
        }
        self.known.get(&node.number).copied().unwrap_or(false)
    }
}

fn add_to(grads: &mut HashMap<Key, Tensor>, key: Key, grad: Tensor) -> Result<()> {
    match grads.remove(&key) {
        None => {
            grads.insert(key, grad);
        }
        Some(mut sum) => {
            accumulate(&mut sum, &grad)?;
            grads.insert(key, sum);
        }
    }
    Ok(())
}

/// `sum += term` in place, element by element: the sum's storage is changed if nobody shares it. Types are f32 or f64,
/// on a GPU f32 or bf16.
///
/// # Errors
/// If the shapes, types or devices differ, or the type is another.
pub fn accumulate(sum: &mut Tensor, term: &Tensor) -> Result<()> {
    fn add<T: crate::Element + std::ops::AddAssign>(sum: &mut Tensor, term: &Tensor) -> Result<()> {
        const BLOCK: usize = 1 << 15;
        let term = term.detach().contiguous()?;
        let term = term.data::<T>()?;
        let to = sum.data_mut::<T>()?;
        let add = |(to, from): (&mut [T], &[T])| {
            for (to, from) in to.iter_mut().zip(from) {
                *to += *from;
            }
        };
        if to.len() <= BLOCK {
            add((to, term));
        } else {
            to.par_chunks_mut(BLOCK).zip(term.par_chunks(BLOCK)).for_each(add);
        }
        Ok(())
    }
    term.expect_shape("accumulate", "term", &sum.shape())?;
    term.expect_device("accumulate", "term", sum.device())?;
    if sum.gpu().is_some() {
        return sum.add_on_gpu(term);
    }
    term.expect_dtype("accumulate", "term", sum.dtype())?;
    match sum.dtype() {
        DType::F32 => add::<f32>(sum, term),
        DType::F64 => add::<f64>(sum, term),
        _ => Err(sum.unsupported("accumulate")),
    }
}
