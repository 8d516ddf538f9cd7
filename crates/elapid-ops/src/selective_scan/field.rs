//! Vector arithmetic of the numbers that a scan runs on: real, or complex with separate vectors of real and
//! imaginary parts. The kernels are written once for both; for real numbers conjugation is the identity and
//! everything below is one instruction.

use pulp::Simd;

use crate::simd::{DecayConstants, decay_exp2, decay_exp2_in_range, sin_cos};

/// A kind of number.
pub(super) trait Field: Copy + Send + Sync + 'static {
    /// f32 values in a number.
    const PARTS: usize;
    /// Factor of the output: y = OUTPUT Re(C h), 2 for complex numbers (each stands for a conjugate pair).
    const OUTPUT: f32;
    /// One number a lane.
    type V<S: Simd>: Copy;

    /// A vector from `PARTS` runs of `LANES` values.
    ///
    /// # Safety
    /// `PARTS * LANES` values must be readable at `from`.
    unsafe fn load<S: Simd>(simd: S, from: *const f32) -> Self::V<S>;
    /// A vector to `PARTS` runs of `LANES` values.
    ///
    /// # Safety
    /// `PARTS * LANES` values must be writable at `to`.
    unsafe fn store<S: Simd>(simd: S, to: *mut f32, v: Self::V<S>);
    /// One number (its parts side by side) in all lanes.
    ///
    /// # Safety
    /// `PARTS` values must be readable at `from`.
    unsafe fn splat<S: Simd>(simd: S, from: *const f32) -> Self::V<S>;
    /// Zero in all lanes.
    fn zero<S: Simd>(simd: S) -> Self::V<S>;
    /// `conj(a) b`
    fn conj_mul<S: Simd>(simd: S, a: Self::V<S>, b: Self::V<S>) -> Self::V<S>;
    /// `a b + c`
    fn mul_add<S: Simd>(simd: S, a: Self::V<S>, b: Self::V<S>, c: Self::V<S>) -> Self::V<S>;
    /// `r a`, r real
    fn scale<S: Simd>(simd: S, r: S::f32s, a: Self::V<S>) -> Self::V<S>;
    /// `r a + c`, r real
    fn scale_add<S: Simd>(simd: S, r: S::f32s, a: Self::V<S>, c: Self::V<S>) -> Self::V<S>;
    /// `r conj(a) + c`, r real
    fn scale_conj_add<S: Simd>(simd: S, r: S::f32s, a: Self::V<S>, c: Self::V<S>) -> Self::V<S>;
    /// `Re(a b) + sum`
    fn dot<S: Simd>(simd: S, a: Self::V<S>, b: Self::V<S>, sum: S::f32s) -> S::f32s;
    /// `Re(conj(a) b) + sum`
    fn conj_dot<S: Simd>(simd: S, a: Self::V<S>, b: Self::V<S>, sum: S::f32s) -> S::f32s;
    /// `exp(Δ A)` of several A whose real parts were multiplied by log2 e; `CLAMP` is needed if an exponent may
    /// exceed [`crate::simd::DECAY_RANGE`] and changes no bit where none does.
    fn decays<S: Simd, const K: usize, const CLAMP: bool>(
        simd: S,
        constants: &DecayConstants<S>,
        delta: S::f32s,
        a: [Self::V<S>; K],
    ) -> [Self::V<S>; K];
}

#[inline(always)]
fn powers<S: Simd, const K: usize, const CLAMP: bool>(
    simd: S,
    constants: &DecayConstants<S>,
    delta: S::f32s,
    mut x: [S::f32s; K],
) -> [S::f32s; K] {
    for x in &mut x {
        *x = simd.mul_f32s(delta, *x);
    }
    if CLAMP {
        for x in &mut x {
            *x = decay_exp2(simd, *x);
        }
        x
    } else {
        decay_exp2_in_range(simd, constants, x)
    }
}

/// Real numbers.
#[derive(Clone, Copy)]
pub(super) struct Real;

impl Field for Real {
    const PARTS: usize = 1;
    const OUTPUT: f32 = 1.0;
    type V<S: Simd> = S::f32s;

    #[inline(always)]
    unsafe fn load<S: Simd>(_simd: S, from: *const f32) -> S::f32s {
        // SAFETY: the caller's.
        unsafe { from.cast::<S::f32s>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(_simd: S, to: *mut f32, v: S::f32s) {
        // SAFETY: the caller's.
        unsafe { to.cast::<S::f32s>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn splat<S: Simd>(simd: S, from: *const f32) -> S::f32s {
        // SAFETY: the caller's.
        simd.splat_f32s(unsafe { *from })
    }
    #[inline(always)]
    fn zero<S: Simd>(simd: S) -> S::f32s {
        simd.splat_f32s(0.0)
    }
    #[inline(always)]
    fn conj_mul<S: Simd>(simd: S, a: S::f32s, b: S::f32s) -> S::f32s {
        simd.mul_f32s(a, b)
    }
    #[inline(always)]
    fn mul_add<S: Simd>(simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(a, b, c)
    }
    #[inline(always)]
    fn scale<S: Simd>(simd: S, r: S::f32s, a: S::f32s) -> S::f32s {
        simd.mul_f32s(r, a)
    }
    #[inline(always)]
    fn scale_add<S: Simd>(simd: S, r: S::f32s, a: S::f32s, c: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(r, a, c)
    }
    #[inline(always)]
    fn scale_conj_add<S: Simd>(simd: S, r: S::f32s, a: S::f32s, c: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(r, a, c)
    }
    #[inline(always)]
    fn dot<S: Simd>(simd: S, a: S::f32s, b: S::f32s, sum: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(a, b, sum)
    }
    #[inline(always)]
    fn conj_dot<S: Simd>(simd: S, a: S::f32s, b: S::f32s, sum: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(a, b, sum)
    }
    #[inline(always)]
    fn decays<S: Simd, const K: usize, const CLAMP: bool>(
        simd: S,
        constants: &DecayConstants<S>,
        delta: S::f32s,
        a: [S::f32s; K],
    ) -> [S::f32s; K] {
        powers::<S, K, CLAMP>(simd, constants, delta, a)
    }
}

/// Complex numbers, a vector of real parts and one of imaginary parts.
#[derive(Clone, Copy)]
pub(super) struct Complex;

impl Field for Complex {
    const PARTS: usize = 2;
    const OUTPUT: f32 = 2.0;
    type V<S: Simd> = (S::f32s, S::f32s);

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const f32) -> Self::V<S> {
        // SAFETY: the caller's.
        unsafe { (Real::load(simd, from), Real::load(simd, from.add(S::F32_LANES))) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, to: *mut f32, v: Self::V<S>) {
        // SAFETY: the caller's.
        unsafe {
            Real::store(simd, to, v.0);
            Real::store(simd, to.add(S::F32_LANES), v.1);
        }
    }
    #[inline(always)]
    unsafe fn splat<S: Simd>(simd: S, from: *const f32) -> Self::V<S> {
        // SAFETY: the caller's.
        unsafe { (simd.splat_f32s(*from), simd.splat_f32s(*from.add(1))) }
    }
    #[inline(always)]
    fn zero<S: Simd>(simd: S) -> Self::V<S> {
        (simd.splat_f32s(0.0), simd.splat_f32s(0.0))
    }
    #[inline(always)]
    fn conj_mul<S: Simd>(simd: S, a: Self::V<S>, b: Self::V<S>) -> Self::V<S> {
        let re = simd.mul_add_e_f32s(a.1, b.1, simd.mul_f32s(a.0, b.0));
        (re, simd.negate_mul_add_e_f32s(a.1, b.0, simd.mul_f32s(a.0, b.1)))
    }
    #[inline(always)]
    fn mul_add<S: Simd>(simd: S, a: Self::V<S>, b: Self::V<S>, c: Self::V<S>) -> Self::V<S> {
        let re = simd.negate_mul_add_e_f32s(a.1, b.1, simd.mul_add_e_f32s(a.0, b.0, c.0));
        (re, simd.mul_add_e_f32s(a.0, b.1, simd.mul_add_e_f32s(a.1, b.0, c.1)))
    }
    #[inline(always)]
    fn scale<S: Simd>(simd: S, r: S::f32s, a: Self::V<S>) -> Self::V<S> {
        (simd.mul_f32s(r, a.0), simd.mul_f32s(r, a.1))
    }
    #[inline(always)]
    fn scale_add<S: Simd>(simd: S, r: S::f32s, a: Self::V<S>, c: Self::V<S>) -> Self::V<S> {
        (simd.mul_add_e_f32s(r, a.0, c.0), simd.mul_add_e_f32s(r, a.1, c.1))
    }
    #[inline(always)]
    fn scale_conj_add<S: Simd>(simd: S, r: S::f32s, a: Self::V<S>, c: Self::V<S>) -> Self::V<S> {
        (simd.mul_add_e_f32s(r, a.0, c.0), simd.negate_mul_add_e_f32s(r, a.1, c.1))
    }
    #[inline(always)]
    fn dot<S: Simd>(simd: S, a: Self::V<S>, b: Self::V<S>, sum: S::f32s) -> S::f32s {
        simd.negate_mul_add_e_f32s(a.1, b.1, simd.mul_add_e_f32s(a.0, b.0, sum))
    }
    #[inline(always)]
    fn conj_dot<S: Simd>(simd: S, a: Self::V<S>, b: Self::V<S>, sum: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(a.1, b.1, simd.mul_add_e_f32s(a.0, b.0, sum))
    }
    #[inline(always)]
    fn decays<S: Simd, const K: usize, const CLAMP: bool>(
        simd: S,
        constants: &DecayConstants<S>,
        delta: S::f32s,
        mut a: [Self::V<S>; K],
    ) -> [Self::V<S>; K] {
        let mut sizes = [delta; K];
        for (size, a) in sizes.iter_mut().zip(&a) {
            *size = a.0;
        }
        let sizes = powers::<S, K, CLAMP>(simd, constants, delta, sizes);
        for (a, &size) in a.iter_mut().zip(&sizes) {
            let (sin, cos) = sin_cos(simd, simd.mul_f32s(delta, a.1));
            *a = (simd.mul_f32s(size, cos), simd.mul_f32s(size, sin));
        }
        a
    }
}
