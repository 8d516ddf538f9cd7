//! Reverse-mode differentiation, define by run.
//!
//! An operation computes its outputs and hands them to [`record`] with its inputs and a closure that makes
//! the backward function. The closure runs only if some input tracks gradients and recording is on, so an
//! operation saves nothing in inference. What it saves it names: a [`Saved`] holds a tensor's values (never
//! its graph, so saving an own output makes no cycle), or, for a tensor made under [`rematerialize`] or
//! [`with_recipe`], the recipe that makes it again. A graph is used once: [`backward`] frees each node's saved tensors as soon as
//! the node has run. Gradients are f32 (f64 for f64), whatever the type of the values.

mod backward;
mod checkpoint;
mod joined;
mod saved;

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

pub use backward::{Backward, accumulate, backward};
pub use checkpoint::checkpoint;
pub(crate) use joined::Joined;
pub use joined::Place;
pub use saved::{Saved, rematerialize, with_recipe};

use crate::{Result, Tensor};
use saved::Recipe;

type BackwardFn = Box<dyn FnOnce(&mut Backward) -> Result<Vec<Option<Tensor>>> + Send + Sync>;

/// One recorded operation. Later operations have larger numbers, which is all the order that backward needs.
pub(crate) struct Node {
    op: &'static str,
    number: u64,
    outputs: usize,
    inputs: Vec<Option<Identity>>,
    /// The outputs are parts of one tensor, whose gradient they can write in place.
    joined: Option<Arc<Joined>>,
    run: Mutex<Option<BackwardFn>>,
}

/// What a gradient is kept under: a leaf, or an output of a node.
#[derive(Clone)]
pub(crate) enum Identity {
    Leaf(u64),
    Output(Arc<Node>, usize),
}

/// A tensor's place in the graph.
pub(crate) struct Meta {
    identity: Identity,
    recipe: Option<(Arc<Recipe>, usize)>,
}

impl Meta {
    pub(crate) fn leaf() -> Arc<Self> {
        Arc::new(Self { identity: Identity::Leaf(next_number()), recipe: None })
    }

    pub(crate) fn identity(&self) -> Identity {
        self.identity.clone()
    }

    pub(crate) fn node(&self) -> Option<&Arc<Node>> {
        match &self.identity {
            Identity::Leaf(_) => None,
            Identity::Output(node, _) => Some(node),
        }
    }
}

impl Drop for Node {
    /// Unlinks a chain of nodes one by one: a recursive drop of a long chain would overflow the stack.
    fn drop(&mut self) {
        let mut pending: Vec<Option<Identity>> = std::mem::take(&mut self.inputs);
        while let Some(input) = pending.pop() {
            if let Some(Identity::Output(node, _)) = input
                && let Some(mut node) = Arc::into_inner(node)
            {
                pending.append(&mut node.inputs);
            }
        }
    }
}

fn next_number() -> u64 {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    NUMBER.fetch_add(1, Ordering::Relaxed)
}

thread_local! {
    static RECORDING: Cell<bool> = const { Cell::new(true) };
}

struct Restore(bool);

impl Drop for Restore {
    fn drop(&mut self) {
        RECORDING.set(self.0);
    }
}

/// Runs `f` without recording: its results track no gradient and save nothing. On this thread only.
pub fn no_grad<R>(f: impl FnOnce() -> R) -> R {
    let _restore = Restore(RECORDING.replace(false));
    f()
}

/// Runs `f` with recording on, also inside [`no_grad`].
pub(crate) fn with_grad<R>(f: impl FnOnce() -> R) -> R {
    let _restore = Restore(RECORDING.replace(true));
    f()
}

/// True if an operation on these inputs would be recorded.
pub fn is_recording(inputs: &[&Tensor]) -> bool {
    RECORDING.get() && inputs.iter().any(|tensor| tensor.tracks_grad())
}

/// Records an operation, if any input tracks gradients.
///
/// `prepare` saves what backward needs ([`Saved`]) and returns the backward function: given the gradients of
/// the outputs ([`Backward::grad`]; none for an output that nothing used), it returns one gradient per input,
/// or none where there is none or [`Backward::needs`] says that nobody wants it.
pub fn record<P, B>(
    op: &'static str,
    inputs: &[&Tensor],
    outputs: Vec<Tensor>,
    prepare: P,
) -> Vec<Tensor>
where
    P: FnOnce() -> B,
    B: FnOnce(&mut Backward) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
{
    record_joined(op, inputs, outputs, None, prepare)
}

/// [`record`] for an operation whose outputs are parts of one tensor.
pub(crate) fn record_joined<P, B>(
    op: &'static str,
    inputs: &[&Tensor],
    mut outputs: Vec<Tensor>,
    joined: Option<Arc<Joined>>,
    prepare: P,
) -> Vec<Tensor>
where
    P: FnOnce() -> B,
    B: FnOnce(&mut Backward) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
{
    if !is_recording(inputs) {
        return outputs;
    }
    let node = Arc::new(Node {
        op,
        number: next_number(),
        outputs: outputs.len(),
        inputs: inputs.iter().map(|tensor| tensor.identity()).collect(),
        joined,
        run: Mutex::new(Some(Box::new(prepare()))),
    });
    for (i, output) in outputs.iter_mut().enumerate() {
        if output.dtype().is_float() {
            let identity = Identity::Output(node.clone(), i);
            output.meta = Some(Arc::new(Meta { identity, recipe: None }));
        }
    }
    outputs
}

/// [`record`] for an operation with one output.
pub fn record_one<P, B>(op: &'static str, inputs: &[&Tensor], output: Tensor, prepare: P) -> Tensor
where
    P: FnOnce() -> B,
    B: FnOnce(&mut Backward) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
{
    record(op, inputs, vec![output], prepare).swap_remove(0)
}
