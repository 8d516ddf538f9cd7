//! What kernels need of an instruction set and of an encoding.

/// f32 vectors of one instruction set. Methods may be called where that set is available.
pub(in super::super) trait Vectors: Copy {
    type Vector: Copy;
    /// Floats of a vector: the lanes of a sum.
    const LANES: usize;
    /// Tokens of a tile with four rows, at most six: as many as there are registers for.
    const TOKENS: usize;
    /// All zero.
    unsafe fn zero() -> Self::Vector;
    /// From memory.
    unsafe fn load(from: *const f32) -> Self::Vector;
    /// To memory.
    unsafe fn store(v: Self::Vector, to: *mut f32);
    /// Two vectors of bfloat16, in the set's own order for them.
    unsafe fn bf16(from: *const u8) -> [Self::Vector; 2];
    /// Two vectors of f32 in that order.
    unsafe fn like_bf16(from: *const f32) -> [Self::Vector; 2];
    /// Two vectors of halves.
    unsafe fn f16(from: *const u8) -> [Self::Vector; 2];
    /// `a b + c`, rounded once.
    unsafe fn mul_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The sums of the lanes of four vectors: upper half onto lower half until one is left.
    unsafe fn sums(v: [Self::Vector; 4]) -> [f32; 4];
    /// The same of two fours.
    #[inline(always)]
    unsafe fn sums_of_two(v: [[Self::Vector; 4]; 2]) -> [[f32; 4]; 2] {
        // SAFETY: the caller's.
        unsafe { [Self::sums(v[0]), Self::sums(v[1])] }
    }
    /// Asks for a line of memory; any address will do.
    fn ask(at: *const u8);
    /// Two vectors to memory.
    #[inline(always)]
    unsafe fn store_two([a, b]: [Self::Vector; 2], to: *mut f32) {
        // SAFETY: the caller's.
        unsafe {
            Self::store(a, to);
            Self::store(b, to.add(Self::LANES));
        }
    }
}

/// How an element is stored. Zero bytes are zeros.
pub(in super::super) trait Element: Copy {
    const BYTES: usize;
    /// Two vectors of weights.
    unsafe fn load<L: Vectors>(from: *const u8) -> [L::Vector; 2];
    /// Two vectors of inputs in the same order.
    unsafe fn input<L: Vectors>(from: *const f32) -> [L::Vector; 2];
}

// SAFETY of all methods: the caller's.

#[derive(Clone, Copy)]
pub(in super::super) struct F32;
impl Element for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<L: Vectors>(from: *const u8) -> [L::Vector; 2] {
        // SAFETY: as above.
        unsafe { Self::input::<L>(from.cast()) }
    }
    #[inline(always)]
    unsafe fn input<L: Vectors>(from: *const f32) -> [L::Vector; 2] {
        // SAFETY: as above.
        unsafe { [L::load(from), L::load(from.add(L::LANES))] }
    }
}

#[derive(Clone, Copy)]
pub(in super::super) struct F16;
impl Element for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<L: Vectors>(from: *const u8) -> [L::Vector; 2] {
        // SAFETY: as above.
        unsafe { L::f16(from) }
    }
    #[inline(always)]
    unsafe fn input<L: Vectors>(from: *const f32) -> [L::Vector; 2] {
        // SAFETY: as above.
        unsafe { F32::input::<L>(from) }
    }
}

#[derive(Clone, Copy)]
pub(in super::super) struct BF16;
impl Element for BF16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<L: Vectors>(from: *const u8) -> [L::Vector; 2] {
        // SAFETY: as above.
        unsafe { L::bf16(from) }
    }
    #[inline(always)]
    unsafe fn input<L: Vectors>(from: *const f32) -> [L::Vector; 2] {
        // SAFETY: as above.
        unsafe { L::like_bf16(from) }
    }
}
