//! The element types that GGUF files name by number: all sizes are known, so that any file can be checked and
//! shown, and those that weights can be read from have an [`Encoding`].

use std::fmt;

use elapid_ops::blocks::Encoding;

/// An element type by its number in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ElementType(u32);

/// Number, name, elements of a block, bytes of a block.
const KNOWN: [(u32, &str, usize, usize); 33] = [
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
];

impl ElementType {
    /// The type of a number, if there is one.
    pub fn new(number: u32) -> Option<Self> {
        KNOWN.iter().any(|known| known.0 == number).then_some(Self(number))
    }

    fn row(self) -> &'static (u32, &'static str, usize, usize) {
        // `new` and `from` let no other number in; the first row is never reached for one.
        KNOWN.iter().find(|known| known.0 == self.0).unwrap_or(&KNOWN[0])
    }

    /// Its number in files.
    pub fn number(self) -> u32 {
        self.0
    }

    /// `F32`, `Q4_K`, ...
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Elements and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        (self.row().2, self.row().3)
    }

    /// How to read it, if weights of this type can be read.
    pub fn encoding(self) -> Option<Encoding> {
        Encoding::ALL.into_iter().find(|&encoding| Self::from(encoding) == self)
    }
}

impl From<Encoding> for ElementType {
    fn from(encoding: Encoding) -> Self {
        Self(match encoding {
            Encoding::F32 => 0,
            Encoding::F16 => 1,
            Encoding::Q4_0 => 2,
            Encoding::Q8_0 => 8,
            Encoding::Q4_K => 12,
            Encoding::Q6_K => 14,
            Encoding::BF16 => 30,
        })
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodings_have_the_sizes_of_their_types() {
        for encoding in Encoding::ALL {
            let element = ElementType::from(encoding);
            assert_eq!(element.encoding(), Some(encoding));
            assert_eq!(element.block(), (encoding.block_len(), encoding.block_bytes()));
            assert_eq!(element.name().to_lowercase(), encoding.name());
            assert_eq!(ElementType::new(element.number()), Some(element));
        }
        assert!(ElementType::new(4).is_none() && ElementType::new(u32::MAX).is_none());
    }
}
