//! The check of an engine over a model on disk: every weight is read once, which finds those that are no numbers; then one
//! token goes through every layer and the head, whose activations are compared with the f64 reference.
//!
//! The token goes on from a made-up state, so that every tap and every state takes part. It runs stage by stage through the
//! code of all decode steps, but only in the rows and channels that are looked at, and what they neighbour in a kernel; the
//! other activations are made up too, as each stage is compared on the inputs that it had. That converted weights stand for
//! what the file has, and that several tokens give the bits of one, is looked at for some rows.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use elapid_formats::{ModelSource, StoredTensor};
use elapid_ops::blocks::{Encoding, dequantize};
use elapid_ops::mamba_step::{Stretch, TILE};
use elapid_ops::quantized_linear::{FEW_TOKENS, Output, Storage, Writer, product};
use elapid_tensor::DType;

use super::CpuEngine;
use super::pool::alone;
use super::step::{LayerPlace, Scratch, Stage, Tokens};
use super::weights::{Matrix, Progress, Weights};
use crate::self_check::reference::{Parameters, Reference};
use crate::{Checked, Error, Result, Rows, Trace};

/// Tokens whose product is compared with that of one: more than are read row by row in any encoding.
const TOKENS: usize = FEW_TOKENS + 1;
/// Rows of that comparison.
const GROUP: usize = 8;

impl CpuEngine {
    /// Reads every weight.
    ///
    /// # Errors
    /// With the first that is not finite.
    pub(super) fn check_finite(&mut self, progress: &mut Progress<'_>) -> Result<()> {
        let all = self.weights.matrices().map(|matrix| matrix.size() as u64).sum();
        let mut done = 0;
        for matrix in self.weights.matrices().filter(|matrix| !matrix.finite) {
            matrix.check_finite(&mut self.pool)?;
            done += matrix.size() as u64;
            progress(done, all);
        }
        Ok(())
    }

    /// Reads every weight, runs a token, and compares what it gave with the reference, whose small parameters come from the
    /// file and whose large ones are the engine's own.
    ///
    /// # Errors
    /// [`Error::Weight`] with the first weight that is not finite, [`Error::SelfCheck`] with the first that is wrong.
    pub(super) fn check(
        &mut self,
        source: &ModelSource,
        rows: Rows,
        progress: &mut Progress<'_>,
    ) -> Result<Checked> {
        self.check_finite(progress)?;
        let token = u32::try_from(self.config.vocab_size.saturating_sub(1) / 2).unwrap_or(0);
        let trace = self.pass(token, rows);
        let parameters = EngineParameters::new(&self.weights, source);
        let mut reference = Reference::new(&self.config, &parameters, &trace, DType::F32, rows);
        reference.run(&[token])?;
        let mut checked = reference.checked;
        parameters.release();
        // Kernels are the same for all matrices of a type and width; that each was converted right shows in fewer rows.
        let mut kinds = HashSet::new();
        let of_each = match rows {
            Rows::Sampled(rows) => Rows::Sampled(rows.div_ceil(4)),
            Rows::All => Rows::All,
        };
        for (index, matrix) in self.weights.matrices().enumerate() {
            let is_new = kinds.insert((matrix.encoding, matrix.columns));
            if is_new || rows == Rows::All {
                checked.values += many_as_one(matrix, rows)?;
            }
            if matrix.finite
                && let Some(tensor) = source.get(&matrix.name)
            {
                checked.values += converted(matrix, tensor, &of_each.of(matrix.rows, index))?;
            }
        }
        Ok(checked)
    }

    /// Activations of the token: of each stage those that `rows` says, the others made up.
    fn pass(&self, token: u32, rows: Rows) -> Trace {
        let (sizes, weights, mut trace) = (self.sizes(), &self.weights, Trace::new());
        let (history, e) = (self.config.d_conv - 1, sizes.e);
        let mut scratch = Scratch::new(1, 1, sizes, weights);
        let stretches = [Stretch { start: 0, len: 1, slot: 0, fresh: false }];
        // States of a tile of channels, which those of all repeat.
        let (tile_conv, tile_ssm) =
            (made_up(TILE * history, 0.5), made_up(TILE * sizes.states, 0.1));
        let repeated = |tile: &[f32], each: usize| -> Vec<f32> {
            tile.iter().copied().cycle().take(e * each).collect()
        };
        let mut conv = repeated(&tile_conv, history);
        let mut ssm = repeated(&tile_ssm, sizes.states);
        let others = made_up(scratch.x.len().max(sizes.d).max(sizes.projected), 1.0);
        let fill = |values: &mut [f32]| values.copy_from_slice(&others[..values.len()]);
        let ids = [token];
        for (index, layer) in weights.layers.iter().enumerate() {
            let prefix = format!("backbone.layers.{index}");
            let mut note = |name: &str, parts: &[&[f32]]| {
                let values = parts.iter().flat_map(|part| part.iter().map(|&v| f64::from(v)));
                trace.insert(format!("{prefix}.{name}"), values.collect());
            };
            note("mixer.conv_state", &[&tile_conv]);
            note("mixer.ssm_state", &[&tile_ssm]);
            let place = LayerPlace { conv: conv.as_mut_ptr(), ssm: ssm.as_mut_ptr() };
            let ids = (index == 0).then_some(ids.as_slice());
            let tokens = Tokens { ids, count: 1, stretches: &stretches };
            let channels = units(rows.of(e, index), TILE, e);
            for stage in Stage::ALL {
                match stage {
                    Stage::InProj => {
                        fill(&mut scratch.x);
                        fill(&mut scratch.z);
                    }
                    Stage::XProj => fill(&mut scratch.projected),
                    Stage::OutProj => fill(&mut scratch.out),
                    _ => {}
                }
                let parts = match stage {
                    Stage::Norm | Stage::PartNorms => Vec::new(),
                    Stage::Convolution | Stage::Scan => channels.clone(),
                    // Rows of z behind those of x.
                    Stage::InProj => {
                        let (x, z): (Vec<usize>, Vec<usize>) =
                            rows.of(2 * e, index).into_iter().partition(|&row| row < e);
                        let z = z.into_iter().map(|row| row - e).collect();
                        let z = units(z, GROUP, e).into_iter().map(|z| e + z.start..e + z.end);
                        units(x, GROUP, e).into_iter().chain(z).collect()
                    }
                    Stage::XProj => units(rows.of(sizes.projected, index), GROUP, sizes.projected),
                    Stage::OutProj => units(rows.of(sizes.d, index), GROUP, sizes.d),
                };
                let frame = scratch.frame(weights, sizes);
                alone(|member| {
                    // SAFETY: this thread alone has scratch and states, which have room for a token; that is a row of the
                    // embedding.
                    unsafe {
                        match stage {
                            Stage::Norm | Stage::PartNorms => {
                                frame.stage(stage, member, layer, tokens, place);
                            }
                            Stage::XProj => frame.round(member, &layer.x_proj, 1),
                            Stage::OutProj => frame.round(member, &layer.out_proj, 1),
                            Stage::InProj | Stage::Convolution | Stage::Scan => {}
                        }
                        for part in parts {
                            frame.part(stage, layer, tokens, part, place);
                        }
                    }
                });
                let (x, z) = (&scratch.x[..e], &scratch.z[..e]);
                match stage {
                    Stage::Norm => {
                        note("residual", &[&scratch.residual]);
                        note("norm", &[&scratch.normed]);
                    }
                    Stage::InProj => note("mixer.in_proj", &[x, z]),
                    Stage::Convolution => note("mixer.conv1d", &[x]),
                    Stage::XProj => note("mixer.x_proj", &[&scratch.projected]),
                    Stage::PartNorms => {}
                    Stage::Scan => note("mixer.scan", &[x]),
                    Stage::OutProj => note("mixer.out_proj", &[&scratch.out]),
                }
            }
            // The next layer starts from the same state.
            for Range { start, end } in channels {
                let again = |state: &mut [f32], tile: &[f32], each: usize| {
                    let own = &mut state[start * each..end * each];
                    own.copy_from_slice(&tile[..own.len()]);
                };
                again(&mut conv, &tile_conv, history);
                again(&mut ssm, &tile_ssm, sizes.states);
            }
        }
        let frame = scratch.frame(weights, sizes);
        alone(|member| {
            // SAFETY: as above; there is room for the logits of a token.
            unsafe {
                frame.last_norm(member, &[0]);
                for classes in units(rows.of(sizes.vocabulary, 0), GROUP, sizes.vocabulary) {
                    frame.classes(1, classes);
                }
            }
        });
        let wide = |values: &[f32]| values.iter().map(|&value| f64::from(value)).collect();
        trace.insert("backbone.norm_f".into(), wide(&scratch.normed));
        trace.insert("logits".into(), wide(&scratch.logits));
        let first = trace.get("backbone.layers.0.residual").cloned().unwrap_or_default();
        trace.insert("backbone.embeddings".into(), first);
        trace
    }
}

fn made_up(count: usize, size: f32) -> Vec<f32> {
    (0..count).map(|i| ((i * 37 % 101) as f32 / 50.0 - 1.0) * size).collect()
}

/// Whole units of `0..count` in which the sorted rows are.
fn units(rows: Vec<usize>, unit: usize, count: usize) -> Vec<Range<usize>> {
    let mut units: Vec<usize> = rows.into_iter().map(|row| row / unit).collect();
    units.dedup();
    units.into_iter().map(|at| at * unit..count.min((at + 1) * unit)).collect()
}

/// Several tokens that are the same have the bits of one; returns how many values were compared.
fn many_as_one(matrix: &Matrix, rows: Rows) -> Result<usize> {
    let weight = matrix.weight();
    let x: Vec<f32> = (0..matrix.columns).map(|i| (i * 29 % 97) as f32 / 48.0 - 1.0).collect();
    let x = x.repeat(TOKENS);
    let mut storages = [1, TOKENS].map(|t| Storage::new(matrix.encoding, t, matrix.columns));
    let written = storages.each_mut().map(Storage::writer);
    for (writer, tokens) in written.iter().zip([1, TOKENS]) {
        for (token, x) in x.chunks_exact(matrix.columns.max(1)).take(tokens).enumerate() {
            // SAFETY: nobody else uses the storage.
            unsafe { writer.write_row(token, tokens, x) };
        }
    }
    let groups = match rows {
        Rows::All => 0..matrix.rows.div_ceil(GROUP),
        Rows::Sampled(_) => matrix.rows / 2 / GROUP..matrix.rows / 2 / GROUP + 1,
    };
    let mut compared = 0;
    for group in groups {
        let range = group * GROUP..matrix.rows.min((group + 1) * GROUP);
        let run = |writer: &Writer, tokens: usize| {
            let mut y = vec![0.0f32; tokens * range.len()];
            let out = Output { pointer: y.as_mut_ptr(), stride: range.len() };
            // SAFETY: the inputs are written and `y` has every token's rows.
            unsafe {
                let inputs = writer.activations(tokens, &x, matrix.columns);
                product(&weight, &inputs, range.clone(), out);
            }
            y
        };
        let (one, many) = (run(&written[0], 1), run(&written[1], TOKENS));
        for (i, (found, expected)) in many.iter().zip(one.iter().cycle()).enumerate() {
            if found.to_bits() != expected.to_bits() {
                return Err(Error::SelfCheck {
                    tensor: matrix.name.clone(),
                    place: format!("row {} of {TOKENS} tokens", range.start + i % range.len()),
                    expected: f64::from(*expected),
                    found: f64::from(*found),
                });
            }
        }
        compared += many.len();
    }
    Ok(compared)
}

/// Rows that were converted still stand for what the file has; returns how many values were compared.
fn converted(matrix: &Matrix, tensor: &StoredTensor, rows: &[usize]) -> Result<usize> {
    // As a share of the largest value of a row's block of 256: half a step of the coarsest scale in it.
    let step = match matrix.encoding {
        Encoding::F32 => 0.0,
        Encoding::F16 | Encoding::BF16 => 1.0 / 256.0,
        Encoding::Q8_0 => 1.0 / 128.0,
        Encoding::Q6_K => 1.0 / 16.0,
        Encoding::Q4_0 | Encoding::Q4_K => 1.0 / 4.0,
    };
    let width = tensor.encoding.row_bytes(matrix.columns)?;
    let mut read = vec![0.0; matrix.columns];
    for &row in rows {
        dequantize(tensor.encoding, &tensor.bytes[row * width..][..width], &mut read)?;
        let held = matrix.row(row)?;
        for (block, (read, held)) in read.chunks(256).zip(held.chunks(256)).enumerate() {
            let most = step * read.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            for (i, (&expected, &found)) in read.iter().zip(held).enumerate() {
                let near = (expected - found).abs() <= most;
                if !near {
                    return Err(Error::SelfCheck {
                        tensor: matrix.name.clone(),
                        place: format!("row {row}, column {}", block * 256 + i),
                        expected: f64::from(expected),
                        found: f64::from(found),
                    });
                }
            }
        }
    }
    Ok(rows.len() * matrix.columns)
}

/// The engine's own projections and embedding, everything else from the file.
struct EngineParameters<'a> {
    matrices: BTreeMap<&'a str, &'a Matrix>,
    source: &'a ModelSource,
    /// Names of what was read from the file.
    read: Mutex<BTreeSet<String>>,
}

impl<'a> EngineParameters<'a> {
    fn new(weights: &'a Weights, source: &'a ModelSource) -> Self {
        let matrices = weights.matrices().map(|matrix| (matrix.name.as_str(), matrix)).collect();
        Self { matrices, source, read: Mutex::default() }
    }

    /// Gives the memory of what was read from the file back, once: the engine runs on copies of it.
    fn release(self) {
        let read = self.read.into_inner().unwrap_or_else(PoisonError::into_inner);
        for tensor in read.iter().filter_map(|name| self.source.get(name)) {
            tensor.bytes.release();
        }
    }
}

impl Parameters for EngineParameters<'_> {
    fn elements(&self, name: &str) -> Option<usize> {
        self.source.get(name).map(|tensor| tensor.elements())
    }

    fn read(&self, name: &str, range: Range<usize>) -> Result<Cow<'_, [f32]>> {
        if let Some(matrix) = self.matrices.get(name) {
            // The reference takes whole rows.
            let rows = range.start / matrix.columns..range.end.div_ceil(matrix.columns);
            let mut values = Vec::with_capacity(range.len());
            for row in rows {
                values.extend(matrix.row(row)?);
            }
            return Ok(Cow::Owned(values));
        }
        let Some(tensor) = self.source.get(name) else { return Ok(Cow::Owned(Vec::new())) };
        let values = tensor.read_part(range)?;
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if !read.contains(name) {
            read.insert(name.to_owned());
        }
        Ok(Cow::Owned(values))
    }

    fn encoding(&self, name: &str) -> Encoding {
        self.matrices.get(name).map_or(Encoding::F32, |matrix| matrix.encoding)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::{Loading, pool};
    use super::*;

    fn golden(model: &str) -> ModelSource {
        let folder = "../elapid-formats/tests/fixtures/golden";
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
        ModelSource::open(&folder.join(model).join("hf")).unwrap()
    }

    fn load(source: &ModelSource, encoding: Option<Encoding>, rows: Rows) -> (CpuEngine, Checked) {
        let progress = &mut |_, _| {};
        let loading = Loading { encoding, threads: 2, check: Some(rows), progress };
        CpuEngine::load(source, loading).unwrap()
    }

    #[test]
    fn sound_engines_pass_in_every_encoding() {
        for model in ["mamba1", "falcon_mamba"] {
            let source = golden(model);
            for encoding in std::iter::once(None).chain(Encoding::ALL.map(Some)) {
                let (_, few) = load(&source, encoding, Rows::AT_LOAD);
                let (_, all) = load(&source, encoding, Rows::All);
                assert!(few.values > 700 && all.values > few.values, "{few:?} {all:?}");
                assert!(all.worst > 1e-6 && all.worst < 0.5, "{model} {encoding:?}: {all:?}");
            }
        }
    }

    #[test]
    fn a_wrong_kernel_is_found_in_a_sample_of_rows() {
        for (model, encoding) in [("mamba1", None), ("falcon_mamba", Some(Encoding::Q8_0))] {
            let source = golden(model);
            let (engine, _) = load(&source, encoding, Rows::AT_LOAD);
            let trace = engine.pass(7, Rows::AT_LOAD);
            let parameters = EngineParameters::new(&engine.weights, &source);
            let compare = |trace: &Trace| {
                let config = source.config();
                Reference::new(config, &parameters, trace, DType::F32, Rows::AT_LOAD).run(&[7])
            };
            compare(&trace).unwrap();
            for (activation, values) in &trace {
                // As if its kernel gave results a thousandth too large.
                let mut wrong = trace.clone();
                wrong.insert(activation.clone(), values.iter().map(|v| v * 1.001).collect());
                match compare(&wrong) {
                    Err(Error::SelfCheck { place, .. }) => {
                        let made_up = activation.ends_with("_state");
                        assert!(made_up || place.starts_with(activation.as_str()), "{place}");
                    }
                    other => panic!("{activation}: {other:?}"),
                }
            }
        }
    }

    #[test]
    fn a_converted_weight_that_changed_is_named() {
        let source = golden("mamba1");
        let mut pool = pool(1).unwrap();
        for encoding in [Encoding::BF16, Encoding::Q8_0, Encoding::Q4_0] {
            let weights =
                Weights::from_source(&source, Some(encoding), &mut pool, &mut |_, _| {}).unwrap();
            let [own, other] = [&weights.layers[0].in_proj, &weights.layers[1].in_proj];
            let tensor = source.get(&own.name).unwrap();
            assert_eq!(converted(own, tensor, &[0, 9]).unwrap(), 2 * own.columns);
            let error = converted(other, tensor, &[0]).unwrap_err().to_string();
            assert!(error.contains(&other.name), "{error}");
        }
    }
}
