//! What a forward pass carries beside its tensors.

use elapid_tensor::Tensor;

/// Receives activations by name.
pub type Tap<'a> = dyn FnMut(&str, &Tensor) + 'a;

/// Training or inference, and who listens to activations.
#[derive(Default)]
pub struct Context<'a> {
    prefix: String,
    tap: Option<&'a mut Tap<'a>>,
}

impl<'a> Context<'a> {
    /// A context in which nobody listens.
    pub fn new() -> Self {
        Self::default()
    }

    /// A context that shows every tapped activation to `tap`. Tensors keep their place in the graph.
    pub fn tapped(tap: &'a mut Tap<'a>) -> Self {
        Self { prefix: String::new(), tap: Some(tap) }
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
