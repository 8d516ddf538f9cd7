//! The loops: f32 in vectors of the machine's width, f64 value by value. The functions of one value and of
//! two are types, so that each loop is compiled for its function.

use elapid_tensor::{Buffer, DType, Result, Shape, Tensor};
use pulp::{Simd, WithSimd};

use super::cuda::Function;
use super::reference;
use super::walk::{Walk, for_each_block};
use crate::simd::{self, Lanewise, LanewisePair, dispatch, load, store};

/// A function of one value.
pub(super) trait Unary: Lanewise {
    /// The function in f64.
    fn exact(self, x: f64) -> f64;

    /// The function on a GPU, and its factor.
    fn on_gpu(self) -> (Function, f64);
}

/// A function of two values.
pub(super) trait Binary: LanewisePair {
    /// The function in f64.
    fn exact(self, x: f64, y: f64) -> f64;

    /// The function on a GPU.
    fn on_gpu(self) -> Function;
}

macro_rules! unary {
    ($($(#[$doc:meta])* $name:ident: |$simd:ident, $x:ident| $lanes:expr, $exact:expr;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub(super) struct $name;
        impl Lanewise for $name {
            #[inline(always)]
            fn apply<S: Simd>(self, $simd: S, $x: S::f32s) -> S::f32s { $lanes }
        }
        impl Unary for $name {
            fn exact(self, x: f64) -> f64 { $exact(x) }
            fn on_gpu(self) -> (Function, f64) { (Function::$name, 1.0) }
        }
    )*};
}

unary! {
    /// The value itself.
    Identity: |_simd, x| x, std::convert::identity;
    /// `-x`.
    Neg: |simd, x| simd.neg_f32s(x), |x: f64| -x;
    /// `e^x`.
    Exp: |simd, x| simd::exp(simd, x), f64::exp;
    /// `-e^x`.
    NegExp: |simd, x| simd.neg_f32s(simd::exp(simd, x)), |x: f64| -x.exp();
    /// `1 / (1 + e^-x)`.
    Sigmoid: |simd, x| simd::sigmoid(simd, x), reference::sigmoid;
    /// `x sigmoid(x)`.
    Silu: |simd, x| simd::silu(simd, x), reference::silu;
    /// `ln(1 + e^x)`.
    Softplus: |simd, x| simd::softplus(simd, x), reference::softplus;
}

/// `factor x`.
#[derive(Clone, Copy)]
pub(super) struct Scale(pub(super) f64);

impl Lanewise for Scale {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
        simd.mul_f32s(x, simd.splat_f32s(self.0 as f32))
    }
}

impl Unary for Scale {
    fn exact(self, x: f64) -> f64 {
        self.0 * x
    }

    fn on_gpu(self) -> (Function, f64) {
        (Function::Scale, self.0)
    }
}

macro_rules! binary {
    ($($(#[$doc:meta])* $name:ident: |$simd:ident, $x:ident, $y:ident| $lanes:expr, $exact:expr;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub(super) struct $name;
        impl LanewisePair for $name {
            #[inline(always)]
            fn apply<S: Simd>(self, $simd: S, $x: S::f32s, $y: S::f32s) -> S::f32s { $lanes }
        }
        impl Binary for $name {
            fn exact(self, x: f64, y: f64) -> f64 { $exact(x, y) }
            fn on_gpu(self) -> Function { Function::$name }
        }
    )*};
}

binary! {
    /// `x + y`.
    Add: |simd, x, y| simd.add_f32s(x, y), |x, y| x + y;
    /// `x - y`.
    Sub: |simd, x, y| simd.sub_f32s(x, y), |x, y| x - y;
    /// `x y`.
    Mul: |simd, x, y| simd.mul_f32s(x, y), |x, y| x * y;
    /// `dy s (1 - s)` from the sigmoid's result `s`.
    SigmoidGrad: |simd, s, dy| {
        let one = simd.splat_f32s(1.0);
        simd.mul_f32s(dy, simd.mul_f32s(s, simd.sub_f32s(one, s)))
    }, |s: f64, dy: f64| dy * (s * (1.0 - s));
    /// `dy silu'(x)`.
    SiluGrad: |simd, x, dy| simd.mul_f32s(dy, simd::silu_derivative(simd, x)),
        |x, dy: f64| dy * reference::silu_derivative(x);
    /// `dy softplus'(x)`.
    SoftplusGrad: |simd, x, dy| simd.mul_f32s(dy, simd::softplus_derivative(simd, x)),
        |x, dy: f64| dy * reference::softplus_derivative(x);
}

/// A copy without gaps, if runs of the innermost axis cannot be read as they lie.
fn readable(tensor: &Tensor, inner_stride: usize) -> Result<Tensor> {
    let tensor = tensor.detach();
    if inner_stride <= 1 { Ok(tensor) } else { tensor.contiguous() }
}

/// `op` of every element of `x`, read as if it had `shape`, which it must broadcast to.
pub(super) fn map<Op: Unary>(
    name: &'static str,
    op: Op,
    x: &Tensor,
    shape: Shape,
) -> Result<Tensor> {
    let x = readable(x, Walk::new(&shape, [x]).inner_strides()[0])?;
    let walk = Walk::new(&shape, [&x]);
    let repeated = walk.inner_strides() == [0];
    match x.dtype() {
        DType::F32 => {
            let data = x.strided_data::<f32>()?;
            let mut out = Buffer::<f32>::scratch(shape.elements());
            for_each_block(&mut out, |first, out| {
                walk.runs(first..first + out.len(), |at, [start], len| {
                    let out = &mut out[at..at + len];
                    if repeated {
                        let mut value = [data[start]];
                        simd::map_in_place(op, &mut value);
                        out.fill(value[0]);
                    } else {
                        simd::map(op, &data[start..start + len], out);
                    }
                });
            });
            Tensor::from_buffer(out, shape)
        }
        DType::F64 => {
            let data = x.strided_data::<f64>()?;
            let [step] = walk.inner_strides();
            let mut out = Buffer::<f64>::scratch(shape.elements());
            for_each_block(&mut out, |first, out| {
                walk.runs(first..first + out.len(), |at, [start], len| {
                    for (i, out) in out[at..at + len].iter_mut().enumerate() {
                        *out = op.exact(data[start + i * step]);
                    }
                });
            });
            Tensor::from_buffer(out, shape)
        }
        _ => Err(x.unsupported(name)),
    }
}

/// `op` of every pair of elements; both broadcast to `shape` and have the same type.
pub(super) fn zip<Op: Binary>(
    name: &'static str,
    op: Op,
    x: &Tensor,
    y: &Tensor,
    shape: Shape,
) -> Result<Tensor> {
    let [x_step, y_step] = Walk::new(&shape, [x, y]).inner_strides();
    let (x, y) = (readable(x, x_step)?, readable(y, y_step)?);
    let walk = Walk::new(&shape, [&x, &y]);
    let [x_step, y_step] = walk.inner_strides();
    match x.dtype() {
        DType::F32 => {
            let (x, y) = (x.strided_data::<f32>()?, y.strided_data::<f32>()?);
            let mut out = Buffer::<f32>::scratch(shape.elements());
            for_each_block(&mut out, |first, out| {
                walk.runs(first..first + out.len(), |at, [x_start, y_start], len| {
                    let x = Operand::new(x, x_start, x_step, len);
                    let y = Operand::new(y, y_start, y_step, len);
                    dispatch(Run { op, x, y, out: &mut out[at..at + len] });
                });
            });
            Tensor::from_buffer(out, shape)
        }
        DType::F64 => {
            let (x, y) = (x.strided_data::<f64>()?, y.strided_data::<f64>()?);
            let mut out = Buffer::<f64>::scratch(shape.elements());
            for_each_block(&mut out, |first, out| {
                walk.runs(first..first + out.len(), |at, [x_start, y_start], len| {
                    for (i, out) in out[at..at + len].iter_mut().enumerate() {
                        *out = op.exact(x[x_start + i * x_step], y[y_start + i * y_step]);
                    }
                });
            });
            Tensor::from_buffer(out, shape)
        }
        _ => Err(x.unsupported(name)),
    }
}

/// One side of a run: its values, or the value that is repeated.
#[derive(Clone, Copy)]
enum Operand<'a> {
    Values(&'a [f32]),
    Repeated(f32),
}

impl<'a> Operand<'a> {
    fn new(data: &'a [f32], start: usize, step: usize, len: usize) -> Self {
        match step {
            0 => Self::Repeated(data[start]),
            _ => Self::Values(&data[start..start + len]),
        }
    }
}

struct Run<'a, Op> {
    op: Op,
    x: Operand<'a>,
    y: Operand<'a>,
    out: &'a mut [f32],
}

impl<Op: Binary> WithSimd for Run<'_, Op> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { op, x, y, out } = self;
        let lanes = S::F32_LANES;
        let whole = out.len() / lanes * lanes;
        let (out, rest) = out.split_at_mut(whole);
        let out = out.chunks_exact_mut(lanes);
        match (x, y) {
            (Operand::Values(x), Operand::Values(y)) => {
                for ((x, y), out) in x.chunks_exact(lanes).zip(y.chunks_exact(lanes)).zip(out) {
                    store(simd, out, op.apply(simd, load(simd, x), load(simd, y)));
                }
            }
            (Operand::Values(x), Operand::Repeated(y)) => {
                let y = simd.splat_f32s(y);
                for (x, out) in x.chunks_exact(lanes).zip(out) {
                    store(simd, out, op.apply(simd, load(simd, x), y));
                }
            }
            (Operand::Repeated(x), Operand::Values(y)) => {
                let x = simd.splat_f32s(x);
                for (y, out) in y.chunks_exact(lanes).zip(out) {
                    store(simd, out, op.apply(simd, x, load(simd, y)));
                }
            }
            (Operand::Repeated(x), Operand::Repeated(y)) => {
                let value = op.apply(simd, simd.splat_f32s(x), simd.splat_f32s(y));
                for out in out {
                    store(simd, out, value);
                }
            }
        }
        // Masked accesses are slow enough to be avoided where there is nothing left.
        if !rest.is_empty() {
            let tail = |operand| match operand {
                Operand::Values(values) => simd.partial_load_f32s(&values[whole..]),
                Operand::Repeated(value) => simd.splat_f32s(value),
            };
            simd.partial_store_f32s(rest, op.apply(simd, tail(x), tail(y)));
        }
    }
}
