//! A matrix unit in plain loops: what `TDPBF16PS` computes, so that everything around it is tested on every machine.

use super::tiles::{COLUMNS, Operands, SIDE, TILE, Tiles};

/// Numbers below 2^-126 count as zero.
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}

fn bf16(bits: u16) -> f32 {
    flush(f32::from_bits(u32::from(bits) << 16))
}

/// `s + (e + o)` for 32 columns of two rows.
pub(super) fn block(s: f32, a: &[u16; COLUMNS], b: &[u16; COLUMNS]) -> f32 {
    let chain = |from: usize| {
        let columns = (from..COLUMNS).step_by(2);
        columns.fold(0.0, |sum, k| flush(bf16(a[k]).mul_add(bf16(b[k]), sum)))
    };
    flush(s + flush(chain(0) + chain(1)))
}

/// The unit.
pub(super) struct Emulated;

// SAFETY of all methods: the caller's.
impl Tiles for Emulated {
    unsafe fn begin() {}
    unsafe fn end() {}
    unsafe fn transpose(rows: &[*const u8; SIDE], offset: usize, to: *mut u8) {
        let to = to.cast::<u32>();
        for (r, row) in rows.iter().enumerate() {
            for c in 0..SIDE {
                // SAFETY: as above.
                unsafe {
                    let word = row.add(offset).cast::<u32>().add(c).read_unaligned();
                    to.add(c * SIDE + r).write(word);
                }
            }
        }
    }
    unsafe fn multiply<const M: usize, const N: usize>(operands: &Operands) {
        for (row, n, column) in
            (0..M * SIDE).flat_map(|row| (0..N * SIDE).map(move |c| (row, c / SIDE, c % SIDE)))
        {
            let mut s = 0.0f32;
            for at in 0..operands.blocks {
                // SAFETY: as above.
                unsafe {
                    let a = operands.rows[row / SIDE];
                    let a = a.add(row % SIDE * operands.stride + at * operands.step);
                    let a = a.cast::<[u16; COLUMNS]>().read_unaligned();
                    let tile = operands.pairs.add((at * 2 + n) * TILE).cast::<u16>();
                    let b = std::array::from_fn(|k| *tile.add((k / 2 * SIDE + column) * 2 + k % 2));
                    s = block(s, &a, &b);
                }
            }
            let tile = row / SIDE * 2 + n;
            // SAFETY: as above.
            unsafe { *operands.sums.add(tile * TILE / 4 + row % SIDE * SIDE + column) = s };
        }
    }
    fn ask(_: *const u8) {}
}
