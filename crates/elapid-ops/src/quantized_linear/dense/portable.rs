//! Plain code, for processors without vectors that are known here.

use half::{bf16, f16};

use super::{Call, Vectors, by_encoding};
use crate::blocks::Encoding;

/// # Safety
/// As [`super::super::product`].
pub(in super::super) unsafe fn rows(encoding: Encoding, call: Call) {
    // SAFETY: the caller's; nothing is needed.
    unsafe { by_encoding::<Portable>(encoding, call) }
}

#[derive(Clone, Copy)]
struct Portable;

const LANES: usize = 8;

// SAFETY of all methods: the caller's.
impl Vectors for Portable {
    type Vector = [f32; LANES];
    const LANES: usize = LANES;
    const TOKENS: usize = 2;
    #[inline(always)]
    unsafe fn zero() -> Self::Vector {
        [0.0; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Vector {
        // SAFETY: as above.
        unsafe { from.cast::<Self::Vector>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(v: Self::Vector, to: *mut f32) {
        // SAFETY: as above.
        unsafe { to.cast::<Self::Vector>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn bf16(from: *const u8) -> [Self::Vector; 2] {
        // SAFETY: as above.
        let bytes = unsafe { from.cast::<[[[u8; 2]; LANES]; 2]>().read_unaligned() };
        bytes.map(|v| v.map(|bytes| bf16::from_le_bytes(bytes).to_f32()))
    }
    #[inline(always)]
    unsafe fn like_bf16(from: *const f32) -> [Self::Vector; 2] {
        // SAFETY: as above.
        unsafe { [Self::load(from), Self::load(from.add(LANES))] }
    }
    #[inline(always)]
    unsafe fn f16(from: *const u8) -> [Self::Vector; 2] {
        // SAFETY: as above.
        let bytes = unsafe { from.cast::<[[[u8; 2]; LANES]; 2]>().read_unaligned() };
        bytes.map(|v| v.map(|bytes| f16::from_le_bytes(bytes).to_f32()))
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        // Without a fused instruction a call would cost a hundred times as much.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn sums(v: [Self::Vector; 4]) -> [f32; 4] {
        v.map(|v| {
            let v: [f32; 4] = std::array::from_fn(|i| v[i] + v[i + 4]);
            (v[0] + v[2]) + (v[1] + v[3])
        })
    }
    #[inline(always)]
    fn ask(_: *const u8) {}
}
