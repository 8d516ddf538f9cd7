//! Element types.

use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};

use crate::Error;

/// The element types that tensors and checkpoints use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 single precision: parameters, gradients, states and all CPU arithmetic.
    F32,
    /// bfloat16: storage of checkpoints, compute on accelerators.
    BF16,
    /// IEEE 754 half precision: storage of checkpoints.
    F16,
    /// IEEE 754 double precision: references.
    F64,
    /// Targets, with -100 for "ignored".
    I64,
    /// Indices.
    I32,
    /// Token ids.
    U32,
    /// Bytes.
    U8,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::U8 => 1,
            DType::BF16 | DType::F16 => 2,
            DType::F32 | DType::I32 | DType::U32 => 4,
            DType::F64 | DType::I64 => 8,
        }
    }

    /// True for the types that gradients exist for.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::BF16 | DType::F16 | DType::F64)
    }

    /// The lower-case name: `f32`, `bf16`, ...
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            DType::F64 => "f64",
            DType::I64 => "i64",
            DType::I32 => "i32",
            DType::U32 => "u32",
            DType::U8 => "u8",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        const ALL: [DType; 8] = [
            DType::F32,
            DType::BF16,
            DType::F16,
            DType::F64,
            DType::I64,
            DType::I32,
            DType::U32,
            DType::U8,
        ];
        let lower = text.to_ascii_lowercase();
        ALL.into_iter()
            .find(|dtype| dtype.name() == lower)
            .ok_or_else(|| Error::UnknownDType(text.to_owned()))
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A Rust type that is the element of some [`DType`]; every bit pattern is a valid value.
pub trait Element: bytemuck::Pod + sealed::Sealed + Send + Sync + fmt::Debug {
    /// The type's tag.
    const DTYPE: DType;
    /// The nearest value, through f64 (exact for every integer up to 2^53).
    fn from_f64(value: f64) -> Self;
    /// The value as f64.
    fn to_f64(self) -> f64;
}

macro_rules! element {
    ($($type:ty => $tag:ident, $from:expr, $to:expr;)*) => {$(
        impl sealed::Sealed for $type {}
        impl Element for $type {
            const DTYPE: DType = DType::$tag;
            #[inline]
            fn from_f64(value: f64) -> Self { $from(value) }
            #[inline]
            fn to_f64(self) -> f64 { $to(self) }
        }
    )*};
}

element! {
    f32 => F32, |v| v as f32, f64::from;
    bf16 => BF16, |v: f64| bf16::from_f32(v as f32), bf16::to_f64;
    f16 => F16, |v: f64| f16::from_f32(v as f32), f16::to_f64;
    f64 => F64, |v| v, |v| v;
    i64 => I64, |v| v as i64, |v| v as f64;
    i32 => I32, |v| v as i32, f64::from;
    u32 => U32, |v| v as u32, f64::from;
    u8 => U8, |v| v as u8, f64::from;
}
