//! Recurrent state as a value: named tensors per layer and a position per slot.
//!
//! States are passed by value. A sole owner is updated in place where an operation can; a clone shares
//! storage until one of the two is written.

use std::borrow::Cow;

use elapid_tensor::{DType, Device, Tensor};

use crate::{Error, Result};

/// The state of one mixer: tensors of shape [slots, ...] under their field names
/// (`conv_state` [S,E,W-1], oldest first, and `ssm_state` [S,E,N] for Mamba).
#[derive(Debug, Clone, Default)]
pub struct LayerState {
    tensors: Vec<(Cow<'static, str>, Tensor)>,
}

impl LayerState {
    /// A state of the given named tensors.
    pub fn new(tensors: impl IntoIterator<Item = (Cow<'static, str>, Tensor)>) -> Self {
        Self { tensors: tensors.into_iter().collect() }
    }

    /// The tensors with their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_ref(), tensor))
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.iter().find(|(own, _)| *own == name).map(|(_, tensor)| tensor)
    }

    /// Takes the tensor of that name out.
    ///
    /// # Errors
    /// If there is none.
    pub fn take(&mut self, name: &str) -> Result<Tensor> {
        match self.tensors.iter().position(|(own, _)| own == name) {
            Some(index) => Ok(self.tensors.swap_remove(index).1),
            None => {
                let have: Vec<&str> = self.iter().map(|(name, _)| name).collect();
                Err(Error::State(format!("no {name:?} among {have:?}")))
            }
        }
    }

    fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let tensors = self
            .tensors
            .iter()
            .map(|(name, tensor)| Ok((name.clone(), f(tensor)?)))
            .collect::<Result<_>>()?;
        Ok(Self { tensors })
    }
}

/// The state of a model for some number of slots (sequences that can go on).
#[derive(Debug, Clone, Default)]
pub struct State {
    /// One per layer.
    pub layers: Vec<LayerState>,
    /// Tokens that each slot has seen.
    pub positions: Vec<u64>,
}

impl State {
    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.positions.len()
    }

    /// The same values without gradients.
    pub fn detach(&self) -> Self {
        Self {
            layers: self
                .layers
                .iter()
                .map(|layer| LayerState {
                    tensors: layer
                        .tensors
                        .iter()
                        .map(|(name, tensor)| (name.clone(), tensor.detach()))
                        .collect(),
                })
                .collect(),
            positions: self.positions.clone(),
        }
    }

    /// The state on a device; what is there already is moved, not copied, so that a sole owner stays one.
    ///
    /// # Errors
    /// If the device cannot be used or is full.
    pub fn to(mut self, device: Device) -> Result<Self> {
        for (_, tensor) in self.layers.iter_mut().flat_map(|layer| &mut layer.tensors) {
            if tensor.device() != device {
                *tensor = tensor.to(device)?;
            }
        }
        Ok(self)
    }

    /// The state in a type; what has it already is moved, not copied.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn cast(mut self, dtype: DType) -> Result<Self> {
        for (_, tensor) in self.layers.iter_mut().flat_map(|layer| &mut layer.tensors) {
            if tensor.dtype() != dtype {
                *tensor = tensor.cast(dtype)?;
            }
        }
        Ok(self)
    }

    /// Takes over the values of another state in place, where the tensors are. Recorded GPU work does this at its end,
    /// so that the next launch finds its state where the last one left it.
    ///
    /// # Errors
    /// If the other has other layers, names, shapes or devices, or somebody shares this state's tensors.
    pub fn overwrite(&mut self, values: &State) -> Result<()> {
        for (index, layer) in self.layers.iter_mut().enumerate() {
            for (name, tensor) in &mut layer.tensors {
                let other = values.layers.get(index).and_then(|layer| layer.get(name));
                let Some(other) = other else {
                    return Err(Error::State(format!("layer {index} lacks {name:?}")));
                };
                tensor.overwrite(other)?;
            }
        }
        self.positions.clone_from(&values.positions);
        Ok(())
    }

    /// Puts the only slot of another state of this model into a slot of this one; the others stay where they are.
    ///
    /// # Errors
    /// If there is no such slot, or the other has more slots, or other layers, names or shapes.
    pub fn set_slot(&mut self, slot: usize, from: &State) -> Result<()> {
        if slot >= self.slots() || from.slots() != 1 {
            let message = format!("slot {slot} of {} from {} slots", self.slots(), from.slots());
            return Err(Error::State(message));
        }
        for (index, layer) in self.layers.iter_mut().enumerate() {
            for (name, tensor) in &mut layer.tensors {
                let other = from.layers.get(index).and_then(|layer| layer.get(name));
                let Some(other) = other else {
                    return Err(Error::State(format!("layer {index} lacks {name:?}")));
                };
                tensor.overwrite_rows(slot, &other.to(tensor.device())?)?;
            }
        }
        self.positions[slot] = from.positions[0];
        Ok(())
    }

    /// A state whose slot `i` is this one's slot `slots[i]`: forks, reorders and selects.
    ///
    /// # Errors
    /// If a slot does not exist.
    pub fn select(&self, slots: &[usize]) -> Result<Self> {
        if let Some(&slot) = slots.iter().find(|&&slot| slot >= self.slots()) {
            return Err(Error::State(format!("slot {slot} of {}", self.slots())));
        }
        let rows = |tensor: &Tensor| -> Result<Tensor> {
            let parts = slots
                .iter()
                .map(|&slot| tensor.narrow(0, slot, 1))
                .collect::<Result<Vec<_>, _>>()?;
            if parts.is_empty() {
                return Ok(tensor.narrow(0, 0, 0)?);
            }
            Ok(Tensor::concat(&parts.iter().collect::<Vec<_>>(), 0)?)
        };
        Ok(Self {
            layers: self.layers.iter().map(|layer| layer.map(rows)).collect::<Result<_>>()?,
            positions: slots.iter().map(|&slot| self.positions[slot]).collect(),
        })
    }

    /// The slots of several states of one model, in order.
    ///
    /// # Errors
    /// If there is none, or they differ in layers, names or shapes.
    pub fn join(states: &[&State]) -> Result<Self> {
        let Some(first) = states.first() else {
            return Err(Error::State("nothing to join".into()));
        };
        let mut layers = Vec::with_capacity(first.layers.len());
        for (index, layer) in first.layers.iter().enumerate() {
            let mut tensors = Vec::with_capacity(layer.tensors.len());
            for (name, _) in &layer.tensors {
                let parts = states
                    .iter()
                    .map(|state| {
                        state.layers.get(index).and_then(|layer| layer.get(name)).ok_or_else(|| {
                            Error::State(format!(
                                "layer {index} lacks {name:?} in one of the states"
                            ))
                        })
                    })
                    .collect::<Result<Vec<_>>>()?;
                tensors.push((name.clone(), Tensor::concat(&parts, 0)?));
            }
            layers.push(LayerState { tensors });
        }
        let positions = states.iter().flat_map(|state| state.positions.iter().copied()).collect();
        Ok(Self { layers, positions })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use elapid_tensor::cuda::Gpu;

    fn state(slots: usize, first: f32) -> State {
        let values: Vec<f32> = (0..slots * 6).map(|i| first + i as f32).collect();
        let tensor = Tensor::from_slice(&values, [slots, 2, 3]).unwrap();
        let layer = LayerState::new([("ssm_state".into(), tensor)]);
        State { layers: vec![layer], positions: vec![first as u64; slots] }
    }

    #[test]
    fn a_slot_is_set_and_the_others_stay() {
        let mut devices = vec![Device::Cpu];
        match Gpu::emulated() {
            Ok(gpu) => devices.push(Device::Cuda(gpu.id())),
            Err(error) => eprintln!("SKIPPED: states on the emulation: {error}"),
        }
        for device in devices {
            let mut all = state(3, 0.0).to(device).unwrap();
            let shared = all.clone();
            all.set_slot(1, &state(1, 100.0)).unwrap();
            let values = all.layers[0].get("ssm_state").unwrap().to_vec::<f32>().unwrap();
            let expected: Vec<f32> = (0..18u8)
                .map(|i| f32::from(if (6..12).contains(&i) { i + 94 } else { i }))
                .collect();
            assert_eq!(values, expected);
            assert_eq!(all.positions, [0, 100, 0]);
            // Who shared the tensors keeps the old values.
            let values = shared.layers[0].get("ssm_state").unwrap().to_vec::<f32>().unwrap();
            assert_eq!(values, (0..18u8).map(f32::from).collect::<Vec<_>>());
            assert!(all.set_slot(3, &state(1, 0.0)).is_err());
            assert!(all.set_slot(0, &state(2, 0.0)).is_err());
        }
    }
}
