//! One or two tokens: rows are read where they lie, four at a time.

use super::{BLOCK, Call, Copied, Element, ROW, Vectors, copy_token, grow, load_rest, width};

/// Rows that go together: their chains of additions overlap.
const ROWS: usize = 4;

/// # Safety
/// As [`super::by_encoding`], for `T` tokens.
#[inline(always)]
pub(super) unsafe fn product<L: Vectors, E: Element, const T: usize>(
    call: Call,
    x: &mut Vec<Copied>,
) {
    let blocks = call.columns.div_ceil(BLOCK);
    grow(x, T * blocks);
    // SAFETY: blocks of the tokens; rows of the call.
    unsafe {
        for block in 0..blocks {
            for t in 0..T {
                let from = call.x.add(t * call.x_stride + block * BLOCK);
                copy_token::<L, E>(from, width(call.columns, block), &mut x[block * T + t]);
            }
        }
        let x = x.as_ptr().cast();
        let mut row = 0;
        while row + ROWS <= call.rows {
            rows::<L, E, ROWS, T>(call, row, x);
            row += ROWS;
        }
        while row < call.rows {
            rows::<L, E, 1, T>(call, row, x);
            row += 1;
        }
    }
}

/// `R` rows from `row` on, up to four.
#[inline(always)]
unsafe fn rows<L: Vectors, E: Element, const R: usize, const T: usize>(
    call: Call,
    row: usize,
    x: *const f32,
) {
    let step = 2 * L::LANES;
    let from = call.weight.wrapping_add(row * call.row_bytes);
    // The rows to come, asked for at the pace of these.
    let mut next = from.wrapping_add(R * call.row_bytes);
    let mut y = [[0.0f32; ROWS]; T];
    // SAFETY: whole vectors of the rows and of the copied tokens, then copies of the rows' ends.
    unsafe {
        for block in 0..call.columns.div_ceil(BLOCK) {
            let columns = width(call.columns, block);
            let whole = columns / step * step;
            let from = from.add(block * BLOCK * E::BYTES);
            let x = x.add(block * T * ROW);
            let mut sums = [[L::zero(); ROWS]; T];
            let mut k = 0;
            while k < whole {
                let mut line = 0;
                while line < R * step * E::BYTES {
                    L::ask(next.wrapping_add(line));
                    line += 64;
                }
                next = next.wrapping_add(R * step * E::BYTES);
                let at = from.add(k * E::BYTES);
                let x = inputs::<L, T>(x.add(k));
                for r in 0..R {
                    let weights = E::load::<L>(at.add(r * call.row_bytes));
                    sums = add::<L, T>(weights, x, r, sums);
                }
                k += step;
            }
            if whole < columns {
                let at = from.add(whole * E::BYTES);
                let x = inputs::<L, T>(x.add(whole));
                for r in 0..R {
                    let weights = load_rest::<L, E>(at.add(r * call.row_bytes), columns - whole);
                    sums = add::<L, T>(weights, x, r, sums);
                }
            }
            for (sums, y) in sums.into_iter().zip(&mut y) {
                let sums = L::sums(sums);
                for r in 0..R {
                    y[r] = if block == 0 { sums[r] } else { y[r] + sums[r] };
                }
            }
        }
        for (t, y) in y.iter().enumerate() {
            let to = call.out.add(t * call.out_stride + row);
            to.copy_from_nonoverlapping(y.as_ptr(), R);
        }
    }
}

/// Two vectors of each copied token.
///
/// # Safety
/// They must be there.
#[inline(always)]
unsafe fn inputs<L: Vectors, const T: usize>(x: *const f32) -> [[L::Vector; 2]; T] {
    // SAFETY: the caller's.
    unsafe {
        let mut inputs = [[L::zero(); 2]; T];
        for (t, input) in inputs.iter_mut().enumerate() {
            let x = x.add(t * ROW);
            *input = [L::load(x), L::load(x.add(L::LANES))];
        }
        inputs
    }
}

/// Two vectors of row `r` with each token's. Sums go in and out as values, so that they stay in registers.
#[inline(always)]
unsafe fn add<L: Vectors, const T: usize>(
    weights: [L::Vector; 2],
    x: [[L::Vector; 2]; T],
    r: usize,
    mut sums: [[L::Vector; ROWS]; T],
) -> [[L::Vector; ROWS]; T] {
    for (sums, x) in sums.iter_mut().zip(x) {
        // SAFETY: the caller's.
        unsafe {
            sums[r] = L::mul_add(weights[0], x[0], sums[r]);
            sums[r] = L::mul_add(weights[1], x[1], sums[r]);
        }
    }
    sums
}
