//! Initial values, as in the original code (Mamba, section 3.6 and the released modules).
//!
//! Every draw is keyed by (seed, parameter name, element), so a parameter starts the same whatever else the
//! model has.

use elapid_tensor::rng::{draw, unit_f64};
use elapid_tensor::{Buffer, Tensor};

use crate::{MambaConfig, Result};

/// The random stream of initialisation, apart from data order and sampling.
const STREAM: u64 = 0x1A17;

/// Makes initial parameters, as leaves that track gradients.
#[derive(Debug, Clone, Copy)]
pub struct Initializer {
    seed: u64,
    zeros: bool,
}

impl Initializer {
    /// Initial values drawn under `seed`.
    pub fn new(seed: u64) -> Self {
        Self { seed, zeros: false }
    }

    /// Zeros everywhere, for a model that is about to be loaded.
    pub fn zeros() -> Self {
        Self { seed: 0, zeros: true }
    }

    fn fill(
        &self,
        name: &str,
        shape: &[usize],
        value: impl Fn(usize, [u32; 4]) -> f64,
    ) -> Result<Tensor> {
        let elements = shape.iter().product();
        if self.zeros {
            return Ok(Tensor::zeros::<f32>(shape).requires_grad());
        }
        let id = fnv1a(name);
        let mut buffer = Buffer::<f32>::scratch(elements);
        for (i, to) in buffer.iter_mut().enumerate() {
            *to = value(i, draw(self.seed, STREAM, id, i as u64)) as f32;
        }
        Ok(Tensor::from_buffer(buffer, shape)?.requires_grad())
    }

    /// The same value everywhere.
    pub fn constant(&self, value: f64, shape: &[usize]) -> Result<Tensor> {
        let value = if self.zeros { 0.0 } else { value };
        Ok(Tensor::filled(value as f32, shape).requires_grad())
    }

    /// Uniform in ±`bound`.
    pub fn uniform(&self, name: &str, bound: f64, shape: &[usize]) -> Result<Tensor> {
        self.fill(name, shape, |_, bits| bound * (2.0 * unit_f64(bits[0], bits[1]) - 1.0))
    }

    /// Normal with mean 0.
    pub fn normal(&self, name: &str, deviation: f64, shape: &[usize]) -> Result<Tensor> {
        self.fill(name, shape, |_, [a, b, c, d]| {
            let radius = (-2.0 * (1.0 - unit_f64(a, b)).ln()).sqrt();
            deviation * radius * (std::f64::consts::TAU * unit_f64(c, d)).cos()
        })
    }

    /// dt_bias [E]: softplus of it is log-uniform in [dt_min, dt_max], at least dt_init_floor.
    pub fn dt_bias(&self, name: &str, config: &MambaConfig) -> Result<Tensor> {
        let (low, high) = (config.dt_min.ln(), config.dt_max.ln());
        self.fill(name, &[config.d_inner()], |_, bits| {
            let dt = (unit_f64(bits[0], bits[1]) * (high - low) + low).exp();
            inverse_softplus(dt.max(config.dt_init_floor))
        })
    }

    /// A_log [E, N]: ln(1), .., ln(N) in every channel (S4D-Real).
    pub fn a_log(&self, e: usize, n: usize) -> Result<Tensor> {
        self.fill("A_log", &[e, n], |i, _| ((i % n + 1) as f64).ln())
    }
}

/// v with softplus(v) = dt.
fn inverse_softplus(dt: f64) -> f64 {
    dt + (-(-dt).exp_m1()).ln()
}

/// FNV-1a, a fixed hash of names: it must be the same on every machine and in every version.
fn fnv1a(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Kind, LanguageModel};

    #[test]
    fn inverse_softplus_values() {
        // Mamba specification, test oracle 6.
        let expected = [
            (1e-4, -9.2102903716),
            (1e-3, -6.9072552373),
            (1e-2, -4.6001660193),
            (1e-1, -2.2521684611),
        ];
        for (dt, value) in expected {
            assert!((inverse_softplus(dt) - value).abs() < 1e-9, "{dt}");
        }
    }

    #[test]
    fn the_embedding_alone_has_the_deviation_asked_for() {
        let values = |embedding_std| {
            let config = MambaConfig { embedding_std, ..MambaConfig::bytes(16, 1) };
            let mut found = Vec::new();
            let mut model = LanguageModel::new(&config, 3).unwrap();
            model
                .visit(&mut |parameter| {
                    found.push((parameter.kind, parameter.tensor.to_f64_vec()?));
                    Ok(())
                })
                .unwrap();
            found
        };
        let (usual, wide) = (values(0.02), values(0.5));
        for ((kind, usual), (_, wide)) in usual.into_iter().zip(wide) {
            if kind != Kind::Embedding {
                assert_eq!(usual, wide, "{kind:?}");
                continue;
            }
            let deviation = (wide.iter().map(|v| v * v).sum::<f64>() / wide.len() as f64).sqrt();
            assert!((deviation - 0.5).abs() < 0.03, "{deviation}");
            for (usual, wide) in usual.into_iter().zip(wide) {
                assert!((wide - 25.0 * usual).abs() <= 1e-6 * wide.abs(), "{usual} {wide}");
            }
        }
    }

    #[test]
    fn draws_have_the_stated_distribution_and_depend_on_the_name_only() {
        let init = Initializer::new(7);
        let uniform = init.uniform("a", 0.5, &[100, 100]).unwrap().to_f64_vec().unwrap();
        let mean = uniform.iter().sum::<f64>() / 1e4;
        let variance = uniform.iter().map(|v| v * v).sum::<f64>() / 1e4;
        assert!(mean.abs() < 0.01 && (variance - 0.25 / 3.0).abs() < 0.005, "{mean} {variance}");
        assert!(uniform.iter().all(|v| v.abs() <= 0.5));
        let normal = init.normal("a", 0.02, &[100, 100]).unwrap().to_f64_vec().unwrap();
        let deviation = (normal.iter().map(|v| v * v).sum::<f64>() / 1e4).sqrt();
        assert!((deviation - 0.02).abs() < 0.001, "{deviation}");
        let again = init.uniform("a", 0.5, &[100, 100]).unwrap().to_f64_vec().unwrap();
        let other = init.uniform("b", 0.5, &[100, 100]).unwrap().to_f64_vec().unwrap();
        assert_eq!(uniform, again);
        assert_ne!(uniform, other);
    }
}
