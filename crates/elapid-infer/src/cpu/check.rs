//! The check of an engine over a model on disk: every weight is read once, which finds those that are no numbers; then one
//! token goes through every layer and the head, whose activations are compared with the f64 reference.
//!
//! The token goes on from a made-up state, so that every tap and every state takes part. It runs stage by stage through the
//! code of all decode steps, but only in the rows and channels that are looked at, and what they neighbour in a kernel. The
//! other activations are made up, as each stage is compared on the inputs that it had, and so is what a layer starts from:
//! threads share the layers. That converted weights stand for what the file has, and that several tokens give the bits of
//! one, is looked at for some rows.
//!
//! All of it is to be a small part of reading the weights once, some milliseconds, which new pages of memory alone can take:
//! a thread goes through its layers in the same memory.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use elapid_formats::{ModelSource, StoredTensor};
use elapid_models::MambaConfig;
use elapid_ops::blocks::{Encoding, dequantize};
use elapid_ops::mamba_step::{Stretch, TILE};
use elapid_ops::quantized_linear::{FEW_TOKENS, Output, Storage, Writer, product};
use elapid_tensor::DType;

use super::CpuEngine;
use super::pool::alone;
use super::step::{LayerPlace, Scratch, Sizes, Stage, Tokens};
use super::weights::{Layer, Matrix, Progress, Weights};
use crate::self_check::reference::{Parameters, Reference, layer_name};
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
        let sizes = self.sizes();
        let Self { config, weights, pool, .. } = self;
        let (config, weights) = (&*config, &*weights);
        let parameters = EngineParameters::new(weights, source);
        let jobs = jobs(config, weights, source, rows);
        // The states of all threads in one piece of memory, of which most pages are never touched.
        let each = sizes.e * (config.d_conv - 1 + sizes.states);
        let mut states = vec![0.0; each * pool.threads()];
        let states: Mutex<Vec<&mut [f32]>> = Mutex::new(states.chunks_exact_mut(each).collect());
        let outcome: Mutex<(Checked, Option<(usize, Error)>)> = Mutex::default();
        pool.run(&|member| {
            let own = states.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let mut pass = Pass::new(config, weights, sizes, rows, own.unwrap_or_default());
            for (at, job) in jobs.iter().enumerate().skip(member.index).step_by(member.threads) {
                let compared = match job {
                    Job::Part(part) => {
                        pass.run(*part);
                        pass.compare(*part, &parameters)
                    }
                    Job::Many(matrix) => many_as_one(matrix, rows),
                    Job::Converted(matrix, tensor, rows) => converted(matrix, tensor, rows),
                };
                let (checked, wrong) = &mut *outcome.lock().unwrap_or_else(PoisonError::into_inner);
                match compared {
                    Ok(own) => checked.add(own),
                    // The first that is wrong is told.
                    Err(error) => {
                        if wrong.as_ref().is_none_or(|(first, _)| at < *first) {
                            *wrong = Some((at, error));
                        }
                        return;
                    }
                }
            }
        });
        let (checked, wrong) = outcome.into_inner().unwrap_or_else(PoisonError::into_inner);
        match wrong {
            Some((_, error)) => Err(error),
            None => Ok(checked),
        }
    }
}

/// What a thread looks at by itself.
enum Job<'a> {
    /// The activations of a layer, or of the head, which comes behind them.
    Part(usize),
    /// That several tokens give the bits of one.
    Many(&'a Matrix),
    /// That these rows stand for what the file has.
    Converted(&'a Matrix, &'a StoredTensor, Vec<usize>),
}

fn jobs<'a>(
    config: &MambaConfig,
    weights: &'a Weights,
    source: &'a ModelSource,
    rows: Rows,
) -> Vec<Job<'a>> {
    let mut jobs: Vec<Job<'_>> = (0..=config.n_layer).map(Job::Part).collect();
    // Kernels are the same for all matrices of a type and width; that each was converted right shows in fewer rows.
    let mut kinds = HashSet::new();
    let of_each = match rows {
        Rows::Sampled(rows) => Rows::Sampled(rows.div_ceil(2)),
        Rows::All => Rows::All,
    };
    for (index, matrix) in weights.matrices().enumerate() {
        let is_new = kinds.insert((matrix.encoding, matrix.columns));
        if is_new || rows == Rows::All {
            jobs.push(Job::Many(matrix));
        }
        if matrix.finite
            && let Some(tensor) = source.get(&matrix.name)
        {
            jobs.push(Job::Converted(matrix, tensor, of_each.of(matrix.rows, index)));
        }
    }
    jobs
}

/// A token on its way through one part of the model: a layer, or the head, which comes behind them.
struct Pass<'a> {
    config: &'a MambaConfig,
    weights: &'a Weights,
    sizes: Sizes,
    rows: Rows,
    token: u32,
    scratch: Scratch,
    /// A layer's state [E, W - 1] and [E, N]: that of a tile of channels in every tile that is looked at.
    conv: &'a mut [f32],
    ssm: &'a mut [f32],
    tile_conv: Vec<f32>,
    tile_ssm: Vec<f32>,
    /// What stands for activations that nobody computes.
    others: Vec<f32>,
    /// Activations of the part: of each stage those that `rows` says, the others made up.
    trace: Trace,
}

impl<'a> Pass<'a> {
    /// `states` are zeros for both of a layer's.
    fn new(
        config: &'a MambaConfig,
        weights: &'a Weights,
        sizes: Sizes,
        rows: Rows,
        states: &'a mut [f32],
    ) -> Self {
        // Logits have no room but where the head is.
        let (history, scratch) = (config.d_conv - 1, Scratch::new(1, 0, sizes, weights));
        let (conv, ssm) = states.split_at_mut(sizes.e * history);
        Self {
            config,
            weights,
            sizes,
            rows,
            token: u32::try_from(config.vocab_size.saturating_sub(1) / 2).unwrap_or(0),
            conv,
            ssm,
            tile_conv: made_up(TILE * history, 0.5),
            tile_ssm: made_up(TILE * sizes.states, 0.1),
            others: made_up(scratch.x.len().max(sizes.d).max(sizes.projected), 1.0),
            scratch,
            trace: Trace::new(),
        }
    }

    fn run(&mut self, part: usize) {
        self.trace.clear();
        // What came before the first layer is the embedding.
        if let Some(before) = part.checked_sub(1) {
            for values in [&mut self.scratch.residual, &mut self.scratch.out] {
                let others = &self.others[..values.len()];
                values.copy_from_slice(others);
            }
            let before = layer_name(before);
            self.note(format!("{before}.residual"), |pass| &pass.scratch.residual);
            self.note(format!("{before}.mixer.out_proj"), |pass| &pass.scratch.out);
        }
        let weights = self.weights;
        match weights.layers.get(part) {
            Some(layer) => self.layer(part, layer),
            None => self.head(),
        }
    }

    fn compare(&self, part: usize, parameters: &dyn Parameters) -> Result<Checked> {
        let (config, trace) = (self.config, &self.trace);
        let mut reference = Reference::new(config, parameters, trace, DType::F32, self.rows);
        match part {
            0 => reference.embeddings(&[self.token]).and_then(|()| reference.layer(0))?,
            layer if layer < config.n_layer => reference.layer(layer)?,
            _ => reference.head()?,
        }
        Ok(reference.checked)
    }

    /// Takes down an activation.
    fn note(&mut self, name: String, values: impl FnOnce(&Self) -> &[f32]) {
        let values = values(self).iter().map(|&value| f64::from(value)).collect();
        self.trace.insert(name, values);
    }

    fn layer(&mut self, index: usize, layer: &Layer) {
        let (weights, sizes, e) = (self.weights, self.sizes, self.sizes.e);
        let prefix = layer_name(index);
        self.note(format!("{prefix}.mixer.conv_state"), |pass| &pass.tile_conv);
        self.note(format!("{prefix}.mixer.ssm_state"), |pass| &pass.tile_ssm);
        let channels = units(self.rows.of(e, index), TILE, e);
        for Range { start, end } in channels.clone() {
            let fill = |state: &mut [f32], tile: &[f32], each: usize| {
                let own = &mut state[start * each..end * each];
                own.copy_from_slice(&tile[..own.len()]);
            };
            fill(self.conv, &self.tile_conv, self.config.d_conv - 1);
            fill(self.ssm, &self.tile_ssm, sizes.states);
        }
        let place = LayerPlace { conv: self.conv.as_mut_ptr(), ssm: self.ssm.as_mut_ptr() };
        let stretches = [Stretch { start: 0, len: 1, slot: 0, fresh: false }];
        let ids = [self.token];
        let ids = (index == 0).then_some(ids.as_slice());
        let tokens = Tokens { ids, count: 1, stretches: &stretches };
        for stage in Stage::ALL {
            let (scratch, others) = (&mut self.scratch, &self.others);
            let fill = |values: &mut [f32]| {
                let others = &others[..values.len()];
                values.copy_from_slice(others);
            };
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
                        self.rows.of(2 * e, index).into_iter().partition(|&row| row < e);
                    let z = z.into_iter().map(|row| row - e).collect();
                    let z = units(z, GROUP, e).into_iter().map(|z| e + z.start..e + z.end);
                    units(x, GROUP, e).into_iter().chain(z).collect()
                }
                Stage::XProj => units(self.rows.of(sizes.projected, index), GROUP, sizes.projected),
                Stage::OutProj => units(self.rows.of(sizes.d, index), GROUP, sizes.d),
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
            let name = |field: &str| format!("{prefix}.{field}");
            match stage {
                Stage::Norm => {
                    if index == 0 {
                        self.note("backbone.embeddings".into(), |pass| &pass.scratch.residual);
                    }
                    self.note(name("residual"), |pass| &pass.scratch.residual);
                    self.note(name("norm"), |pass| &pass.scratch.normed);
                }
                Stage::InProj => {
                    self.note(name("mixer.in_proj"), |pass| &pass.scratch.x[..e]);
                    let z = self.scratch.z[..e].iter().map(|&value| f64::from(value));
                    self.trace.entry(name("mixer.in_proj")).or_default().extend(z);
                }
                Stage::Convolution => self.note(name("mixer.conv1d"), |p| &p.scratch.x[..e]),
                Stage::XProj => self.note(name("mixer.x_proj"), |pass| &pass.scratch.projected),
                Stage::PartNorms => {}
                Stage::Scan => self.note(name("mixer.scan"), |pass| &pass.scratch.x[..e]),
                Stage::OutProj => self.note(name("mixer.out_proj"), |pass| &pass.scratch.out),
            }
        }
    }

    fn head(&mut self) {
        let classes = self.sizes.vocabulary;
        let looked_at = units(self.rows.of(classes, 0), GROUP, classes);
        self.scratch.logits = vec![0.0; classes];
        let frame = self.scratch.frame(self.weights, self.sizes);
        alone(|member| {
            // SAFETY: as in a layer; there is room for the logits of a token.
            unsafe {
                frame.last_norm(member, &[0]);
                for classes in looked_at.clone() {
                    frame.classes(1, classes);
                }
            }
        });
        self.note("backbone.norm_f".into(), |pass| &pass.scratch.normed);
        // Of a large vocabulary most pages are never touched.
        let mut logits = vec![0.0; classes];
        for classes in looked_at {
            for (to, from) in logits[classes.clone()].iter_mut().zip(&self.scratch.logits[classes])
            {
                *to = f64::from(*from);
            }
        }
        self.trace.insert("logits".into(), logits);
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

/// Several tokens that are the same have the bits of one.
fn many_as_one(matrix: &Matrix, rows: Rows) -> Result<Checked> {
    let weight = matrix.weight();
    let x: Vec<f32> = (0..matrix.columns).map(|i| (i * 29 % 97) as f32 / 48.0 - 1.0).collect();
    let mut storages = [1, TOKENS].map(|t| Storage::new(matrix.encoding, t, matrix.columns));
    let written = storages.each_mut().map(Storage::writer);
    for (writer, tokens) in written.iter().zip([1, TOKENS]) {
        for token in 0..tokens {
            // SAFETY: nobody else uses the storage.
            unsafe { writer.write_row(token, tokens, &x) };
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
            // SAFETY: the inputs are written, all of them the same row, and `y` has every token's rows.
            unsafe {
                let inputs = writer.activations(tokens, &x, 0);
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
    Ok(Checked { values: compared, worst: 0.0 })
}

/// Rows that were converted still stand for what the file has.
fn converted(matrix: &Matrix, tensor: &StoredTensor, rows: &[usize]) -> Result<Checked> {
    // As a share of the largest value of a row's block of 256: half a step of the coarsest scale in it.
    let step = match matrix.encoding {
        Encoding::F32 => 0.0,
        Encoding::F16 | Encoding::BF16 => 1.0 / 256.0,
        Encoding::Q8_0 => 1.0 / 128.0,
        Encoding::Q6_K => 1.0 / 16.0,
        Encoding::Q4_0 | Encoding::Q4_K => 1.0 / 4.0,
    };
    let width = tensor.encoding.row_bytes(matrix.columns)?;
    let (mut read, mut held) = (vec![0.0; matrix.columns], vec![0.0; matrix.columns]);
    for &row in rows {
        dequantize(tensor.encoding, &tensor.bytes[row * width..][..width], &mut read)?;
        matrix.read_row(row, &mut held)?;
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
    Ok(Checked { values: rows.len() * matrix.columns, worst: 0.0 })
}

/// The engine's own projections and embedding, everything else from the file.
struct EngineParameters<'a> {
    matrices: HashMap<&'a str, &'a Matrix>,
    source: &'a ModelSource,
}

impl<'a> EngineParameters<'a> {
    fn new(weights: &'a Weights, source: &'a ModelSource) -> Self {
        let matrices = weights.matrices().map(|matrix| (matrix.name.as_str(), matrix)).collect();
        Self { matrices, source }
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
            let mut values = vec![0.0; rows.len() * matrix.columns];
            for (row, values) in rows.zip(values.chunks_exact_mut(matrix.columns)) {
                matrix.read_row(row, values)?;
            }
            return Ok(Cow::Owned(values));
        }
        let Some(tensor) = self.source.get(name) else { return Ok(Cow::Owned(Vec::new())) };
        Ok(Cow::Owned(tensor.read_part(range)?))
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
            let parameters = EngineParameters::new(&engine.weights, &source);
            let (config, sizes) = (source.config(), engine.sizes());
            let mut states = vec![0.0; sizes.e * (config.d_conv - 1 + sizes.states)];
            let mut pass = Pass::new(config, &engine.weights, sizes, Rows::AT_LOAD, &mut states);
            for part in 0..=config.n_layer {
                pass.run(part);
                pass.compare(part, &parameters).unwrap();
                let before = part.checked_sub(1).map(|part| layer_name(part) + ".");
                for (activation, values) in pass.trace.clone() {
                    // What a part starts from is made up, no kernel's result.
                    if before.as_ref().is_some_and(|before| activation.starts_with(before)) {
                        continue;
                    }
                    // As if its kernel gave results a thousandth too large.
                    let wrong = values.iter().map(|value| value * 1.001).collect();
                    pass.trace.insert(activation.clone(), wrong);
                    match pass.compare(part, &parameters) {
                        Err(Error::SelfCheck { place, .. }) => {
                            let made_up = activation.ends_with("_state");
                            assert!(made_up || place.starts_with(activation.as_str()), "{place}");
                        }
                        other => panic!("{activation}: {other:?}"),
                    }
                    pass.trace.insert(activation, values);
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
            assert_eq!(converted(own, tensor, &[0, 9]).unwrap().values, 2 * own.columns);
            let error = converted(other, tensor, &[0]).unwrap_err().to_string();
            assert!(error.contains(&other.name), "{error}");
        }
    }
}
