//! Matrix products on a card through cuBLASLt.
//!
//! cuBLASLt counts by columns: rows of memory are its columns, so it is asked for C^T = B^T A^T, with b as its first
//! matrix and a as its second. Our n columns are then its rows, along which its bias runs. The algorithm is the
//! first one of its heuristic, which knows shapes, strides, types and alignment and measures nothing, so the same
//! product is always done the same way. It is kept with its descriptors for the next product of the same kind.
//!
//! Products whose rows must not depend on their number are all done by the algorithm for one number of them, among those that
//! walk all terms of an element in one piece: each of its tiles does the same whatever the others are.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::PoisonError;

use cudarc::cublaslt::result as lt;
use cudarc::cublaslt::sys;
use cudarc::driver::result as cu;
use cudarc::driver::sys::CUcontext;

use super::blas::{Matrix, Product};
use super::card::Card;
use super::error::{GpuError, Result};
use super::libraries::libraries;
use crate::DType;

/// Plans kept; beyond them all are made anew as needed (a plan is about 2 KB on the host).
const MOST_PLANS: usize = 4096;

/// The alignment that cuBLASLt distinguishes at most, in bytes; the workspace must have it.
const BEST_ALIGNMENT: u64 = 256;

/// What a card multiplies with: the library's handle, its workspace, the plans so far.
#[derive(Debug)]
pub(super) struct Multiplier {
    context: CUcontext,
    handle: sys::cublasLtHandle_t,
    /// Address and bytes of device memory that products use for partial sums, one after another in the stream's order.
    workspace: (u64, usize),
    plans: HashMap<Key, Plan>,
}

/// All that decides how a product is done: `address` and `bias` are alignments here.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    a: Matrix,
    b: Matrix,
    c: Matrix,
    batch: usize,
    bias: u64,
    tf32: bool,
    invariant: Option<usize>,
}

#[derive(Debug)]
struct Plan {
    operation: Operation,
    a: Layout,
    b: Layout,
    c: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

type Outcome<T> = std::result::Result<T, lt::CublasError>;

impl Card {
    /// # Safety
    /// As [`super::Gpu::multiply`], of a product that has passed its checks and is not empty.
    pub(super) unsafe fn multiply(&self, product: &Product) -> Result<()> {
        self.enter()?;
        let mut multiplier = self.multiplier.lock().unwrap_or_else(PoisonError::into_inner);
        let multiplier = match &mut *multiplier {
            Some(multiplier) => multiplier,
            empty => empty.insert(Multiplier::new(self)?),
        };
        // SAFETY: the caller's promise.
        unsafe { multiplier.multiply(self, product) }
    }

    fn blas<T>(&self, call: &'static str, product: &Product, outcome: Outcome<T>) -> Result<T> {
        outcome.map_err(|error| GpuError::Call {
            device: self.label(),
            call,
            message: format!("{error} for {product:?}"),
        })
    }
}

impl Multiplier {
    fn new(card: &Card) -> Result<Self> {
        libraries().cublaslt.check()?;
        // NVIDIA advises 32 MiB for Hopper and Blackwell, 4 MiB before: more leaves the heuristic free.
        let bytes = if card.capability().0 >= 9 { 64 << 20 } else { 32 << 20 };
        let address = card.allocate(bytes)?;
        match lt::create_handle() {
            Ok(handle) => {
                let (context, plans) = (card.context(), HashMap::new());
                Ok(Self { context, handle, workspace: (address, bytes), plans })
            }
            Err(error) => {
                card.release(address)?;
                let (device, call) = (card.label(), "cublasLtCreate");
                Err(GpuError::Call { device, call, message: error.to_string() })
            }
        }
    }

    unsafe fn multiply(&mut self, card: &Card, product: &Product) -> Result<()> {
        if self.plans.len() >= MOST_PLANS {
            self.plans.clear();
        }
        let plan = match self.plans.entry(Key::new(product)) {
            Entry::Occupied(plan) => plan.into_mut(),
            Entry::Vacant(place) => {
                let plan = Plan::new(self.handle, self.workspace.1, product);
                place.insert(card.blas("cublasLtMatmulAlgoGetHeuristic", product, plan)?)
            }
        };
        let outcome = plan.operation.set_bias(product);
        card.blas("cublasLtMatmulDescSetAttribute", product, outcome)?;
        let (alpha, beta) = (product.alpha, product.beta);
        // SAFETY: handle and descriptors are alive, alpha and beta are read before the call returns, the plan was made
        // for this workspace and these alignments; the rest is the caller's promise.
        let outcome = unsafe {
            lt::matmul(
                self.handle,
                plan.operation.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                product.b.address as *const c_void,
                plan.b.0,
                product.a.address as *const c_void,
                plan.a.0,
                product.c.address as *const c_void,
                plan.c.0,
                product.c.address as *mut c_void,
                plan.c.0,
                &plan.algorithm,
                self.workspace.0 as *mut c_void,
                self.workspace.1,
                card.stream().cast(),
            )
        };
        card.blas("cublasLtMatmul", product, outcome)
    }
}

impl Drop for Multiplier {
    fn drop(&mut self) {
        // SAFETY: both are this value's own; freeing memory waits for work that uses it. A failure has nobody to tell.
        unsafe {
            let _ = cu::ctx::set_current(self.context);
            let _ = cu::free_sync(self.workspace.0);
            let _ = lt::destroy_handle(self.handle);
        }
    }
}

impl Key {
    fn new(product: &Product) -> Self {
        let batch = product.batch;
        let matrix = |matrix: Matrix, alignment: u32| {
            let batch_stride = if batch > 1 { matrix.batch_stride } else { 0 };
            Matrix { address: alignment.into(), batch_stride, ..matrix }
        };
        let [a, b, c] = product.alignments();
        Self {
            a: matrix(product.a, a),
            b: matrix(product.b, b),
            c: matrix(product.c, c),
            batch,
            bias: if product.bias == 0 { 0 } else { alignment(product.bias).into() },
            tf32: product.rounds_inputs(),
            invariant: product.reference_rows(),
        }
    }
}

/// The largest power of two that divides `address`, as far as anybody asks.
fn alignment(address: u64) -> u32 {
    1 << (address | BEST_ALIGNMENT).trailing_zeros()
}

impl Matrix {
    /// Of every matrix of the batch. (What rows have beyond it, cuBLASLt sees from their stride.)
    fn alignment(&self, batch: usize) -> u32 {
        let step = if batch > 1 { self.batch_stride * self.dtype.size() } else { 0 };
        alignment(self.address | step as u64)
    }

    /// Memory as cuBLASLt sees it: our rows are its columns.
    fn layout(&self, batch: usize) -> Outcome<Layout> {
        use sys::cublasLtMatrixLayoutAttribute_t as A;
        let (rows, width) = self.stored();
        let made = lt::create_matrix_layout(
            kind(self.dtype),
            width as u64,
            rows as u64,
            self.stride as i64,
        );
        let layout = Layout(made?);
        if batch > 1 {
            layout.set(A::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &(batch as i32))?;
            let step = self.batch_stride as i64;
            layout.set(A::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &step)?;
        }
        Ok(layout)
    }
}

impl Product {
    fn rounds_inputs(&self) -> bool {
        self.tf32 && self.a.dtype == DType::F32
    }

    /// The number of rows whose algorithm it takes, if that is not its own.
    fn reference_rows(&self) -> Option<usize> {
        self.invariant.filter(|_| self.batch == 1 && !self.a.transposed)
    }

    /// Of a, b and c; if rows must not depend on where they begin, no more than every row has.
    fn alignments(&self) -> [u32; 3] {
        let own = |matrix: &Matrix| matrix.alignment(self.batch);
        let of_rows = |matrix: &Matrix| match self.reference_rows().is_some() {
            true => own(matrix).min(alignment((matrix.stride * matrix.dtype.size()) as u64)),
            false => own(matrix),
        };
        [of_rows(&self.a), own(&self.b), of_rows(&self.c)]
    }
}

fn kind(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
        _ => sys::cudaDataType::CUDA_R_32F,
    }
}

fn bytes_of<T>(value: &T) -> (*const c_void, usize) {
    (std::ptr::from_ref(value).cast(), size_of::<T>())
}

impl Plan {
    fn new(handle: sys::cublasLtHandle_t, workspace: usize, product: &Product) -> Outcome<Self> {
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        let batch = product.batch;
        let operation = Operation::new(product)?;
        let a = product.a.layout(batch)?;
        let b = product.b.layout(batch)?;
        let c = product.c.layout(batch)?;
        let preference = Preference(lt::create_matmul_pref()?);
        use sys::cublasLtReductionScheme_t as R;
        // Sums that are cut along k meet in f32: the other ways round parts to the type of c. Where they must not be cut,
        // there is no room for parts either.
        let (reduction, workspace) = match product.reference_rows().is_some() {
            true => (R::CUBLASLT_REDUCTION_SCHEME_NONE, 0),
            false => (R::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, workspace),
        };
        preference.set(P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(workspace as u64))?;
        preference.set(P::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &(reduction as u32))?;
        let [left, right, output] = product.alignments();
        for (attribute, alignment) in [
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, right),
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, left),
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, output),
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, output),
        ] {
            preference.set(attribute, &alignment)?;
        }
        let best = |a: &Layout, c: &Layout| {
            let (operation, preference) = (operation.0, preference.0);
            // SAFETY: the handle and all descriptors are alive.
            unsafe {
                lt::get_matmul_algo_heuristic(handle, operation, b.0, a.0, c.0, c.0, preference)
            }
        };
        let mut algorithm = None;
        if let Some(count) = product.reference_rows() {
            let rows = |matrix: Matrix| Matrix { rows: count, ..matrix };
            let best = best(&rows(product.a).layout(batch)?, &rows(product.c).layout(batch)?)?;
            // Should it be good for few rows only, another that does not cut sums is the next best.
            algorithm = Some(best.algo).filter(|algorithm| {
                let mut found = MaybeUninit::uninit();
                // SAFETY: as above; the library writes what it found there.
                let status = unsafe {
                    let (operation, found) = (operation.0, found.as_mut_ptr());
                    sys::cublasLtMatmulAlgoCheck(
                        handle, operation, b.0, a.0, c.0, c.0, algorithm, found,
                    )
                };
                status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
            });
        }
        let algorithm = match algorithm {
            Some(algorithm) => algorithm,
            None => best(&a, &c)?.algo,
        };
        Ok(Self { operation, a, b, c, algorithm })
    }
}

/// What is computed, apart from shapes.
#[derive(Debug)]
struct Operation(sys::cublasLtMatmulDesc_t);

impl Operation {
    fn new(product: &Product) -> Outcome<Self> {
        use sys::cublasLtMatmulDescAttributes_t as D;
        let compute = if product.rounds_inputs() {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
        } else {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
        };
        let operation = Self(lt::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F)?);
        // As it stands in memory (CUBLAS_OP_N, 0), or transposed (CUBLAS_OP_T, 1).
        operation.set(D::CUBLASLT_MATMUL_DESC_TRANSA, &i32::from(product.b.transposed))?;
        operation.set(D::CUBLASLT_MATMUL_DESC_TRANSB, &i32::from(product.a.transposed))?;
        if product.bias != 0 {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            operation.set(D::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            // The heuristic reads the bias's alignment from its address.
            operation.set_bias(product)?;
        }
        Ok(operation)
    }

    fn set_bias(&self, product: &Product) -> Outcome<()> {
        use sys::cublasLtMatmulDescAttributes_t as D;
        if product.bias == 0 {
            return Ok(());
        }
        self.set(D::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &product.bias)
    }

    /// `value` has the type that the attribute is documented with.
    fn set<T: Copy>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: &T,
    ) -> Outcome<()> {
        let (pointer, size) = bytes_of(value);
        // SAFETY: the descriptor is alive; the library checks the size.
        unsafe { lt::set_matmul_desc_attribute(self.0, attribute, pointer, size) }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: this value's own. A failure has nobody to tell.
        let _ = unsafe { lt::destroy_matmul_desc(self.0) };
    }
}

/// How a matrix lies in memory.
#[derive(Debug)]
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    /// `value` has the type that the attribute is documented with.
    fn set<T: Copy>(
        &self,
        attribute: sys::cublasLtMatrixLayoutAttribute_t,
        value: &T,
    ) -> Outcome<()> {
        let (pointer, size) = bytes_of(value);
        // SAFETY: the descriptor is alive; the library checks the size.
        unsafe { lt::set_matrix_layout_attribute(self.0, attribute, pointer, size) }
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: this value's own. A failure has nobody to tell.
        let _ = unsafe { lt::destroy_matrix_layout(self.0) };
    }
}

/// What the heuristic may choose from.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    /// `value` has the type that the attribute is documented with.
    fn set<T: Copy>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> Outcome<()> {
        let (pointer, size) = bytes_of(value);
        // SAFETY: the descriptor is alive; the library checks the size.
        unsafe { lt::set_matmul_pref_attribute(self.0, attribute, pointer, size) }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: this value's own. A failure has nobody to tell.
        let _ = unsafe { lt::destroy_matmul_pref(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_attribute_is_accepted() {
        if let Err(error) = libraries().cublaslt.check() {
            eprintln!("SKIPPED: descriptors of cuBLASLt: {error}");
            return;
        }
        let matrix = |rows, cols| Matrix {
            batch_stride: rows * cols,
            ..Matrix::contiguous(256, DType::BF16, rows, cols)
        };
        let product = Product {
            batch: 3,
            bias: 512,
            ..Product::new(matrix(8, 16), matrix(24, 16).transpose(), matrix(8, 24))
        };
        for product in [product, Product { batch: 1, bias: 0, ..product }] {
            let operation = Operation::new(&product).unwrap();
            let layout = product.b.layout(product.batch).unwrap();
            // Sizes are really checked.
            use sys::cublasLtMatmulDescAttributes_t as D;
            use sys::cublasLtMatrixLayoutAttribute_t as A;
            assert!(operation.set(D::CUBLASLT_MATMUL_DESC_TRANSA, &1u8).is_err());
            assert!(layout.set(A::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &1i32).is_err());
            // All is set before the heuristic, which then misses the handle.
            let error = Plan::new(std::ptr::null_mut(), 1 << 20, &product).unwrap_err();
            assert_eq!(error.0, sys::cublasStatus_t::CUBLAS_STATUS_NOT_INITIALIZED);
        }
    }

    #[test]
    fn plans_are_shared_by_what_decides_them() {
        let matrix = |address, rows, cols| Matrix::contiguous(address, DType::F32, rows, cols);
        let product = Product::new(matrix(512, 8, 16), matrix(1024, 16, 24), matrix(2048, 8, 24));
        let key = |product: Product| Key::new(&product);
        let moved = Matrix { address: 4096, batch_stride: 5, ..product.a };
        let same = Product { a: moved, alpha: 2.0, beta: 1.0, ..product };
        assert_eq!(key(product), key(same));
        let shifted = Matrix { address: 516, ..product.a };
        for other in [
            Product { a: shifted, ..product },
            Product { a: Matrix { stride: 17, ..product.a }, ..product },
            Product { bias: 256, ..product },
            Product { tf32: true, ..product },
            Product { invariant: Some(64), ..product },
            Product { invariant: Some(2048), ..product },
            Product { batch: 2, ..product },
        ] {
            assert_ne!(key(product), key(other), "{other:?}");
        }
        assert_eq!(shifted.alignment(1), 4);
        assert_eq!(product.a.alignment(1), 256);
        assert_eq!(Matrix { batch_stride: 6, ..product.a }.alignment(2), 8);
        // Rows of 64 bytes, beginning anywhere: an invariant product knows of no better alignment.
        let invariant = Product { invariant: Some(64), ..product };
        let next = Product { a: Matrix { address: 512 + 64, ..product.a }, ..invariant };
        assert_eq!((key(invariant), invariant.alignments()), (key(next), [64, 256, 32]));
    }
}
