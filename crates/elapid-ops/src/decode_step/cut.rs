//! How the products of a decode step are cut into blocks of threads: the constants of `product.cuh`.

use elapid_tensor::cuda::{Gpu, Launch};

use super::{Encoding, Packed};

/// Runs of a sum, SHARES and MANY_SHARES of product.cuh.
pub(super) const SHARES: usize = 8;
const MANY_SHARES: usize = 16;

/// Most sequences of which each warp multiplies from registers.
const FEW: usize = 32;
/// Bytes of the rings of a block's warps where columns are few and multiprocessors have two blocks; and where they have one.
const WARP_RING_BYTES: usize = 96 << 10;
const LARGE_WARP_RING_BYTES: usize = 176 << 10;
/// Bytes of the ring in shared memory: two blocks of kernels that follow one another have room, or one.
const RING_BYTES: usize = 112 << 10;
const LARGE_RING_BYTES: usize = 200 << 10;
/// Most stages of a ring, as in product.cuh.
const MOST_STAGES: usize = 8;
/// From so many tiles of rows on, a block of 16 tiles of columns has a multiprocessor's registers to itself, and each warp
/// all of the columns.
const LARGE_ROW_TILES: usize = 7;

/// How many can multiply at once, whether groups of four warps do, and bytes of shared memory that a block can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Target {
    pub multiprocessors: usize,
    pub grouped: bool,
    pub shared: usize,
}

impl Target {
    pub(super) fn of(gpu: &Gpu) -> Self {
        // The emulation does as the newest card.
        let grouped = gpu.card().is_none_or(|card| card.capability() == (9, 0));
        let (multiprocessors, shared) = (gpu.multiprocessors(), gpu.shared_memory());
        Self { multiprocessors, grouped, shared }
    }
}

/// Tiles of 16 rows and of 8 columns that a block owns, and who shares what of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    row_tiles: usize,
    column_tiles: usize,
    /// Warps that share the columns; 0 where columns are few.
    column_warps: usize,
    /// Groups of four warps multiply.
    grouped: bool,
    /// Blocks that share a sum.
    parts: usize,
    /// Runs of a sum.
    shares: usize,
    /// No multiprocessor has two blocks at once.
    alone: bool,
    /// Multiprocessors shall have two.
    two: bool,
    /// Bytes of shared memory that a block can have.
    shared: usize,
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
    pub(super) fn of(target: Target, weights: &Packed, columns: usize) -> Self {
        Self::choose((weights.tiles(), weights.encoding()), columns, target, &[1])
    }

    /// Of a matrix with few rows, whose sums blocks may share where columns are many.
    pub(super) fn of_parts(target: Target, weights: &Packed, columns: usize) -> Self {
        Self::choose((weights.tiles(), weights.encoding()), columns, target, &[1, 2, 4])
    }

    /// Of a matrix with few rows and many terms: more runs.
    pub(super) fn of_many_terms(target: Target, weights: &Packed, columns: usize) -> Self {
        let column_tiles = columns.div_ceil(8);
        let mut cut = Self {
            row_tiles: 1,
            column_tiles: 1,
            column_warps: 0,
            grouped: false,
            parts: 1,
            shares: MANY_SHARES,
            alone: true,
            two: false,
            shared: target.shared,
        };
        while cut.column_tiles < 4
            && weights.tiles() * column_tiles.div_ceil(cut.column_tiles) > target.multiprocessors
        {
            cut.column_tiles *= 2;
        }
        cut
    }

    fn choose(
        (tiles, encoding): (usize, Encoding),
        columns: usize,
        target: Target,
        parts: &[usize],
    ) -> Self {
        let Target { multiprocessors, grouped, shared } = target;
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
            return Self {
                row_tiles,
                column_tiles,
                column_warps: 0,
                grouped: false,
                parts: 1,
                shares: SHARES,
                alone: tiles.div_ceil(row_tiles) <= multiprocessors,
                two: false,
                shared,
            };
        }
        let candidate = |row_tiles, column_tiles, parts| Self {
            row_tiles,
            column_tiles,
            // Eight warps at least, where there is work for them; large blocks have as many anyway.
            column_warps: match (column_tiles, row_tiles) {
                (4, _) => 1,
                (8, 5..) if grouped => 1,
                (16, 5..) if grouped && encoding == Encoding::Bf16 => 1,
                (_, LARGE_ROW_TILES..) => 1,
                _ => 2,
            },
            grouped,
            parts,
            shares: SHARES,
            alone: false,
            two: false,
            shared,
        };
        // Of many turns, two blocks on a multiprocessor: one's beginning and end beside the other's products.
        if grouped && tiles > 12 * multiprocessors && column_tiles >= 16 {
            return Self { two: true, ..candidate(4, 16, 1) };
        }
        let all = parts.iter().flat_map(|&parts| {
            [16, 8, 4].into_iter().flat_map(move |column_tiles| {
                // A block has at most 1,024 threads, and registers for two sums of each of a warp's columns; int8 wants a
                // third.
                let most = match column_tiles {
                    16 if grouped && encoding == Encoding::Bf16 => 12,
                    16 => LARGE_ROW_TILES - 1,
                    _ => 8,
                };
                (1..=most).map(move |row_tiles| candidate(row_tiles, column_tiles, parts))
            })
        });
        let fits = |cut: &Self| cut.column_tiles == 4 || cut.column_tiles < 2 * column_tiles;
        let time = |cut: &Self| cut.time(tiles, column_tiles, multiprocessors);
        all.filter(fits).fold(
            candidate(1, 4, 1),
            |best, cut| {
                if time(&cut) < time(&best) { cut } else { best }
            },
        )
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

    /// Warps that share the rows of a block of many.
    fn row_warps(&self) -> usize {
        if self.grouped { self.row_tiles.next_multiple_of(4) } else { self.row_tiles }
    }

    /// Blocks of terms of a stage of the ring, and the ring's bytes: no run ends within a stage. Stages of four and five
    /// need a larger ring and more registers, which blocks of 16 tiles of columns do not have.
    fn ring(&self, weights: &Packed) -> (usize, usize) {
        let (blocks, share) = (weights.blocks(), self.share(weights));
        let bytes = self.step_bytes(weights);
        let narrow = weights.encoding() == Encoding::Bf16;
        let wide = match self.column_tiles {
            16 => self.row_tiles >= 4,
            8 => (3..=4).contains(&self.row_tiles),
            _ => false,
        };
        let wide = wide && self.grouped && narrow && !self.two;
        let stages = |some: usize| {
            let large = some > 3 || self.row_tiles >= LARGE_ROW_TILES || wide;
            let ring = if large { LARGE_RING_BYTES } else { RING_BYTES };
            (self.room(ring) / (some * bytes)).min(MOST_STAGES)
        };
        let fits = |&some: &usize| {
            let able = some <= 3 || (self.grouped && self.column_tiles <= 8);
            able && share.is_multiple_of(some) && blocks.is_multiple_of(some) && stages(some) >= 3
        };
        let some = (1..=5).rev().find(fits).unwrap_or(1);
        (some, stages(some) * some * bytes)
    }

    /// Whether products go on over the barriers of a run of several steps, which wants two stages more.
    fn goes_on(&self, weights: &Packed) -> bool {
        let (some, ring) = self.ring(weights);
        let bytes = self.step_bytes(weights);
        self.grouped
            && weights.encoding() == Encoding::Bf16
            && some >= 2
            && self.share(weights) >= 2 * some
            && ring >= 5 * some * bytes
    }

    /// Blocks of terms of a run.
    fn share(&self, weights: &Packed) -> usize {
        weights.blocks().div_ceil(self.shares)
    }

    /// Where columns are few: blocks of terms that are under way to a warp's registers, and stages of its ring if a run has
    /// more of them, or 0.
    fn ahead(&self, weights: &Packed) -> (usize, usize) {
        let share = self.share(weights);
        // So many blocks in registers, and runs that still go through them.
        let (most, runs) = match (self.row_tiles, self.column_tiles) {
            (1, 1) => (6, 8),
            (1, 2) => (4, 4),
            (1, _) | (2, _) => (3, 3),
            _ => (2, 2),
        };
        let room = if self.alone { LARGE_WARP_RING_BYTES } else { WARP_RING_BYTES };
        let stages = (self.room(room) / (self.shares * self.step_bytes(weights))).min(8);
        (most.min(share), if share > runs && stages >= 3 { stages } else { 0 })
    }

    /// So many bytes for a ring, or what a block can have beside its columns' factors and their slots, which take no more.
    fn room(&self, bytes: usize) -> usize {
        bytes.min(self.shared.saturating_sub(2 * self.factor_bytes()))
    }

    /// Bytes of one block of terms of all tiles.
    fn step_bytes(&self, weights: &Packed) -> usize {
        self.row_tiles * weights.encoding().block_bytes() + 512 * self.column_tiles
    }

    fn factor_bytes(&self) -> usize {
        (4 * 8 * self.column_tiles).next_multiple_of(128)
    }

    pub(super) fn macros(&self, weights: &Packed) -> [(&'static str, String); 10] {
        let ((ahead, warp_stages), (stage_blocks, ring)) = match self.is_many() {
            true => ((1, 0), self.ring(weights)),
            false => (self.ahead(weights), (1, 0)),
        };
        [
            ("AHEAD", ahead.to_string()),
            ("WARP_STAGES", warp_stages.to_string()),
            ("ROW_TILES", self.row_tiles.to_string()),
            ("COLUMN_TILES", self.column_tiles.to_string()),
            ("COLUMN_WARPS", self.column_warps.to_string()),
            ("GROUPED", usize::from(self.grouped).to_string()),
            ("STAGE_BLOCKS", stage_blocks.to_string()),
            ("RING_BYTES", ring.to_string()),
            ("GOES_ON", usize::from(self.is_many() && self.goes_on(weights)).to_string()),
            ("PARTS", self.parts.to_string()),
        ]
    }

    /// `constants` numbers of each row have room behind the sums of many.
    pub(super) fn launch(&self, weights: &Packed, columns: usize, constants: usize) -> Launch {
        let (rows, width) = (16 * self.row_tiles, 8 * self.column_tiles);
        let sums = 4 * width * (rows + 4);
        let (threads, room) = if self.is_many() {
            let (_, ring) = self.ring(weights);
            let threads = 32 * self.row_warps() * self.column_warps;
            (threads, ring.max(sums + 4 * rows * constants))
        } else {
            let (_, stages) = self.ahead(weights);
            let ring = self.shares * stages * self.step_bytes(weights);
            (32 * self.shares, ring.max(self.shares * sums))
        };
        Launch {
            grid: [
                weights.tiles().div_ceil(self.row_tiles) as u32,
                columns.div_ceil(width) as u32,
                self.parts as u32,
            ],
            block: [threads as u32, 1, 1],
            shared: (self.factor_bytes() + room) as u32,
        }
    }
}

#[cfg(test)]
mod tests {
    use elapid_tensor::cuda::Gpu;

    use super::super::{Encoding, Packed, Source};
    use super::{Cut, Target};

    #[test]
    fn blocks_have_the_shared_memory_of_any_card() {
        let gpu = match Gpu::emulated() {
            Ok(gpu) => gpu,
            Err(error) => {
                eprintln!("SKIPPED: rings of weights on the emulation: {error}");
                return;
            }
        };
        let (rows, terms) = (160, 2560);
        let values = gpu.zeros::<f32>(rows * terms).unwrap();
        let source = Source::F32(values.slice());
        for encoding in [Encoding::Bf16, Encoding::Q8] {
            let weights = Packed::new(&gpu, source, (rows, terms), rows, encoding).unwrap();
            for (shared, grouped) in [(99 << 10, false), (163 << 10, false), (227 << 10, true)] {
                for multiprocessors in [1, 2, 5, 132] {
                    let target = Target { multiprocessors, grouped, shared };
                    for columns in [1, 16, 32, 33, 64, 128, 256] {
                        for cut in [
                            Cut::of(target, &weights, columns),
                            Cut::of_parts(target, &weights, columns),
                            Cut::of_many_terms(target, &weights, columns),
                        ] {
                            let slots = cut.factor_bytes();
                            let room = cut.launch(&weights, columns, 6).shared as usize + slots;
                            assert!(room <= shared, "{cut:?}: {room} bytes of {shared}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn blocks_fill_the_card_in_one_turn_where_they_can() {
        let target = Target { multiprocessors: 132, grouped: true, shared: 227 << 10 };
        let cut = |tiles, columns, parts: &[usize]| {
            let cut = Cut::choose((tiles, Encoding::Bf16), columns, target, parts);
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
        assert_eq!(cut(640, 256, &[1]), (10, 16, 1));
        assert_eq!(cut(512, 256, &[1]), (8, 16, 1));
        // The head.
        assert_eq!(cut(3143, 128, &[1]), (4, 16, 1));
        // out_proj.
        assert_eq!(cut(160, 128, &[1, 2, 4]), (5, 16, 4));
        assert_eq!(cut(160, 256, &[1, 2, 4]), (10, 16, 4));
        assert_eq!(cut(160, 1, &[1, 2, 4]), (1, 1, 1));
    }
}
