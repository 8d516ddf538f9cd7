// y = W x for some columns x, one a sequence, with all weights read once: the sums of a block in shared memory, in one
// order whatever the number of columns and however the rest is cut.
//
// That order: the blocks of 32 terms are cut into SHARES runs; each run is summed on the tensor cores from 0 on, block
// after block, and the runs' sums are added in order; of W_out, whose runs are shared among blocks where columns are many, those
// of two runs first, so that half as many sums go through memory. Two ways lead there.
//   Few columns: a block's warps take a run each, for ROW_TILES tiles of 16 rows and COLUMN_TILES tiles of 8 columns, and
//   multiply from registers. Weights are asked for before the kernel waits for the one before it. Where a run has more blocks
//   than registers can wait for at once, they come through a ring of WARP_STAGES stages in shared memory, each warp's own:
//   to wait for some of the registers that are under way the compiler has the warp wait for all of them, so that a run takes
//   the memory's latency at every block, while copies are waited for in their order.
//   Many columns (COLUMN_WARPS > 0): the activations, which every block reads again, are what moves most, so blocks are
//   large. A warp owns a tile of rows and a part of the columns and goes through all runs; weights and activations come
//   through a ring of stages in shared memory, each byte once a block. As both lie in memory in the order of the tensor
//   cores' fragments, a stage is copied as it is and read without bank conflicts. Where tensor cores read shared memory
//   themselves (GROUPED), four warps of a group take the same columns, which are then read once for 64 rows.
#pragma once
#include "prelude.cuh"
#include "decode_layout.cuh"

#if QUANTISED
using Weights = Quantised;
#else
using Weights = Narrow;
#endif

constexpr int ROWS = ROW_TILES * TILE_ROWS;
constexpr int COLUMNS = COLUMN_TILES * TILE_COLUMNS;
// Of a column of sums in shared memory: lanes that write 8 rows of 4 columns meet no bank twice.
constexpr int STRIDE = ROWS + 4;
// Runs of a sum. Few rows of many terms have more.
constexpr int SHARES = 8;
constexpr int MANY_SHARES = 16;
constexpr bool WIDE = COLUMN_WARPS > 0;
// Warps that share the rows of a block of many: in whole groups where groups of four multiply.
constexpr int ROW_WARPS = GROUPED ? (ROW_TILES + 3) / 4 * 4 : ROW_TILES;
constexpr int WIDE_THREADS = ROW_WARPS * COLUMN_WARPS * WARP;
// Blocks on a multiprocessor where columns are few.
constexpr int FEW_COLUMNS_BLOCKS = COLUMN_WARPS == 0 && ROW_TILES * COLUMN_TILES <= 4 ? 2 : 1;
// Of the columns' factors in shared memory.
constexpr int FACTOR_BYTES = (COLUMNS * 4 + 127) / 128 * 128;
DEVICE float* sums_of(float* room) { return room + FACTOR_BYTES / 4; }
DEVICE const float* sums_of(const float* room) { return room + FACTOR_BYTES / 4; }
// W x, and the factors of columns.
struct Product {
    const uint8_t* weights;
    const uint8_t* x;        // activations
    int64_t row_tiles;       // of the weights
    int64_t first_tiles;     // of two parts of as many tiles, which blocks take in turn: tiles of one; or 0
    int64_t blocks;          // of 32 terms
    int64_t columns;
    const float* squares;    // [columns, square_count], sums of squares of parts of x before the norm's weight; or none
    const float* factors;    // [columns], what is made of them; or none
    int64_t square_count;
    float width;             // numbers that the squares are of
    float eps;
};

// The tile of weights that stands at a place in the order of blocks.
DEVICE int64_t tile_at(const Product& product, int64_t place) {
    return product.first_tiles ? place % 2 * product.first_tiles + place / 2 : place;
}

// For each of the block's columns 1 / sqrt(mean square + eps); 1 without squares.
template <int WARPS> DEVICE void column_factors(const Product& product, int64_t column0, float* factors) {
    if (WIDE || !product.squares || product.factors) {
        for (int column = threadIdx.x; column < COLUMNS; column += WARPS * WARP)
            factors[column] = product.factors && column0 + column < product.columns ? load_fresh(product.factors + column0 + column) : 1.0f;
        return;
    }
    constexpr int EACH = (COLUMNS + WARPS - 1) / WARPS;
    constexpr int AT_ONCE = EACH > 2 ? 2 : 8;
    float sums[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) sums[i] = 0.0f;
    for (int64_t part = lane_id(); part < product.square_count; part += AT_ONCE * WARP) {
        float parts[EACH][AT_ONCE];
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            int64_t column = column0 + warp_id() + i * WARPS;
            const float* from = product.squares + column * product.square_count;
            bool there = column < product.columns && warp_id() + i * WARPS < COLUMNS;
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                int64_t at = part + j * WARP;
                parts[i][j] = there && at < product.square_count ? load_fresh(from + at) : 0.0f;
            }
        }
#pragma unroll
        for (int i = 0; i < EACH; ++i)
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) sums[i] += parts[i][j];
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        float sum = warp_sum(sums[i]);
        int column = warp_id() + i * WARPS;
        if (lane_id() == 0 && column < COLUMNS) factors[column] = norm_factor(sum, product.width, product.eps);
    }
}

// A warp's sums into shared memory: from[column][row].
template <int COUNT> DEVICE void put_sums(float* from, int row_tile, int column_tile, const float (&sums)[COUNT][4]) {
    int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            from[((column_tile + n) * TILE_COLUMNS + 2 * t + i % 2) * STRIDE + row_tile * TILE_ROWS + g + i / 2 * 8] = sums[n][i];
}

// `room` holds the columns' factors, then the sums of the runs: [run][column][row], and before them the ring.
// `before` runs while weights are on their way, and must not read what earlier kernels write; `after` when it may, while the
// activations are on theirs.
template <int SPLIT, class Before, class After>
DEVICE void multiply_few(const Product& product, float* room, Before before, After after) {
    int64_t place0 = int64_t(blockIdx.x) * ROW_TILES, column_tile0 = int64_t(blockIdx.y) * COLUMN_TILES;
    int64_t share = ceil_div(product.blocks, SPLIT), first = warp_id() * share;
    int steps = int(most<int64_t>(0, least<int64_t>(share, product.blocks - first)));
    int64_t column_tiles = ceil_div(product.columns, TILE_COLUMNS);
    // Tiles behind the last read the last one again; their sums are not used.
    const uint8_t* weights[ROW_TILES];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
        weights[m] = product.weights
            + (tile_at(product, least(place0 + m, product.row_tiles - 1)) * product.blocks + first) * Weights::BYTES;
    const uint8_t* x[COLUMN_TILES];
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n)
        x[n] = product.x + (least(column_tile0 + n, column_tiles - 1) * product.blocks + first) * COLUMN_BLOCK;

    float sums[ROW_TILES][COLUMN_TILES][4];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
#if WARP_STAGES > 0
    constexpr int STAGE_WEIGHTS = ROW_TILES * Weights::BYTES, STAGE = STAGE_WEIGHTS + COLUMN_TILES * COLUMN_BLOCK;
    uint8_t* ring = reinterpret_cast<uint8_t*>(sums_of(room)) + warp_id() * (WARP_STAGES * STAGE);
    auto copy_weights = [&](int step, int stage) {
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
            Weights::copy(ring + stage * STAGE + m * Weights::BYTES, weights[m] + int64_t(step) * Weights::BYTES);
    };
    auto copy_columns = [&](int step, int stage) {
        uint8_t* to = ring + stage * STAGE + STAGE_WEIGHTS + lane_id() * 16;
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n)
            copy_async(to + n * COLUMN_BLOCK, x[n] + int64_t(step) * COLUMN_BLOCK + lane_id() * 16);
    };
    for (int step = 0; step < WARP_STAGES - 1 && step < steps; ++step) copy_weights(step, step);
    let_next_start();
    before();
    wait_for_previous();
    for (int step = 0; step < WARP_STAGES - 1; ++step) {
        if (step < steps) copy_columns(step, step);
        commit_copies();
    }
    after();
    column_factors<SPLIT>(product, column_tile0 * TILE_COLUMNS, room);
    int at_stage = 0, next_stage = WARP_STAGES - 1;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        // This step's stage is there, and every lane has read the one before, which is filled anew.
        wait_copies<WARP_STAGES - 2>();
        __syncwarp();
        if (step + WARP_STAGES - 1 < steps) {
            copy_weights(step + WARP_STAGES - 1, next_stage);
            copy_columns(step + WARP_STAGES - 1, next_stage);
        }
        commit_copies();
        const uint8_t* stage = ring + at_stage * STAGE;
        Pack<uint32_t, 4> b[COLUMN_TILES];
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n) b[n] = load_matrices(stage + STAGE_WEIGHTS + n * COLUMN_BLOCK);
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
            Weights a;
            a.load_shared(stage + m * Weights::BYTES);
            a.multiply(sums[m], b);
        }
        next_stage = at_stage;
        at_stage = at_stage + 1 == WARP_STAGES ? 0 : at_stage + 1;
    }
    // The sums go where other warps' stages were.
    wait_copies<0>();
    __syncthreads();
#else
    Weights a[AHEAD][ROW_TILES];
    Pack<uint32_t, 4> b[AHEAD][COLUMN_TILES];
#pragma unroll
    for (int j = 0; j < AHEAD; ++j)
        if (j < steps) {
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) a[j][m].load(weights[m] + j * Weights::BYTES);
        }
    let_next_start();
    before();
    wait_for_previous();
#pragma unroll
    for (int j = 0; j < AHEAD; ++j)
        if (j < steps) {
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; ++n) b[j][n] = load_columns(x[n] + j * COLUMN_BLOCK);
        }
    after();
    column_factors<SPLIT>(product, column_tile0 * TILE_COLUMNS, room);
    for (int base = 0; base < steps; base += AHEAD) {
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            int step = base + j, next = step + AHEAD;
            if (step < steps) {
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) a[j][m].multiply(sums[m], b[j]);
            }
            if (next < steps) {
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) a[j][m].load(weights[m] + int64_t(next) * Weights::BYTES);
#pragma unroll
                for (int n = 0; n < COLUMN_TILES; ++n) b[j][n] = load_columns(x[n] + int64_t(next) * COLUMN_BLOCK);
            }
        }
    }
#endif
    float* own = sums_of(room) + warp_id() * (COLUMNS * STRIDE);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) put_sums(own, m, 0, sums[m]);
    __syncthreads();
}

#if COLUMN_WARPS > 0

// Stages of the ring, of STAGE_BLOCKS blocks of terms each: a number that the runs and the sum are multiples of.
constexpr int STAGE_WEIGHTS = ROW_TILES * STAGE_BLOCKS * Weights::BYTES;
constexpr int STAGE_BYTES = STAGE_WEIGHTS + COLUMN_TILES * STAGE_BLOCKS * COLUMN_BLOCK;
constexpr int STAGES = RING_BYTES / STAGE_BYTES < 8 ? RING_BYTES / STAGE_BYTES : 8;
static_assert(STAGES >= 3, "a ring of three stages");
// With GOES_ON the tensor cores are at work while the next step's fragments are read, over the barrier between the steps of a
// run. They read the stage before still, so that the one before that is filled anew.
constexpr int FILLED = GOES_ON ? STAGES - 2 : STAGES - 1;
// Tiles of columns of a warp.
constexpr int OWN = COLUMN_TILES / COLUMN_WARPS;

// Of a warp: its tile of rows, which may be behind the block's last, and its first tile of columns.
DEVICE int own_row_tile() { return COLUMN_WARPS == 1 ? warp_id() : warp_id() % ROW_WARPS; }
DEVICE int own_column_tile() { return COLUMN_WARPS == 1 ? 0 : warp_id() / ROW_WARPS * OWN; }

// Of the runs [first_share, end_share): `end_of_share(share, sums)` is called with the sums of each, which it may change
// to those that the next one starts from.
template <class Before, class End, class Stored = Weights>
DEVICE void multiply_many(const Product& product, float* room, int first_share, int end_share, Before before, End end_of_share) {
    uint8_t* ring = reinterpret_cast<uint8_t*>(room) + FACTOR_BYTES;
    int64_t place0 = int64_t(blockIdx.x) * ROW_TILES, column_tile0 = int64_t(blockIdx.y) * COLUMN_TILES;
    int64_t share = ceil_div(product.blocks, SHARES);
    int64_t first = least<int64_t>(first_share * share, product.blocks);
    int steps = int(least<int64_t>(end_share * share, product.blocks) - first) / STAGE_BLOCKS;
    int64_t column_tiles = ceil_div(product.columns, TILE_COLUMNS);
    int thread = threadIdx.x;

    // Chunks of 16 bytes: those of a tile's blocks follow one another, in memory and in the stage, and a thread's have the
    // same places in every stage. It keeps where those of the first step are, in chunks from the start of the weights or the
    // activations, a word each (up to 64 GiB). Tiles behind the last are the last one again; their sums are not used.
    constexpr int TILE = STAGE_BLOCKS * Weights::BYTES / 16, CHUNKS = ROW_TILES * TILE;
    constexpr int COLUMN_TILE = STAGE_BLOCKS * COLUMN_BLOCK / 16, COLUMN_CHUNKS = COLUMN_TILES * COLUMN_TILE;
    uint32_t weights[(CHUNKS + WIDE_THREADS - 1) / WIDE_THREADS];
    uint32_t columns[(COLUMN_CHUNKS + WIDE_THREADS - 1) / WIDE_THREADS];
#pragma unroll
    for (int base = 0; base < CHUNKS; base += WIDE_THREADS) {
        int index = base + thread;
        int64_t tile = tile_at(product, least(place0 + index / TILE, product.row_tiles - 1));
        weights[base / WIDE_THREADS] = uint32_t((tile * product.blocks + first) * (Weights::BYTES / 16)) + index % TILE;
    }
#pragma unroll
    for (int base = 0; base < COLUMN_CHUNKS; base += WIDE_THREADS) {
        int index = base + thread;
        int64_t tile = least(column_tile0 + index / COLUMN_TILE, column_tiles - 1);
        columns[base / WIDE_THREADS] = uint32_t((tile * product.blocks + first) * (COLUMN_BLOCK / 16)) + index % COLUMN_TILE;
    }
    auto copy_weights = [&](int step, int stage) {
        uint8_t* to = ring + stage * STAGE_BYTES + thread * 16;
#pragma unroll
        for (int base = 0; base < CHUNKS; base += WIDE_THREADS)
            if (base + WIDE_THREADS <= CHUNKS || base + thread < CHUNKS)
                copy_async(to + base * 16, product.weights + uint64_t(weights[base / WIDE_THREADS] + uint32_t(step * TILE)) * 16);
    };
    auto copy_columns = [&](int step, int stage) {
        uint8_t* to = ring + stage * STAGE_BYTES + STAGE_WEIGHTS + thread * 16;
#pragma unroll
        for (int base = 0; base < COLUMN_CHUNKS; base += WIDE_THREADS)
            if (base + WIDE_THREADS <= COLUMN_CHUNKS || base + thread < COLUMN_CHUNKS)
                copy_async(to + base * 16, product.x + uint64_t(columns[base / WIDE_THREADS] + uint32_t(step * COLUMN_TILE)) * 16);
    };
    for (int step = 0; step < FILLED && step < steps; ++step) copy_weights(step, step);
    let_next_start();
    before();
    wait_for_previous();
    for (int step = 0; step < FILLED; ++step) {
        if (step < steps) copy_columns(step, step);
        commit_copies();
    }
    column_factors<ROW_WARPS * COLUMN_WARPS>(product, column_tile0 * TILE_COLUMNS, room);

    // Warps without rows multiply the last ones once more.
    int row_tile = least(own_row_tile(), ROW_TILES - 1);
    float sums[OWN][4];
#pragma unroll
    for (int n = 0; n < OWN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
    int share_steps = int(share) / STAGE_BLOCKS, step = 0;
    // The stage of the step, and the one that is filled anew.
    int at_stage = 0, next_stage = FILLED;
    auto begin = [&]() -> const uint8_t* {
        wait_copies<FILLED - 1>();
#if GROUPED
        show_to_tensor_cores();
#endif
        __syncthreads();
        return ring + at_stage * STAGE_BYTES;
    };
    auto fill = [&]() {
        if (step + FILLED < steps) {
            copy_weights(step + FILLED, next_stage);
            copy_columns(step + FILLED, next_stage);
        }
        commit_copies();
        at_stage = at_stage + 1 == STAGES ? 0 : at_stage + 1;
        next_stage = next_stage + 1 == STAGES ? 0 : next_stage + 1;
    };
    constexpr int COLUMN_TILE_BYTES = STAGE_BLOCKS * COLUMN_BLOCK;
    int own_weights = row_tile * STAGE_BLOCKS * Weights::BYTES, own_columns = STAGE_WEIGHTS + own_column_tile() * COLUMN_TILE_BYTES;
#pragma unroll 1
    for (int at_share = first_share; step < steps; ++at_share) {
        int end = least(steps, step + share_steps);
        if constexpr (GOES_ON) {
            Weights a[STAGE_BLOCKS];
            start_group(sums);
#pragma unroll 1
            for (; step < end; ++step) {
                const uint8_t* stage = begin();
                Stored::template multiply_on<COLUMN_TILE_BYTES>(sums, a, stage + own_weights, stage + own_columns, fill);
            }
            end_group(sums);
        } else {
#pragma unroll 1
            for (; step < end; ++step) {
                const uint8_t* stage = begin();
                Weights a[STAGE_BLOCKS];
#pragma unroll
                for (int k = 0; k < STAGE_BLOCKS; ++k) a[k].load_shared(stage + own_weights + k * Weights::BYTES);
#if GROUPED
                // The copies start while the tensor cores are at work.
                Stored::template multiply_shared<COLUMN_TILE_BYTES>(sums, a, stage + own_columns, fill);
#else
                fill();
#pragma unroll
                for (int k = 0; k < STAGE_BLOCKS; ++k) {
                    Pack<uint32_t, 4> b[OWN];
#pragma unroll
                    for (int n = 0; n < OWN; ++n) b[n] = load_matrices(stage + own_columns + n * COLUMN_TILE_BYTES + k * COLUMN_BLOCK);
                    a[k].multiply(sums, b);
                }
#endif
            }
        }
        end_of_share(at_share, sums);
    }
    // The ring is free for what comes.
    wait_copies<0>();
    __syncthreads();
}

// All runs. `after` runs when the sums are in registers, before the block's last barrier.
template <class Before, class After> DEVICE void multiply_whole(const Product& product, float* room, Before before, After after) {
    float totals[OWN][4];
#pragma unroll
    for (int n = 0; n < OWN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) totals[n][i] = 0.0f;
    multiply_many(product, room, 0, SHARES, before, [&](int, float(&sums)[OWN][4]) {
#pragma unroll
        for (int n = 0; n < OWN; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                totals[n][i] += sums[n][i];
                sums[n][i] = 0.0f;
            }
    });
    if (own_row_tile() < ROW_TILES) put_sums(sums_of(room), own_row_tile(), own_column_tile(), totals);
    after();
    __syncthreads();
}

#endif

// Threads of a kernel whose sums have SPLIT runs where columns are few.
template <int SPLIT> struct Block {
    static constexpr int THREADS = WIDE ? WIDE_THREADS : SPLIT * WARP;
    // After the product a thread keeps its row and goes through columns; some may have none.
    static constexpr int STEP = THREADS / ROWS;
    static constexpr int EACH = (COLUMNS + STEP - 1) / STEP;
};

template <int SPLIT, class Before, class After>
DEVICE void multiply(const Product& product, float* room, Before before, After after) {
#if COLUMN_WARPS > 0
    multiply_whole(product, room, before, after);
#else
    multiply_few<SPLIT>(product, room, before, after);
#endif
}

// The result's element of a row and column of the block; with PAIRED, sums of two runs are added first.
template <int SPLIT, bool PAIRED = false> DEVICE float total(const float* room, int row, int column) {
    constexpr int RUN = COLUMNS * STRIDE;
    const float* from = sums_of(room) + column * STRIDE + row;
    float sum = from[0];
    if (!WIDE && PAIRED) {
        sum += from[RUN];
#pragma unroll
        for (int part = 2; part < SPLIT; part += 2) sum += from[part * RUN] + from[(part + 1) * RUN];
    } else if (!WIDE) {
#pragma unroll
        for (int part = 1; part < SPLIT; ++part) sum += from[part * RUN];
    }
    return sum * room[column];
}

// The row of a thread: of the block, and of the weights.
template <int SPLIT> struct Own {
    int row, first_column;    // in the block; the first column is COLUMNS for threads without one
    int64_t tile, tile_row;   // of the weights; the tile is -1 behind the last

    DEVICE explicit Own(const Product& product) {
        row = threadIdx.x % ROWS;
        first_column = int(threadIdx.x) < Block<SPLIT>::STEP * ROWS ? threadIdx.x / ROWS : COLUMNS;
        int64_t place = int64_t(blockIdx.x) * ROW_TILES + row / TILE_ROWS;
        tile = place < product.row_tiles ? tile_at(product, place) : -1;
        tile_row = row % TILE_ROWS;
    }
    // The column of its i-th turn, or one behind the last.
    DEVICE int column(int i) const { return first_column + i * Block<SPLIT>::STEP; }
};
DEVICE int64_t sequence_of(int column) { return int64_t(blockIdx.y) * COLUMNS + column; }
