//! Decode steps on a GPU, recorded once for a number of sequences, and the state that they change in place; with or without
//! the choice of the next tokens.

use std::collections::HashMap;

use elapid_models::{LayerState as NamedState, State};
use elapid_ops::decode_step::{LayerState, Sampling, Sizes, Step, Weights};
use elapid_tensor::cuda::{DeviceBuffer, Gpu, Graph};
use elapid_tensor::{DType, Tensor};

use super::choosing::Choosing;
use crate::Result;

const CONV_STATE: &str = "conv_state";
const SSM_STATE: &str = "ssm_state";

/// Columns of a step for a number of sequences: few sizes, so that few steps are recorded.
pub(super) fn columns_for(sequences: usize) -> usize {
    if sequences <= 8 { sequences.next_power_of_two() } else { sequences.next_multiple_of(8) }
}

/// What steps of some slots keep in the memory of a GPU.
pub(super) struct Steps {
    gpu: Gpu,
    slots: usize,
    step: Step,
    ids: DeviceBuffer<u32>,
    /// The slot of each column.
    columns: DeviceBuffer<i32>,
    layers: Vec<LayerState>,
    positions: Vec<u64>,
    /// By the number of columns and whether tokens are chosen: none after a first such step, which compiles kernels.
    recorded: HashMap<(usize, bool), Option<Graph>>,
    placed: Placed,
    /// From the first step on that chooses tokens.
    choosing: Option<Choosing>,
}

/// What the ids and slots of the first columns are on the card; empty if only the card knows.
#[derive(Default)]
struct Placed {
    ids: Vec<u32>,
    slots: Vec<i32>,
}

impl Steps {
    pub(super) fn new(gpu: &Gpu, sizes: &Sizes, slots: usize, layers: usize) -> Result<Self> {
        let capacity = columns_for(slots);
        Ok(Self {
            gpu: gpu.clone(),
            slots,
            step: Step::new(gpu, sizes, capacity)?,
            ids: gpu.zeros(capacity)?,
            columns: gpu.zeros(capacity)?,
            layers: (0..layers)
                .map(|_| LayerState::fresh(gpu, sizes, slots))
                .collect::<elapid_tensor::Result<_>>()?,
            positions: vec![0; slots],
            recorded: HashMap::new(),
            placed: Placed::default(),
            choosing: None,
        })
    }

    pub(super) fn fits(&self, slots: usize) -> bool {
        self.slots == slots
    }

    /// Makes `state` the one that steps go on from.
    pub(super) fn adopt(&mut self, mut state: State, sizes: &Sizes) -> Result<()> {
        let pairs = || {
            self.layers
                .iter()
                .zip(&state.layers)
                .map(|(own, given)| (own, given.get(CONV_STATE), given.get(SSM_STATE)))
        };
        // Held by this and by the caller's value alone, which ends here.
        let same = |own: &Tensor, given: Option<&Tensor>| {
            given.is_some_and(|given| own.is_same(given) && own.holders() == 2)
        };
        let ours = pairs().all(|(own, tail, h)| same(&own.tail, tail) && same(&own.state, h));
        self.positions.clone_from(&state.positions);
        if ours {
            return Ok(());
        }
        // Somebody else's values stay what they are; recorded steps know the addresses of the old ones.
        let shared =
            self.layers.iter().any(|own| own.tail.holders() > 1 || own.state.holders() > 1);
        if shared {
            self.recorded.clear();
        }
        let free = state
            .layers
            .iter()
            .flat_map(|layer| layer.iter())
            .all(|(_, given)| given.holders() == 1 && given.is_contiguous());
        if free && self.recorded.values().all(Option::is_none) {
            for (own, given) in self.layers.iter_mut().zip(&mut state.layers) {
                own.tail = given.take(CONV_STATE)?;
                own.state = given.take(SSM_STATE)?.cast(sizes.state)?;
            }
            return Ok(());
        }
        if shared {
            for own in &mut self.layers {
                *own = LayerState::fresh(&self.gpu, sizes, self.slots)?;
            }
        }
        for (own, given) in self.layers.iter_mut().zip(&state.layers) {
            let tensors = [(&mut own.tail, CONV_STATE), (&mut own.state, SSM_STATE)];
            for (own, name) in tensors {
                if let Some(given) = given.get(name) {
                    own.overwrite(&given.cast(own.dtype())?)?;
                }
            }
        }
        Ok(())
    }

    /// A token id and a slot for each of the first columns; the others have no sequence.
    pub(super) fn set(&mut self, ids: &[u32], slots: &[usize], columns: usize) -> Result<()> {
        let mut table: Vec<i32> = slots.iter().map(|&slot| slot as i32).collect();
        table.resize(columns, -1);
        if self.placed.ids != ids {
            self.ids.write_first(ids)?;
            ids.clone_into(&mut self.placed.ids);
        }
        if self.placed.slots != table {
            self.columns.write_first(&table)?;
            self.placed.slots = table;
        }
        Ok(())
    }

    /// What the columns hold is not known from here on.
    pub(super) fn forget(&mut self) {
        self.placed = Placed::default();
    }

    /// What chooses tokens of the slots among so many.
    pub(super) fn choosing(&mut self, classes: usize) -> Result<&mut Choosing> {
        let choosing = match self.choosing.take() {
            Some(choosing) => choosing,
            None => Choosing::new(&self.gpu, classes, self.slots)?,
        };
        Ok(self.choosing.insert(choosing))
    }

    /// Takes the sequence out of a column.
    pub(super) fn leave(&mut self, column: usize) -> Result<()> {
        Ok(self.columns.write_at(column, &[-1])?)
    }

    /// Launches a step of the columns that were set.
    pub(super) fn launch(&self, weights: &Weights, columns: usize) -> Result<()> {
        // SAFETY: the slots of a batch's sequences are below its number of slots and differ, and `adopt` made sure that
        // nobody relies on the values of these states.
        unsafe { self.step.run(weights, &self.layers, &self.ids, &self.columns, columns)? };
        Ok(())
    }

    /// Launches the choice of the next tokens, which the next step reads.
    pub(super) fn choose(&self, sampler: &Sampling, columns: usize) -> Result<()> {
        // SAFETY: the sampler was made for the slots of this value's states, of which the columns have different ones.
        unsafe { sampler.run(&self.step, &self.ids, &self.columns, columns)? };
        Ok(())
    }

    /// What the last step, which has ended, has chosen for the columns from `first` on, whose slots these are.
    pub(super) fn chosen(&mut self, first: usize, slots: &[usize]) -> Vec<Result<u32>> {
        let Some(choosing) = &mut self.choosing else { return Vec::new() };
        let tokens: Vec<Result<u32>> = slots.iter().map(|&slot| choosing.take(slot)).collect();
        for (column, token) in (first..).zip(&tokens) {
            match token {
                Ok(token) => self.placed.ids[column] = *token,
                // The card takes a sequence that fails out of its column.
                Err(_) => self.placed.slots[column] = -1,
            }
        }
        tokens
    }

    /// The state after steps that the card counted, in f32.
    pub(super) fn finish(&mut self, positions: Vec<u64>) -> Result<State> {
        self.positions = positions;
        Ok(self.state().cast(DType::F32)?)
    }

    /// Carries out a step: a token id and a slot for each column; with `choose`, and the choice of the next tokens of those
    /// slots that want it.
    pub(super) fn step(
        &mut self,
        weights: &Weights,
        ids: &[u32],
        slots: &[usize],
        choose: bool,
    ) -> Result<()> {
        let columns = columns_for(ids.len());
        self.set(ids, slots, columns)?;
        let run = || -> Result<()> {
            self.launch(weights, columns)?;
            match self.choosing.as_ref().filter(|_| choose) {
                Some(choosing) => self.choose(&choosing.sampler, columns),
                None => Ok(()),
            }
        };
        let kind = (columns, choose);
        match self.recorded.get(&kind) {
            None => {
                run()?;
                self.recorded.insert(kind, None);
            }
            Some(None) => {
                let ((), graph) = self.gpu.record(run)?;
                // SAFETY: buffers and weights are where they were for as long as this value and the engine live.
                unsafe { graph.launch()? };
                self.recorded.insert(kind, Some(graph));
            }
            // SAFETY: as above.
            Some(Some(graph)) => unsafe { graph.launch()? },
        }
        for &slot in slots {
            self.positions[slot] += 1;
        }
        Ok(())
    }

    /// Logits of the last step's first columns [columns, V], when it is done.
    pub(super) fn logits(&self, columns: usize) -> Result<Vec<f32>> {
        let classes = self.step.logits().len() / self.step.capacity();
        let mut values = vec![0.0; columns * classes];
        self.step.logits().read_first(&mut values)?;
        Ok(values)
    }

    /// The state after the last step, as steps keep it.
    pub(super) fn state(&self) -> State {
        let layers = self.layers.iter().map(|own| {
            let tensors = [(CONV_STATE, own.tail.clone()), (SSM_STATE, own.state.clone())];
            NamedState::new(tensors.map(|(name, tensor)| (name.into(), tensor)))
        });
        State { layers: layers.collect(), positions: self.positions.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use elapid_tensor::Device;

    #[test]
    fn a_state_that_nobody_else_holds_is_taken_over_where_it_is() {
        let gpu = match Gpu::emulated() {
            Ok(gpu) => gpu,
            Err(error) => {
                eprintln!("SKIPPED: states that are taken over, on the emulation: {error}");
                return;
            }
        };
        let sizes = Sizes {
            width: 16,
            inner: 32,
            states: 4,
            rank: 1,
            taps: 3,
            classes: 8,
            centred: false,
            eps: 1e-5,
            selection_eps: None,
            state: DType::F32,
        };
        let state = |value: f32| {
            let filled =
                |last| Tensor::filled(value, [2, 32, last]).to(Device::Cuda(gpu.id())).unwrap();
            let own = || [(CONV_STATE.into(), filled(2)), (SSM_STATE.into(), filled(4))];
            State {
                layers: (0..2).map(|_| NamedState::new(own())).collect(),
                positions: vec![7; 2],
            }
        };
        let places = |state: &State| -> Vec<u64> {
            let tensors = state.layers.iter().flat_map(|layer| layer.iter());
            tensors.map(|(_, t)| t.device_slice::<f32>().unwrap().address()).collect()
        };
        let values = |state: &State| -> Vec<f32> {
            let tensors = state.layers.iter().flat_map(|layer| layer.iter());
            tensors.flat_map(|(_, tensor)| tensor.to_vec::<f32>().unwrap()).collect()
        };
        let mut steps = Steps::new(&gpu, &sizes, 2, 2).unwrap();
        let given = state(1.0);
        let given_places = places(&given);
        steps.adopt(given, &sizes).unwrap();
        assert_eq!(places(&steps.state()), given_places);
        assert!(values(&steps.state()).iter().all(|&value| value == 1.0));
        // One that is kept stays what it is, and so does what others took from the steps.
        let (kept, taken) = (state(2.0), steps.state());
        steps.adopt(kept.clone(), &sizes).unwrap();
        let own = steps.state();
        let apart = |a: &State, b: &State| places(a).iter().all(|place| !places(b).contains(place));
        assert!(apart(&own, &kept) && apart(&own, &taken));
        assert!(values(&own).iter().all(|&value| value == 2.0));
        assert!(values(&taken).iter().all(|&value| value == 1.0));
        assert_eq!(own.positions, [7, 7]);
        // Recorded steps know where their state is.
        drop((own, taken, kept));
        let before = places(&steps.state());
        let ((), graph) = gpu.record(|| Ok::<_, crate::Error>(())).unwrap();
        steps.recorded.insert((2, false), Some(graph));
        steps.adopt(state(3.0), &sizes).unwrap();
        assert_eq!(places(&steps.state()), before);
        assert!(values(&steps.state()).iter().all(|&value| value == 3.0));
    }
}
