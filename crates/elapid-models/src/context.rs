//! What a forward pass carries beside its tensors.

use elapid_tensor::{DType, Tensor};

/// Receives activations by name.
pub type Tap<'a> = dyn FnMut(&str, &Tensor) + 'a;

/// Training or inference, and who listens to activations.
pub struct Context<'a> {
    prefix: String,
    tap: Option<&'a mut Tap<'a>>,
    compute: DType,
    recompute: bool,
}

impl Default for Context<'_> {
    fn default() -> Self {
        Self { prefix: String::new(), tap: None, compute: DType::F32, recompute: true }
    }
}

impl<'a> Context<'a> {
    /// A context in which nobody listens.
    pub fn new() -> Self {
        Self::default()
    }

    /// A context that shows every tapped activation to `tap`. Tensors keep their place in the graph.
    pub fn tapped(tap: &'a mut Tap<'a>) -> Self {
        Self { tap: Some(tap), ..Self::default() }
    }

    /// The type that mixers compute in: f32, or on a GPU bf16. The residual stream, norms, scans and losses are f32.
    pub fn compute(&self) -> DType {
        self.compute
    }

    /// Whether backward makes cheap activations again or keeps them (Mamba, section 3.3.2).
    pub fn recompute(&self) -> bool {
        self.recompute
    }

    pub(crate) fn set_compute(&mut self, dtype: DType, recompute: bool) {
        self.compute = dtype;
        self.recompute = recompute;
    }

    /// Shows an activation, under the names of the modules around it.
    pub fn tap(&mut self, name: &str, tensor: &Tensor) {
        if let Some(tap) = &mut self.tap {
            tap(&format!("{}{name}", self.prefix), tensor);
        }
    }

    /// Runs `f` inside a module: names are prefixed with `{module}.`.
    pub fn within<R>(&mut self, module: &str, f: impl FnOnce(&mut Self) -> R) -> R {
        if self.tap.is_none() {
            return f(self);
        }
        let outer = self.prefix.len();
        self.prefix.push_str(module);
        self.prefix.push('.');
        let result = f(self);
        self.prefix.truncate(outer);
        result
    }
}
