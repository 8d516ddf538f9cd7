// The projections of a decode step, with what stands around them. The norm is folded in: its weight was multiplied into x
// when x was written, and what is left, the factor of a whole column, multiplies the sums.
//
// Macros: QUANTISED (0: bf16, 1: int8 with scales), ROW_TILES, COLUMN_TILES, COLUMN_WARPS (0: few columns), GROUPED (1: groups
// of four warps multiply), STAGE_BLOCKS, RING_BYTES, GOES_ON (1: products go on over the barriers between steps), PARTS (blocks
// that share a sum); where columns are few, AHEAD (blocks of terms under way to registers) and WARP_STAGES (stages of a warp's ring, or 0); TAPS of the convolution.
#include "prelude.cuh"
#include "decode_product.cuh"
#include "decode_ranking.cuh"
#include "decode_input.cuh"

// ---- Rows as they are: Δ's input with B and C, and logits ------------------------------------------------------

struct RowsArguments {
    Product product;
    float* out;               // [columns, rows], `stride` apart
    int64_t rows;
    int64_t stride;
    uint64_t* best;           // [columns, row tiles]: the highest rank of 16 rows, for the choice of tokens; or none
};

template <int SPLIT> DEVICE void project_rows(const RowsArguments& args, float* room) {
    Own<SPLIT> own(args.product);
    int64_t row = own.tile * TILE_ROWS + own.tile_row;
    bool has_row = own.tile >= 0 && row < args.rows;
    multiply<SPLIT>(args.product, room, []() {}, []() {});
#pragma unroll 4
    for (int i = 0; i < Block<SPLIT>::EACH; ++i) {
        int column = own.column(i);
        if (!has_row || column >= COLUMNS || sequence_of(column) >= args.product.columns) break;
        float value = total<SPLIT>(room, own.row, column);
        args.out[sequence_of(column) * args.stride + row] = value;
        // Nobody else reads this place before the barrier.
        if (args.best) sums_of(room)[column * STRIDE + own.row] = value;
    }
    if (!args.best) return;
    __syncthreads();
    for (int item = threadIdx.x; item < ROW_TILES * COLUMNS; item += blockDim.x) {
        int column = item % COLUMNS, tile = item / COLUMNS;
        int64_t place = int64_t(blockIdx.x) * ROW_TILES + tile, first = place * TILE_ROWS;
        if (place >= args.product.row_tiles || sequence_of(column) >= args.product.columns) continue;
        uint64_t best = 0;
#pragma unroll
        for (int four = 0; four < TILE_ROWS; four += 4) {
            Pack<float, 4> values = load_pack<float, 4>(sums_of(room) + column * STRIDE + tile * TILE_ROWS + four);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (first + four + i < args.rows) best = most(best, rank_of(values.at[i], uint32_t(first + four + i)));
        }
        args.best[sequence_of(column) * args.product.row_tiles + place] = best;
    }
}

// Two blocks of many columns where cut.rs wants them, with 128 registers, which int8 has no use for.
constexpr int ROWS_BLOCKS = WIDE && !QUANTISED && ROW_TILES <= 4 && COLUMN_TILES == 16 ? 2 : FEW_COLUMNS_BLOCKS;

KERNEL(decode_rows, RowsArguments, Block<SHARES>::THREADS, ROWS_BLOCKS) {
    DYNAMIC_SHARED(float, room);
    project_rows<SHARES>(args, room);
}

#if COLUMN_WARPS == 0
KERNEL(decode_selection, RowsArguments, MANY_SHARES * WARP, 1) {
    DYNAMIC_SHARED(float, room);
    project_rows<MANY_SHARES>(args, room);
}
#endif

// ---- Back to the residual stream ------------------------------------------------------------------------------

struct OutputArguments {
    Product product;
    const float* bias;         // [D], or none
    float* residual;           // [columns, D]
    const float* norm;         // the next norm's weight [D]
    bf16* x;                   // activations [columns, D]: residual times that weight; none if a kernel of its own norms
    float* squares;            // [columns, row tiles]: sums of squares of 16 numbers of the residual
    int64_t rows;              // D
    int64_t row_blocks;        // blocks of 32 of D
};

#if COLUMN_WARPS == 0
KERNEL(decode_output, OutputArguments, SHARES * WARP, FEW_COLUMNS_BLOCKS) {
    DYNAMIC_SHARED(float, room);
    Own<SHARES> own(args.product);
    int64_t row = own.tile * TILE_ROWS + own.tile_row;
    bool has_row = own.tile >= 0 && row < args.rows;
    float bias = 0.0f, norm = 0.0f;
    // Of few columns the residual stream is asked for early.
    constexpr int EACH = Block<SHARES>::EACH;
    constexpr bool EARLY = EACH <= 3;
    float before[EARLY ? EACH : 1];
    auto residual_of = [&](int column) {
        bool filled = column < COLUMNS && sequence_of(column) < args.product.columns;
        return filled && has_row ? args.residual + sequence_of(column) * args.rows + row : nullptr;
    };
    multiply<SHARES>(
        args.product, room,
        [&]() {
            if (!has_row) return;
            if (args.bias) bias = args.bias[row];
            norm = args.norm[row];
        },
        [&]() {
#pragma unroll
            for (int i = 0; EARLY && i < EACH; ++i) {
                const float* residual = residual_of(own.column(i));
                before[i] = residual ? load_fresh(residual) : 0.0f;
            }
        });
    // Every thread takes part in the sums of squares.
#pragma unroll EARLY ? EACH : 2
    for (int i = 0; i < EACH; ++i) {
        int column = own.column(i);
        float* residual = residual_of(column);
        float value = 0.0f;
        if (residual) {
            value = total<SHARES, true>(room, own.row, column) + bias + (EARLY ? before[EARLY ? i : 0] : load_fresh(residual));
            *residual = value;
            if (args.x) args.x[activation_place(sequence_of(column), row, args.row_blocks)] = from_float<bf16>(value * norm);
        }
        float squares = warp_sum<TILE_ROWS>(value * value);
        if (args.x && own.tile_row == 0 && residual)
            args.squares[sequence_of(column) * args.product.row_tiles + own.tile] = squares;
    }
}
#else

// Where rows are too few for all multiprocessors, PARTS blocks share the runs of a sum, and decode_join adds them.
struct PartArguments {
    Product product;
    float* parts;              // [SHARES / 2, columns, row tiles, 16]: of two runs each
};

KERNEL(decode_part, PartArguments, WIDE_THREADS, 1) {
    DYNAMIC_SHARED(float, room);
    int64_t tile = own_row_tile() < ROW_TILES ? int64_t(blockIdx.x) * ROW_TILES + own_row_tile() : args.product.row_tiles;
    int64_t column0 = (int64_t(blockIdx.y) * COLUMN_TILES + own_column_tile()) * TILE_COLUMNS;
    int g = lane_id() / 4, t = lane_id() % 4;
    int first = blockIdx.z * (SHARES / PARTS);
    // The first run's sums of a pair, which `open` is the number of; -1 if there is none.
    float kept[OWN][4];
    int64_t open = -1;
    auto put = [&](int64_t pair) {
#pragma unroll
        for (int n = 0; n < OWN; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int64_t column = column0 + n * TILE_COLUMNS + 2 * t + i % 2;
                if (tile < args.product.row_tiles && column < args.product.columns)
                    args.parts[((pair * args.product.columns + column) * args.product.row_tiles + tile) * TILE_ROWS + g + i / 2 * 8] = kept[n][i];
            }
    };
    multiply_many(args.product, room, first, first + SHARES / PARTS, []() {}, [&](int share, float(&sums)[OWN][4]) {
        bool second = share % 2 == 1;
#pragma unroll
        for (int n = 0; n < OWN; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                kept[n][i] = second ? kept[n][i] + sums[n][i] : sums[n][i];
                sums[n][i] = 0.0f;
            }
        open = second ? -1 : share / 2;
        if (second) put(share / 2);
    });
    if (open >= 0) put(open);
}
#endif
