//! What a loss in bits per byte is worth: a counting model of order 2 trained on the same bytes, and the
//! compressors that everybody has, on the same text.

mod compressors;
mod order2;

pub use compressors::{Compressed, gzip, zstd};
pub use order2::Order2;
