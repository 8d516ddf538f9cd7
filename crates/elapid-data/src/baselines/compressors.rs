//! gzip and zstd at their strongest usual setting (levels 9 and 19), sizes as the tools write them, with
//! headers: of a text as a whole, and of each window of a model's context alone, which is all that a
//! model that starts fresh can know.

use std::io::{self, Write};

use flate2::Compression;
use flate2::write::GzEncoder;

use crate::{Error, Result};

/// Compressed sizes of one text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Compressed {
    /// Bits per byte of the text as one stream.
    pub whole: f64,
    /// Bits per byte when each window is compressed alone, over all windows together.
    pub per_window: f64,
}

/// gzip level 9. `texts` are compressed as one stream, end to end; `windows` one by one.
///
/// # Errors
/// The compressor fails.
pub fn gzip<'a>(
    texts: impl IntoIterator<Item = &'a [u8]>,
    windows: impl IntoIterator<Item = &'a [u8]>,
) -> Result<Compressed> {
    let failed = |source| Error::Compression { format: "gzip", source };
    let mut stream = GzEncoder::new(Counter::default(), Compression::best());
    let bytes = write_all(&mut stream, texts).map_err(failed)?;
    let whole = bits_per_byte(stream.finish().map_err(failed)?.bytes, bytes);
    let per_window = alone(windows, |window| {
        let mut stream = GzEncoder::new(Counter::default(), Compression::best());
        stream.write_all(window)?;
        Ok(stream.finish()?.bytes)
    });
    Ok(Compressed { whole, per_window: per_window.map_err(failed)? })
}

/// zstd level 19. `texts` are compressed as one stream, end to end; `windows` one by one.
///
/// # Errors
/// The compressor fails.
pub fn zstd<'a>(
    texts: impl IntoIterator<Item = &'a [u8]>,
    windows: impl IntoIterator<Item = &'a [u8]>,
) -> Result<Compressed> {
    const LEVEL: i32 = 19;
    let failed = |source| Error::Compression { format: "zstd", source };
    let mut stream = ::zstd::Encoder::new(Counter::default(), LEVEL).map_err(failed)?;
    let bytes = write_all(&mut stream, texts).map_err(failed)?;
    let whole = bits_per_byte(stream.finish().map_err(failed)?.bytes, bytes);
    let mut single = ::zstd::bulk::Compressor::new(LEVEL).map_err(failed)?;
    let per_window = alone(windows, |window| Ok(single.compress(window)?.len() as u64));
    Ok(Compressed { whole, per_window: per_window.map_err(failed)? })
}

/// A sink that only counts.
#[derive(Default)]
struct Counter {
    bytes: u64,
}

impl Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_all<'a>(
    stream: &mut impl Write,
    texts: impl IntoIterator<Item = &'a [u8]>,
) -> io::Result<u64> {
    let mut bytes = 0;
    for text in texts {
        stream.write_all(text)?;
        bytes += text.len() as u64;
    }
    Ok(bytes)
}

fn alone<'a>(
    windows: impl IntoIterator<Item = &'a [u8]>,
    mut size: impl FnMut(&[u8]) -> io::Result<u64>,
) -> io::Result<f64> {
    let (mut compressed, mut bytes) = (0, 0);
    for window in windows {
        compressed += size(window)?;
        bytes += window.len() as u64;
    }
    Ok(bits_per_byte(compressed, bytes))
}

fn bits_per_byte(compressed: u64, bytes: u64) -> f64 {
    8.0 * compressed as f64 / bytes.max(1) as f64
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn sizes_are_those_of_real_files() {
        let text: Vec<u8> = (0..20_000u32).flat_map(|i| (i * i % 977).to_le_bytes()).collect();
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(&text).unwrap();
        let file = encoder.finish().unwrap();
        let mut back = Vec::new();
        flate2::read::GzDecoder::new(file.as_slice()).read_to_end(&mut back).unwrap();
        assert_eq!(back, text);
        let (a, b) = text.split_at(777);
        let gzip = gzip([a, b], text.chunks(512)).unwrap();
        assert!((gzip.whole - 8.0 * file.len() as f64 / text.len() as f64).abs() < 1e-9);
        let zstd = zstd([a, b], text.chunks(512)).unwrap();
        for sizes in [gzip, zstd] {
            assert!(sizes.whole < sizes.per_window && sizes.per_window < 8.0, "{sizes:?}");
        }
        assert!(zstd.whole < gzip.whole);
    }

    #[test]
    fn nothing_and_noise() {
        let mut rng = elapid_tensor::rng::Rng::new(0, 0);
        let noise: Vec<u8> = (0..4096).map(|_| rng.below(256) as u8).collect();
        assert!(zstd([noise.as_slice()], noise.chunks(256)).unwrap().whole > 8.0);
        let empty = gzip(std::iter::empty(), std::iter::empty()).unwrap();
        assert_eq!(empty.per_window, 0.0);
    }
}
