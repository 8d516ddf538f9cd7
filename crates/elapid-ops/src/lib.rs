//! The operations of linear-time sequence models: each with its reference, its fast versions and its gradient.

pub mod adamw;
pub mod blocks;
pub mod causal_conv1d;
pub mod decode_step;
pub mod elementwise;
pub mod embedding;
pub mod gather;
pub mod gpu;
pub mod linear_cross_entropy;
pub mod mamba_step;
pub mod matmul;
pub mod norm;
pub mod quantized_linear;
pub mod reduce;
pub mod selective_scan;
pub mod simd;
pub mod softmax;
#[cfg(test)]
mod testing;
