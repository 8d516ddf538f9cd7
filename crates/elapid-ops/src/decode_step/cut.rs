//! How the products of a decode step are cut into blocks of threads: the constants of `product.cuh`.

use elapid_tensor::cuda::{Gpu, Launch};

use super::Packed;

/// Runs of a sum, SHARES and MANY_SHARES of product.cuh.
pub(super) const SHARES: usize = 8;
const MANY_SHARES: usize = 16;

/// Most sequences of which each warp multiplies from registers.
const FEW: usize = 32;
/// Warps that share the columns of a block of many.
const COLUMN_WARPS: usize = 2;
/// STAGE_BLOCKS and RING_BYTES of product.cuh.
const STAGE_BLOCKS: usize = 2;
const RING_BYTES: usize = 112 << 10;

/// Tiles of 16 rows and of 8 columns that a block owns, and who shares what of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    row_tiles: usize,
    column_tiles: usize,
    /// 0 where columns are few.
    column_warps: usize,
    /// Blocks that share a sum.
    parts: usize,
    /// Runs of a sum.
    shares: usize,
}

impl Cut {
    /// Whether a step of this many columns multiplies through shared memory.
    pub(super) fn has_many(columns: usize) -> bool {
        columns > FEW
    }

    pub(super) fn is_many(&self) -> bool {
        self.column_warps > 0
    }

    /// Of a matrix with rows for all multiprocessors.
    pub(super) fn of(gpu: &Gpu, weights: &Packed, columns: usize) -> Self {
        Self::choose(weights.tiles(), columns, gpu.multiprocessors(), &[1])
    }

    /// Of a matrix with few rows, whose sums blocks may share where columns are many.
    pub(super) fn of_parts(gpu: &Gpu, weights: &Packed, columns: usize) -> Self {
        Self::choose(weights.tiles(), columns, gpu.multiprocessors(), &[1, 2, 4, 8])
    }

    /// Of a matrix with few rows and many terms: more runs.
    pub(super) fn of_many_terms(gpu: &Gpu, weights: &Packed, columns: usize) -> Self {
        let column_tiles = columns.div_ceil(8);
        let mut cut =
            Self { row_tiles: 1, column_tiles: 1, column_warps: 0, parts: 1, shares: MANY_SHARES };
        while cut.column_tiles < 4
            && weights.tiles() * column_tiles.div_ceil(cut.column_tiles) > gpu.multiprocessors()
        {
            cut.column_tiles *= 2;
        }
        cut
    }

    fn choose(tiles: usize, columns: usize, multiprocessors: usize, parts: &[usize]) -> Self {
        let column_tiles = columns.div_ceil(8);
        if !Self::has_many(columns) {
            // All blocks on the card at once; of more, such that two are on a multiprocessor.
            let row_tiles = match tiles.div_ceil(multiprocessors) {
                0..=2 => 1,
                some @ 3..=5 => some,
                _ if column_tiles > 2 => 5,
                _ => 4,
            };
            let column_tiles = column_tiles.next_power_of_two().min(4);
            let (column_warps, parts, shares) = (0, 1, SHARES);
            return Self { row_tiles, column_tiles, column_warps, parts, shares };
        }
        let all = parts.iter().flat_map(|&parts| {
            [16, 8, 4].into_iter().flat_map(move |column_tiles| {
                // A block has at most 1,024 threads, and registers for two sums of each of a warp's columns.
                let most = if column_tiles == 16 { 6 } else { 8 };
                (1..=most).map(move |row_tiles| Self {
                    row_tiles,
                    column_tiles,
                    column_warps: COLUMN_WARPS,
                    parts,
                    shares: SHARES,
                })
            })
        });
        let fits = |cut: &Self| cut.column_tiles == 4 || cut.column_tiles < 2 * column_tiles;
        let time = |cut: &Self| cut.time(tiles, column_tiles, multiprocessors);
        let first = Self {
            row_tiles: 1,
            column_tiles: 4,
            column_warps: COLUMN_WARPS,
            parts: 1,
            shares: SHARES,
        };
        all.filter(fits).fold(first, |best, cut| if time(&cut) < time(&best) { cut } else { best })
    }

    /// What the busiest multiprocessor reads, in arbitrary units: a tile of rows twice as much as one of columns.
    fn time(&self, tiles: usize, column_tiles: usize, multiprocessors: usize) -> usize {
        let blocks =
            tiles.div_ceil(self.row_tiles) * column_tiles.div_ceil(self.column_tiles) * self.parts;
        // Sums that others add are written and read again.
        let joining = if self.parts > 1 { 4 * self.parts } else { 0 };
        blocks.div_ceil(multiprocessors)
            * (16 * (2 * self.row_tiles + self.column_tiles) / self.parts + joining)
    }

    pub(super) fn macros(&self, weights: &Packed) -> [(&'static str, String); 5] {
        let share = if self.is_many() { 1 } else { weights.blocks().div_ceil(self.shares) };
        [
            ("SHARE", share.to_string()),
            ("ROW_TILES", self.row_tiles.to_string()),
            ("COLUMN_TILES", self.column_tiles.to_string()),
            ("COLUMN_WARPS", self.column_warps.to_string()),
            ("PARTS", self.parts.to_string()),
        ]
    }

    pub(super) fn launch(&self, weights: &Packed, columns: usize) -> Launch {
        let (rows, width) = (16 * self.row_tiles, 8 * self.column_tiles);
        let sums = 4 * width * (rows + 4);
        let (threads, room) = if self.is_many() {
            let stage = STAGE_BLOCKS
                * (self.row_tiles * weights.encoding().block_bytes() + 512 * self.column_tiles);
            let ring = (RING_BYTES / stage).min(8) * stage;
            (32 * self.row_tiles * self.column_warps, ring.max(sums))
        } else {
            (32 * self.shares, self.shares * sums)
        };
        Launch {
            grid: [
                weights.tiles().div_ceil(self.row_tiles) as u32,
                columns.div_ceil(width) as u32,
                self.parts as u32,
            ],
            block: [threads as u32, 1, 1],
            shared: (4 * width + room) as u32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Cut;

    #[test]
    fn blocks_fill_the_card_in_one_turn_where_they_can() {
        let cut = |tiles, columns, parts: &[usize]| {
            let cut = Cut::choose(tiles, columns, 132, parts);
            (cut.row_tiles, cut.column_tiles, cut.parts)
        };
        // in_proj of 130m, 1.4b, 2.8b.
        assert_eq!(cut(192, 1, &[1]), (1, 1, 1));
        assert_eq!(cut(640, 16, &[1]), (5, 2, 1));
        assert_eq!(cut(640, 32, &[1]), (5, 4, 1));
        assert_eq!(cut(640, 128, &[1]), (5, 16, 1));
        assert_eq!(cut(512, 128, &[1]), (4, 16, 1));
        assert_eq!(cut(192, 128, &[1]), (3, 8, 1));
        assert_eq!(cut(640, 64, &[1]), (5, 8, 1));
        // out_proj.
        assert_eq!(cut(160, 128, &[1, 2, 4, 8]), (5, 16, 4));
        assert_eq!(cut(160, 1, &[1, 2, 4, 8]), (1, 1, 1));
    }
}
