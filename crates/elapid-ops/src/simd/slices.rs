//! The elementary functions over slices, one call for a whole row.

use pulp::{Simd, WithSimd};

use super::{dispatch, exp, load, sigmoid, silu, silu_derivative, softplus, store};

/// A function of one value that is applied to every lane alike.
pub trait Lanewise: Copy + Sync {
    /// The function on a vector; mark it `#[inline(always)]`.
    fn apply<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s;
}

/// A function of two values that is applied to every lane alike.
pub trait LanewisePair: Copy + Sync {
    /// The function on vectors; mark it `#[inline(always)]`.
    fn apply<S: Simd>(self, simd: S, x: S::f32s, y: S::f32s) -> S::f32s;
}

/// `out[i] = op(x[i])`.
///
/// # Panics
/// If the lengths differ.
pub fn map<Op: Lanewise>(op: Op, x: &[f32], out: &mut [f32]) {
    struct Map<'a, Op>(Op, &'a [f32], &'a mut [f32]);
    impl<Op: Lanewise> WithSimd for Map<'_, Op> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self(op, x, out) = self;
            let (mut x, mut out) =
                (x.chunks_exact(S::F32_LANES), out.chunks_exact_mut(S::F32_LANES));
            for (x, out) in x.by_ref().zip(out.by_ref()) {
                store(simd, out, op.apply(simd, load(simd, x)));
            }
            if !x.remainder().is_empty() {
                let value = op.apply(simd, simd.partial_load_f32s(x.remainder()));
                simd.partial_store_f32s(out.into_remainder(), value);
            }
        }
    }
    assert_eq!(x.len(), out.len(), "lengths of input and output");
    dispatch(Map(op, x, out));
}

/// `x[i] = op(x[i])`.
pub fn map_in_place<Op: Lanewise>(op: Op, x: &mut [f32]) {
    struct Map<'a, Op>(Op, &'a mut [f32]);
    impl<Op: Lanewise> WithSimd for Map<'_, Op> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self(op, x) = self;
            let mut x = x.chunks_exact_mut(S::F32_LANES);
            for x in x.by_ref() {
                let value = op.apply(simd, load(simd, x));
                store(simd, x, value);
            }
            let rest = x.into_remainder();
            if !rest.is_empty() {
                let value = op.apply(simd, simd.partial_load_f32s(rest));
                simd.partial_store_f32s(rest, value);
            }
        }
    }
    dispatch(Map(op, x));
}

/// `out[i] = op(x[i], y[i])`.
///
/// # Panics
/// If the lengths differ.
pub fn map_pair<Op: LanewisePair>(op: Op, x: &[f32], y: &[f32], out: &mut [f32]) {
    struct Map<'a, Op>(Op, &'a [f32], &'a [f32], &'a mut [f32]);
    impl<Op: LanewisePair> WithSimd for Map<'_, Op> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self(op, x, y, out) = self;
            let (mut x, mut y) = (x.chunks_exact(S::F32_LANES), y.chunks_exact(S::F32_LANES));
            let mut out = out.chunks_exact_mut(S::F32_LANES);
            for ((x, y), out) in x.by_ref().zip(y.by_ref()).zip(out.by_ref()) {
                store(simd, out, op.apply(simd, load(simd, x), load(simd, y)));
            }
            if !x.remainder().is_empty() {
                let x = simd.partial_load_f32s(x.remainder());
                let y = simd.partial_load_f32s(y.remainder());
                simd.partial_store_f32s(out.into_remainder(), op.apply(simd, x, y));
            }
        }
    }
    assert_eq!((x.len(), y.len()), (out.len(), out.len()), "lengths of inputs and output");
    dispatch(Map(op, x, y, out));
}

macro_rules! lanewise {
    ($name:ident, $function:ident) => {
        #[derive(Clone, Copy)]
        struct $name;
        impl Lanewise for $name {
            #[inline(always)]
            fn apply<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
                $function(simd, x)
            }
        }
    };
}
lanewise!(Exp, exp);
lanewise!(Sigmoid, sigmoid);
lanewise!(Silu, silu);
lanewise!(Softplus, softplus);

/// `out = e^x`, see [`exp`].
///
/// # Panics
/// If the lengths differ.
pub fn exp_slice(x: &[f32], out: &mut [f32]) {
    map(Exp, x, out);
}

/// `out = sigmoid(x)`, see [`sigmoid`].
///
/// # Panics
/// If the lengths differ.
pub fn sigmoid_slice(x: &[f32], out: &mut [f32]) {
    map(Sigmoid, x, out);
}

/// `out = silu(x)`, see [`silu`].
///
/// # Panics
/// If the lengths differ.
pub fn silu_slice(x: &[f32], out: &mut [f32]) {
    map(Silu, x, out);
}

/// `out = softplus(x)`, see [`softplus`].
///
/// # Panics
/// If the lengths differ.
pub fn softplus_slice(x: &[f32], out: &mut [f32]) {
    map(Softplus, x, out);
}

/// `dx = dy silu'(x)`, see [`silu_derivative`].
///
/// # Panics
/// If the lengths differ.
pub fn silu_backward_slice(x: &[f32], dy: &[f32], dx: &mut [f32]) {
    #[derive(Clone, Copy)]
    struct Backward;
    impl LanewisePair for Backward {
        #[inline(always)]
        fn apply<S: Simd>(self, simd: S, x: S::f32s, dy: S::f32s) -> S::f32s {
            simd.mul_f32s(dy, silu_derivative(simd, x))
        }
    }
    map_pair(Backward, x, dy, dx);
}
