//! Matrix products in device memory: what is asked for, the checks, and the choice of who does it.
//!
//! A card multiplies through cuBLASLt (`blas_card.rs`), the emulation in plain Rust (`blas_host.rs`); both are given
//! the same checked [`Product`]. A product of no terms (k = 0) is only C scaled and the bias added: a kernel of
//! `blas.cu` on both.

use super::blas_host;
use super::error::{GpuError, Result};
use super::gpu::{Driver, Gpu, Launch};
use super::source::{KernelArguments, Source};
use crate::DType;

/// A matrix in device memory, or a batch of them: rows x cols as the product sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Matrix {
    /// Address of the first element: a multiple of the element's size, no more is asked.
    pub address: u64,
    /// F32 or BF16.
    pub dtype: DType,
    /// Rows as the product sees them.
    pub rows: usize,
    /// Columns as the product sees them.
    pub cols: usize,
    /// Elements from one row of memory (column of the matrix if `transposed`) to the next; neighbours within it are
    /// adjacent.
    pub stride: usize,
    /// Memory holds the transpose.
    pub transposed: bool,
    /// Elements from one matrix of a batch to the next; 0: it is the same one.
    pub batch_stride: usize,
}

impl Matrix {
    /// Rows without gaps; every matrix of a batch is this one until `batch_stride` is set.
    pub fn contiguous(address: u64, dtype: DType, rows: usize, cols: usize) -> Self {
        Self { address, dtype, rows, cols, stride: cols, transposed: false, batch_stride: 0 }
    }

    /// The transpose, of the same memory.
    pub fn transpose(self) -> Self {
        Self { rows: self.cols, cols: self.rows, transposed: !self.transposed, ..self }
    }

    /// Rows and width of what lies in memory.
    pub(super) fn stored(&self) -> (usize, usize) {
        if self.transposed { (self.cols, self.rows) } else { (self.rows, self.cols) }
    }
}

/// C = alpha A B + beta C + bias, once or for every matrix of a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Product {
    /// `[m, k]`, F32 or BF16.
    pub a: Matrix,
    /// `[k, n]`, of the type of `a`.
    pub b: Matrix,
    /// `[m, n]`, not transposed: F32, or BF16 if the inputs are. Must not share memory with `a` or `b`, and the
    /// matrices of a batch not with each other.
    pub c: Matrix,
    /// Number of products.
    pub batch: usize,
    /// Factor of A B.
    pub alpha: f32,
    /// Factor of what C held before; 0: it is not read. Where C is BF16, A B may be rounded to it before that is added
    /// (cuBLASLt does; measured on an H200), so there must be no bias then.
    pub beta: f32,
    /// Address of `[n]` numbers that are added to every row of every C; 0 without a bias.
    pub bias: u64,
    /// Type of the bias: that of `c`, as cuBLASLt asks. Ignored without a bias.
    pub bias_dtype: DType,
    /// Lets products of F32 round their inputs to TF32 (10 bits after the point); of no effect on BF16.
    pub tf32: bool,
    /// A row of C has the same bits whatever the number of rows and wherever it is among them: all numbers of rows share
    /// the algorithm for this many. Where the library has that one for many rows only, few have another, and other bits. Of
    /// no effect on batches and on a transposed `a`.
    pub invariant: Option<usize>,
}

impl Product {
    /// C = A B: one product, no bias, F32 kept as F32.
    pub fn new(a: Matrix, b: Matrix, c: Matrix) -> Self {
        let (batch, alpha, beta, bias) = (1, 1.0, 0.0, 0);
        let (bias_dtype, tf32, invariant) = (c.dtype, false, None);
        Self { a, b, c, batch, alpha, beta, bias, bias_dtype, tf32, invariant }
    }

    fn check(&self) -> Result<()> {
        let Self { a, b, c, .. } = self;
        let output = c.dtype == DType::F32 || c.dtype == a.dtype;
        if !matches!(a.dtype, DType::F32 | DType::BF16) || b.dtype != a.dtype || !output {
            return refused(format!(
                "a is {}, b {}, c {}: expected f32 x f32 -> f32 or bf16 x bf16 -> f32 or bf16",
                a.dtype.name(),
                b.dtype.name(),
                c.dtype.name()
            ));
        }
        if a.cols != b.rows || (a.rows, b.cols) != (c.rows, c.cols) {
            return refused(format!(
                "a is [{}, {}], b [{}, {}], c [{}, {}]: expected [m, k], [k, n], [m, n]",
                a.rows, a.cols, b.rows, b.cols, c.rows, c.cols
            ));
        }
        if c.transposed {
            return refused("c is transposed: expected rows (C^T = B^T A^T does as well)".into());
        }
        // The driver's bound on a batch.
        if i32::try_from(self.batch).is_err() {
            return refused(format!("a batch of {}: expected at most {}", self.batch, i32::MAX));
        }
        for (name, matrix) in [("a", a), ("b", b), ("c", c)] {
            matrix.check(name, self.batch)?;
        }
        let ((rows, width), step) = (c.stored(), c.batch_stride);
        let behind = step >= rows.saturating_sub(1) * c.stride + width;
        let beside = step >= width && self.batch.saturating_sub(1) * step + width <= c.stride;
        if self.batch > 1 && rows * width > 0 && !behind && !beside {
            return refused(format!(
                "the matrices of c overlap: {rows} rows of {width}, {} apart, the next matrix {step} further",
                c.stride
            ));
        }
        if self.bias != 0 && self.beta != 0.0 && c.dtype == DType::BF16 {
            return refused("c is bf16, read and given a bias: expected one of the two".into());
        }
        if self.bias != 0 {
            let (got, expected) = (self.bias_dtype, c.dtype);
            if got != expected {
                return refused(format!(
                    "the bias is {}: expected {}, the type of c",
                    got.name(),
                    expected.name()
                ));
            }
            check_address("the bias", self.bias, expected)?;
        }
        Ok(())
    }
}

impl Matrix {
    fn check(&self, name: &str, batch: usize) -> Result<()> {
        let (rows, width) = self.stored();
        if self.stride < width {
            return refused(format!(
                "rows of {name} are {} elements apart in memory: expected at least their width, {width}",
                self.stride
            ));
        }
        let last = |count: usize, stride: usize| count.saturating_sub(1).checked_mul(stride);
        let bytes = last(rows, self.stride)
            .and_then(|rows| rows.checked_add(width))
            .and_then(|one| one.checked_add(last(batch, self.batch_stride)?))
            .and_then(|elements| elements.checked_mul(self.dtype.size()));
        if bytes.is_none_or(|bytes| i64::try_from(bytes).is_err()) {
            return refused(format!("{name} ends beyond 2^63 bytes: {self:?}, batch {batch}"));
        }
        if rows > 0 && width > 0 && batch > 0 {
            if self.address == 0 {
                return refused(format!(
                    "{name} has no address: expected memory for [{}, {}]",
                    self.rows, self.cols
                ));
            }
            check_address(name, self.address, self.dtype)?;
        }
        Ok(())
    }
}

fn check_address(name: &str, address: u64, dtype: DType) -> Result<()> {
    if address.is_multiple_of(dtype.size() as u64) {
        return Ok(());
    }
    refused(format!(
        "{name} starts at {address:#x}: expected a multiple of {}, the size of {}",
        dtype.size(),
        dtype.name()
    ))
}

fn refused(message: String) -> Result<()> {
    Err(GpuError::Kernel { kernel: "multiply".into(), source_name: "blas", message })
}

static BLAS: Source = Source { name: "blas", text: include_str!("blas.cu"), headers: &[] };

#[repr(C)]
#[derive(Clone, Copy)]
struct WithoutTermsArguments {
    c: u64,
    bias: u64,
    batch: i64,
    batch_stride: i64,
    rows: i64,
    width: i64,
    stride: i64,
    beta: f64,
}
// SAFETY: the layout of `WithoutTermsArguments` in blas.cu.
unsafe impl KernelArguments for WithoutTermsArguments {}

impl Gpu {
    /// C = alpha A B + beta C + bias, after all earlier work.
    ///
    /// Sums are f32 or better: f32 inputs are taken as they are unless `tf32` allows less, bf16 inputs are widened, no
    /// partial sum is rounded to bf16. The same product gives the same bits again on the same card and library. But
    /// the order of a sum depends on all extents: a row's bits may differ with the number of rows beside it, unless the
    /// product is [`Product::invariant`].
    ///
    /// The first product of a kind (extents, strides, types, alignment) loads code and, the very first, allocates: run
    /// each once before its launches are captured in a graph. Later ones allocate nothing.
    ///
    /// # Errors
    /// If types, extents, strides or addresses do not fit together, cuBLASLt is missing or has no way to do it, or the
    /// driver refuses.
    ///
    /// # Safety
    /// The matrices and the bias must lie in memory of this GPU as described, and nothing else may write there
    /// meanwhile. (Buffers may be dropped once this call has returned.)
    pub unsafe fn multiply(&self, product: &Product) -> Result<()> {
        product.check()?;
        if product.batch == 0 || product.c.rows == 0 || product.c.cols == 0 {
            return Ok(());
        }
        if product.a.cols == 0 {
            // SAFETY: the caller's promise about c and the bias.
            return unsafe { self.without_terms(product) };
        }
        let Product { a, b, c, batch, .. } = *product;
        let name = || {
            let sides = |matrix: &Matrix| if matrix.transposed { "T" } else { "" };
            let (ta, tb) = (sides(&a), sides(&b));
            let types = format!("{} to {}", a.dtype, c.dtype);
            format!("product {batch} x {} x {} x {} A{ta} B{tb}, {types}", c.rows, c.cols, a.cols)
        };
        self.timed(name, || {
            let turn = self.turn();
            match self.driver() {
                // SAFETY: the caller's promise; checked above.
                Driver::Card(card) => unsafe { card.multiply(product) },
                Driver::Host => {
                    let product = *product;
                    turn.host(move || {
                        // SAFETY: as above.
                        unsafe { blas_host::multiply(&product) };
                    });
                    Ok(())
                }
            }
        })
    }

    /// C = beta C + bias.
    ///
    /// # Safety
    /// As [`Gpu::multiply`].
    unsafe fn without_terms(&self, product: &Product) -> Result<()> {
        let c = &product.c;
        let element = if c.dtype == DType::F32 { "float" } else { "bf16" };
        let kernel = self.module(&BLAS, &[("ELEMENT", element)])?.kernel("without_terms")?;
        let arguments = WithoutTermsArguments {
            c: c.address,
            bias: product.bias,
            batch: product.batch as i64,
            batch_stride: c.batch_stride as i64,
            rows: c.rows as i64,
            width: c.cols as i64,
            stride: c.stride as i64,
            beta: f64::from(product.beta),
        };
        let blocks = (product.batch * c.rows * c.cols).div_ceil(256).min(1024);
        // SAFETY: the kernel stays within c as described, and reads width elements of the bias.
        unsafe { self.launch(&kernel, Launch::linear(blocks as u32, 256), &arguments) }
    }
}
