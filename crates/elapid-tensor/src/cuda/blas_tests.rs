//! Matrix products of the emulation and, where there is one, the card against sums in f64.

use half::bf16;

use super::blas_host::round_to_tf32;
use super::tests::{emulation, gpus};
use super::{DeviceBuffer, Gpu, Matrix, Product};
use crate::DType;

/// What a gap holds: a product that reads it shows NaN, and no product may write it.
const GAP: f32 = f32::NAN;

/// A product to test. Strides are the width and a gap.
#[derive(Debug, Clone, Copy)]
struct Case {
    m: usize,
    n: usize,
    k: usize,
    batch: usize,
    transposed: (bool, bool),
    /// Every matrix of the batch is the same one.
    shared: (bool, bool),
    gap: usize,
    /// Elements before the first one of each buffer.
    offset: usize,
    inputs: DType,
    output: DType,
    alpha: f32,
    beta: f32,
    bias: bool,
    tf32: bool,
}

impl Case {
    fn new(m: usize, n: usize, k: usize) -> Self {
        Self {
            m,
            n,
            k,
            batch: 1,
            transposed: (false, false),
            shared: (false, false),
            gap: 0,
            offset: 0,
            inputs: DType::F32,
            output: DType::F32,
            alpha: 1.0,
            beta: 0.0,
            bias: false,
            tf32: false,
        }
    }
}

/// Types of inputs and output that there are products of.
const TYPES: [(DType, DType); 3] =
    [(DType::F32, DType::F32), (DType::BF16, DType::F32), (DType::BF16, DType::BF16)];

enum Buffer {
    F32(DeviceBuffer<f32>),
    BF16(DeviceBuffer<bf16>),
}

impl Buffer {
    fn new(gpu: &Gpu, dtype: DType, values: &[f32]) -> Self {
        if dtype == DType::F32 {
            return Self::F32(gpu.upload(values).unwrap());
        }
        let values: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
        Self::BF16(gpu.upload(&values).unwrap())
    }

    fn address(&self, offset: usize) -> u64 {
        match self {
            Self::F32(buffer) => buffer.address() + 4 * offset as u64,
            Self::BF16(buffer) => buffer.address() + 2 * offset as u64,
        }
    }

    fn read(&self) -> Vec<f32> {
        match self {
            Self::F32(buffer) => buffer.read().unwrap(),
            Self::BF16(buffer) => buffer.read().unwrap().into_iter().map(bf16::to_f32).collect(),
        }
    }
}

/// One matrix of a test: values by place in memory, gaps around them, and how they are found.
struct Operand {
    values: Vec<f32>,
    matrix: Matrix,
    offset: usize,
}

impl Operand {
    /// `shape` as the product sees it. `fill` gives the values in order.
    fn new(
        case: &Case,
        dtype: DType,
        shape: (usize, usize),
        transposed: bool,
        shared: bool,
        fill: &mut dyn FnMut() -> f32,
    ) -> Self {
        let (rows, width) = if transposed { (shape.1, shape.0) } else { shape };
        let stride = width + case.gap;
        let whole = rows * stride + 3 * case.gap;
        let (count, batch_stride) = if shared { (1, 0) } else { (case.batch, whole) };
        let mut values = vec![GAP; case.offset + count * whole];
        for index in 0..count {
            for row in 0..rows {
                let start = case.offset + index * whole + row * stride;
                for value in &mut values[start..start + width] {
                    *value = fill();
                    if dtype == DType::BF16 {
                        *value = bf16::from_f32(*value).to_f32();
                    }
                }
            }
        }
        let (rows, cols) = shape;
        let matrix = Matrix { address: 0, dtype, rows, cols, stride, transposed, batch_stride };
        Self { values, matrix, offset: case.offset }
    }

    fn place(&self, index: usize, row: usize, col: usize) -> usize {
        let (row, col) = if self.matrix.transposed { (col, row) } else { (row, col) };
        self.offset + index * self.matrix.batch_stride + row * self.matrix.stride + col
    }

    fn at(&self, index: usize, row: usize, col: usize) -> f64 {
        f64::from(self.values[self.place(index, row, col)])
    }

    fn upload(&mut self, gpu: &Gpu) -> Buffer {
        let buffer = Buffer::new(gpu, self.matrix.dtype, &self.values);
        self.matrix.address = buffer.address(self.offset);
        buffer
    }
}

/// Numbers in [-1, 1), the same ones every time.
fn numbers() -> impl FnMut() -> f32 {
    let mut state = 12345u32;
    move || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// Runs it twice and compares; gives C, gaps included.
fn check(gpu: &Gpu, case: Case) -> Vec<f32> {
    let mut next = numbers();
    let Case { m, n, k, .. } = case;
    let (inputs, shared, transposed) = (case.inputs, case.shared, case.transposed);
    let mut a = Operand::new(&case, inputs, (m, k), transposed.0, shared.0, &mut next);
    let mut b = Operand::new(&case, inputs, (k, n), transposed.1, shared.1, &mut next);
    // Without beta C is not to be read.
    let mut before = || if case.beta == 0.0 { f32::NAN } else { next() };
    let mut c = Operand::new(&case, case.output, (m, n), false, false, &mut before);
    let one = Case { batch: 1, gap: 0, ..case };
    let mut bias = Operand::new(&one, case.output, (1, n), false, false, &mut next);
    let _kept = [a.upload(gpu), b.upload(gpu), bias.upload(gpu)];

    let [first, second] = [(); 2].map(|()| {
        let output = c.upload(gpu);
        let product = Product {
            batch: case.batch,
            alpha: case.alpha,
            beta: case.beta,
            bias: if case.bias { bias.matrix.address } else { 0 },
            tf32: case.tf32,
            ..Product::new(a.matrix, b.matrix, c.matrix)
        };
        // SAFETY: the buffers hold what the matrices describe.
        unsafe { gpu.multiply(&product) }
            .unwrap_or_else(|error| panic!("{gpu}, {case:?}: {error}"));
        output.read()
    });
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&first), bits(&second), "{gpu}, {case:?}: other bits the second time");

    let mut written = vec![false; first.len()];
    for (index, row, col) in (0..case.batch * m * n).map(|i| (i / n / m, i / n % m, i % n)) {
        let terms = (0..k).map(|term| a.at(index, row, term) * b.at(index, term, col));
        let (sum, mut size) =
            terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
        let mut expected = f64::from(case.alpha) * sum;
        size *= f64::from(case.alpha).abs();
        let addends = [
            if case.beta == 0.0 { 0.0 } else { f64::from(case.beta) * c.at(index, row, col) },
            if case.bias { bias.at(0, 0, col) } else { 0.0 },
        ];
        for addend in addends {
            expected += addend;
            size += addend.abs();
        }
        // Up to 129 terms. In f32 each step rounds; tensor cores add several terms with a common exponent and cut;
        // TF32 cuts both factors. Then the output's rounding.
        let sums = match (case.tf32, inputs) {
            (true, DType::F32) => 2e-3,
            (false, DType::F32) => 4e-6,
            _ => 1e-5,
        };
        let output = if case.output == DType::F32 { 0.0 } else { 1.0 / 256.0 };
        // What is added to a product in bf16 may find it rounded.
        let product = if case.beta == 0.0 { 0.0 } else { f64::from(case.alpha) * sum };
        let limit = size * sums + (expected.abs() + product.abs()) * output;
        let place = c.place(index, row, col);
        written[place] = true;
        let got = f64::from(first[place]);
        assert!(
            (got - expected).abs() <= limit,
            "{gpu}, {case:?}: {got} for {expected} at {index}, {row}, {col}, allowed {limit:e}"
        );
    }
    for (place, value) in first.iter().enumerate() {
        assert!(written[place] || value.is_nan(), "{gpu}, {case:?}: wrote {value} at {place}");
    }
    first
}

#[test]
fn transposes_sizes_and_types() {
    for gpu in gpus() {
        for (m, n, k) in
            [(1, 1, 1), (3, 7, 5), (65, 33, 129), (64, 32, 48), (1, 40, 64), (40, 1, 8)]
        {
            for (inputs, output) in TYPES {
                for transposed in [(false, false), (false, true), (true, false), (true, true)] {
                    check(&gpu, Case { transposed, inputs, output, ..Case::new(m, n, k) });
                }
            }
        }
    }
}

#[test]
fn gaps_offsets_and_batches() {
    for gpu in gpus() {
        for (inputs, output) in TYPES {
            for transposed in [(false, false), (false, true), (true, false), (true, true)] {
                for (gap, offset) in [(0, 1), (3, 0), (8, 0), (5, 3)] {
                    let case =
                        Case { transposed, inputs, output, gap, offset, ..Case::new(9, 18, 11) };
                    check(&gpu, case);
                    for shared in [(false, false), (true, false), (false, true)] {
                        check(&gpu, Case { batch: 3, shared, ..case });
                    }
                }
            }
        }
    }
}

#[test]
fn factors_and_bias() {
    for gpu in gpus() {
        for (inputs, output) in TYPES {
            for (alpha, beta) in [(1.0, 0.0), (0.5, 1.0), (-2.0, -0.25), (0.0, 1.0)] {
                for (bias, offset, batch) in
                    [(false, 0, 1), (true, 0, 1), (true, 1, 1), (true, 0, 2)]
                {
                    if bias && beta != 0.0 && output == DType::BF16 {
                        continue;
                    }
                    let sizes = [Case::new(17, 24, 16), Case::new(5, 7, 3)];
                    for case in sizes {
                        check(
                            &gpu,
                            Case { inputs, output, alpha, beta, bias, offset, batch, ..case },
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn empty_products() {
    for gpu in gpus() {
        for (inputs, output) in TYPES {
            let types = Case { inputs, output, ..Case::new(0, 0, 0) };
            for (m, n, k) in [(0, 4, 3), (4, 0, 3), (0, 0, 0)] {
                check(&gpu, Case { m, n, k, bias: true, ..types });
            }
            check(&gpu, Case { m: 2, n: 3, k: 4, batch: 0, ..types });
            for (beta, bias) in [(0.0, false), (0.0, true), (2.0, false), (0.5, true)] {
                if bias && beta != 0.0 && output == DType::BF16 {
                    continue;
                }
                let case = Case { m: 5, n: 7, beta, bias, gap: 2, offset: 1, ..types };
                check(&gpu, case);
                check(&gpu, Case { batch: 3, ..case });
            }
        }
    }
}

#[test]
fn f32_is_rounded_only_if_allowed() {
    for gpu in gpus() {
        let case = Case::new(64, 64, 128);
        let exact = check(&gpu, case);
        let rounded = check(&gpu, Case { tf32: true, ..case });
        // A card may, the emulation does.
        if gpu.is_emulated() {
            assert_ne!(exact, rounded, "TF32 makes no difference");
        }
        let bf16 = Case { inputs: DType::BF16, ..case };
        assert_eq!(check(&gpu, bf16), check(&gpu, Case { tf32: true, ..bf16 }));
    }
    assert_eq!(round_to_tf32(1.0 + 1.0 / 1024.0), 1.0 + 1.0 / 1024.0);
    assert_eq!(round_to_tf32(1.0 + 1.0 / 2048.0), 1.0 + 1.0 / 1024.0);
    assert_eq!(round_to_tf32(-1.0 - 0.9 / 2048.0), -1.0);
    assert_eq!(round_to_tf32(f32::INFINITY), f32::INFINITY);
}

#[test]
fn rows_of_invariant_products_do_not_depend_on_their_number_and_place() {
    for gpu in gpus() {
        // Few terms and many, outputs as narrow as a selection and wide; a card has algorithms for each.
        let sizes: &[(usize, usize, usize)] = match gpu.is_emulated() {
            true => &[(9, 40, 24)],
            false => &[(9, 24, 40), (700, 80, 1536), (2500, 768, 1536), (9000, 192, 5120)],
        };
        let kinds = [(DType::BF16, 2048), (DType::F32, 2048), (DType::BF16, 64), (DType::F32, 64)];
        for (&(rows, n, k), (dtype, reference)) in
            sizes.iter().flat_map(|size| kinds.map(|kind| (size, kind)))
        {
            let mut number = numbers();
            let mut values = |count: usize| (0..count).map(|_| number()).collect::<Vec<f32>>();
            let (x, w) = (values(rows * k), values(n * k));
            let (x, w) = (Buffer::new(&gpu, dtype, &x), Buffer::new(&gpu, dtype, &w));
            let run = |first: usize, count: usize| {
                let y = Buffer::new(&gpu, dtype, &vec![0.0; count * n]);
                let product = Product {
                    invariant: Some(reference),
                    ..Product::new(
                        Matrix::contiguous(x.address(first * k), dtype, count, k),
                        Matrix::contiguous(w.address(0), dtype, n, k).transpose(),
                        Matrix::contiguous(y.address(0), dtype, count, n),
                    )
                };
                // SAFETY: rows of x, all of w and y.
                unsafe { gpu.multiply(&product) }.unwrap();
                y.read()
            };
            let all = run(0, rows);
            for (first, count) in [(0, 1), (1, 1), (rows - 1, 1), (1, 7), (2, rows / 2)] {
                let part = run(first, count);
                assert!(part == all[first * n..][..count * n], "{first} {count} of {rows} {n} {k}");
            }
        }
    }
}

#[test]
fn interleaved_outputs() {
    // Two heads side by side in one matrix: neither behind one another nor overlapping.
    for gpu in gpus() {
        let (x, w) =
            (gpu.upload(&[1f32, 2.0]).unwrap(), gpu.upload(&[3f32, 4.0, 5.0, 6.0]).unwrap());
        let y = gpu.zeros::<f32>(8).unwrap();
        let a = Matrix::contiguous(x.address(), DType::F32, 2, 1);
        let b = Matrix { batch_stride: 2, ..Matrix::contiguous(w.address(), DType::F32, 1, 2) };
        let c = Matrix::contiguous(y.address(), DType::F32, 2, 2);
        let product =
            Product { batch: 2, ..Product::new(a, b, Matrix { stride: 4, batch_stride: 2, ..c }) };
        // SAFETY: [2, 1], two of [1, 2], [2, 4].
        unsafe { gpu.multiply(&product) }.unwrap();
        assert_eq!(y.read().unwrap(), [3.0, 4.0, 5.0, 6.0, 6.0, 8.0, 10.0, 12.0]);
    }
}

#[test]
fn transposing_swaps_what_the_product_sees() {
    let matrix = Matrix::contiguous(256, DType::F32, 3, 5);
    let transpose = matrix.transpose();
    assert_eq!((transpose.rows, transpose.cols, transpose.stride), (5, 3, 5));
    assert_eq!(transpose.stored(), matrix.stored());
    assert_eq!(transpose.transpose(), matrix);
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(gpu) = emulation() else { return };
    let matrix = |rows, cols| Matrix::contiguous(0x1000, DType::F32, rows, cols);
    let good = Product::new(matrix(2, 3), matrix(3, 4), matrix(2, 4));
    let (a, b, c) = (good.a, good.b, good.c);
    let half = |matrix: Matrix| Matrix { dtype: DType::BF16, ..matrix };
    let cases = [
        (Product { b: half(b), ..good }, "a is f32, b bf16, c f32: expected"),
        (Product { c: half(c), ..good }, "a is f32, b f32, c bf16: expected"),
        (Product { a: Matrix { dtype: DType::F16, ..a }, ..good }, "a is f16"),
        (Product { a: matrix(2, 5), ..good }, "a is [2, 5], b [3, 4], c [2, 4]: expected [m, k]"),
        (Product { b: matrix(3, 5), ..good }, "b [3, 5]"),
        (Product { c: matrix(3, 4), ..good }, "c [3, 4]"),
        (Product { c: matrix(4, 2).transpose(), ..good }, "c is transposed"),
        (Product { a: Matrix { stride: 2, ..a }, ..good }, "rows of a are 2 elements apart"),
        (
            Product { b: Matrix { address: 0x1002, ..b }, ..good },
            "b starts at 0x1002: expected a multiple of 4",
        ),
        (Product { b: Matrix { address: 0, ..b }, ..good }, "b has no address"),
        (Product { a: Matrix { stride: usize::MAX / 2, ..a }, ..good }, "a ends beyond"),
        (Product { batch: 2, ..good }, "the matrices of c overlap"),
        (
            Product { batch: 2, c: Matrix { batch_stride: 7, ..c }, ..good },
            "the matrices of c overlap",
        ),
        (Product { batch: 1 << 40, ..good }, "a batch of 1099511627776"),
        (Product { bias: 0x1001, ..good }, "the bias starts at 0x1001"),
        (
            Product { bias: 0x1000, bias_dtype: DType::BF16, ..good },
            "the bias is bf16: expected f32",
        ),
    ];
    for (product, message) in cases {
        // SAFETY: refused before anything is read.
        let error = unsafe { gpu.multiply(&product) }.unwrap_err().to_string();
        assert!(error.contains(message), "{error}: expected {message}");
    }
}
