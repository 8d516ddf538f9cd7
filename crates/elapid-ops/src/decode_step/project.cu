// The projections of a decode step, with what stands around them: y = W x for some columns x (one a sequence), all
// weights read once.
//
// A block owns ROW_TILES tiles of 16 rows and COLUMN_TILES tiles of 8 columns. Its warps share the terms of the sum: each
// takes a run of blocks of 32 terms, multiplies on the tensor cores from registers, and the runs' sums are added in
// order. So a sum's order depends neither on the number of columns nor on how the rest is cut: a sequence gets the same
// bits alone and in any batch.
//
// Weights are asked for before the kernel waits for the one before it. The norm is folded in: its weight was multiplied
// into x when x was written, and what is left, the factor of a whole column, multiplies the sums.
//
// Macros: QUANTISED (0: bf16, 1: int8 with scales), ROW_TILES, COLUMN_TILES, TAPS of the convolution.
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
// Blocks of terms under way to a warp's registers.
constexpr int AHEAD = ROW_TILES == 1 ? (COLUMN_TILES == 1 ? 6 : COLUMN_TILES == 2 ? 4 : COLUMN_TILES == 4 ? 3 : 2) : 2;
// Warps that share the terms of a sum: part of its order. Few rows of many terms have more.
constexpr int SHARES = 8;
constexpr int MANY_SHARES = 16;

// W x, and the factors of columns.
struct Product {
    const uint8_t* weights;
    const bf16* x;
    int64_t row_tiles;       // of the weights
    int64_t blocks;          // of 32 terms
    int64_t columns;
    const float* squares;    // [columns, square_count], sums of squares of parts of x before the norm's weight; or none
    int64_t square_count;
    float width;             // numbers that the squares are of
    float eps;
};

// For each of the block's columns 1 / sqrt(mean square + eps); 1 without squares.
template <int SPLIT> DEVICE void column_factors(const Product& product, int64_t column0, float* factors) {
    constexpr int EACH = (COLUMNS + SPLIT - 1) / SPLIT;
    constexpr int AT_ONCE = EACH > 2 ? 2 : 8;
    float sums[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) sums[i] = 0.0f;
    if (product.squares) {
        for (int64_t part = lane_id(); part < product.square_count; part += AT_ONCE * WARP) {
            float parts[EACH][AT_ONCE];
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                int64_t column = column0 + warp_id() + i * SPLIT;
                const float* from = product.squares + column * product.square_count;
                bool there = column < product.columns && warp_id() + i * SPLIT < COLUMNS;
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
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        float sum = warp_sum(sums[i]);
        int column = warp_id() + i * SPLIT;
        if (lane_id() == 0 && column < COLUMNS)
            factors[column] = product.squares ? 1.0f / sqrtf(sum / product.width + product.eps) : 1.0f;
    }
}

// The sums of the block's rows and columns, in parts: room[part][column][row], and the columns' factors behind them.
// `before` runs while weights are on their way, and must not read what earlier kernels write.
template <int SPLIT, class Before> DEVICE void multiply(const Product& product, float* room, Before before) {
    int64_t tile0 = int64_t(blockIdx.x) * ROW_TILES, column_tile0 = int64_t(blockIdx.y) * COLUMN_TILES;
    int64_t share = ceil_div(product.blocks, SPLIT), first = warp_id() * share;
    int steps = int(most<int64_t>(0, least<int64_t>(share, product.blocks - first)));
    int64_t column_tiles = ceil_div(product.columns, TILE_COLUMNS);
    // Tiles behind the last read the last one again; their sums are not used.
    const uint8_t* weights[ROW_TILES];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
        weights[m] = product.weights + (least(tile0 + m, product.row_tiles - 1) * product.blocks + first) * Weights::BYTES;
    const bf16* x[COLUMN_TILES];
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n)
        x[n] = product.x + ((least(column_tile0 + n, column_tiles - 1) * product.blocks + first) * WARP + lane_id()) * 8;

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
            for (int n = 0; n < COLUMN_TILES; ++n) b[j][n] = load_fresh_words(x[n] + j * (WARP * 8));
        }
    column_factors<SPLIT>(product, column_tile0 * TILE_COLUMNS, room + SPLIT * COLUMNS * STRIDE);

    float sums[ROW_TILES][COLUMN_TILES][4];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
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
                for (int n = 0; n < COLUMN_TILES; ++n) b[j][n] = load_fresh_words(x[n] + int64_t(next) * (WARP * 8));
            }
        }
    }
    int g = lane_id() / 4, t = lane_id() % 4;
    float* own = room + warp_id() * (COLUMNS * STRIDE);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                own[(n * TILE_COLUMNS + 2 * t + i % 2) * STRIDE + m * TILE_ROWS + g + i / 2 * 8] = sums[m][n][i];
    __syncthreads();
}

// Where an element of the block's result is.
struct Place {
    int row, column;          // in the block
    int64_t tile, tile_row;   // of the weights
    int64_t sequence;
};
DEVICE Place place_of(int index) {
    Place place;
    place.row = index % ROWS;
    place.column = index / ROWS;
    place.tile = int64_t(blockIdx.x) * ROW_TILES + place.row / TILE_ROWS;
    place.tile_row = place.row % TILE_ROWS;
    place.sequence = int64_t(blockIdx.y) * COLUMNS + place.column;
    return place;
}

template <int SPLIT> DEVICE float total(const float* room, const Place& place) {
    const float* from = room + place.column * STRIDE + place.row;
    float sum = from[0];
#pragma unroll
    for (int part = 1; part < SPLIT; ++part) sum += from[part * (COLUMNS * STRIDE)];
    return sum * room[SPLIT * COLUMNS * STRIDE + place.column];
}

// ---- x and z ------------------------------------------------------------------------------------------------

struct InputArguments {
    Product product;          // tiles of x's rows, then tiles of z's
    const float* bias;        // [2 E], or none
    const float* taps;        // [E, TAPS]
    const float* tap_bias;    // [E], or none
    float* tail;              // [slots, E, TAPS - 1], oldest first
    const int32_t* slots;     // [columns], -1 for a column without a sequence
    bf16* u;                  // activations [columns, E]
    bf16* gate;               // [columns, E]
    int64_t channels;         // E
    int64_t channel_blocks;   // blocks of 32 of E
};

// What the convolution needs beside the new input.
struct Convolution {
    float tail[TAPS > 1 ? TAPS - 1 : 1];
    float taps[TAPS];
    float bias;
    int32_t slot;

    DEVICE void load(const InputArguments& args, const Place& place) {
        int64_t channel = place.tile * TILE_ROWS + place.tile_row;
        slot = place.sequence < args.product.columns ? args.slots[place.sequence] : -1;
        if (channel >= args.channels || slot < 0) return;
        const float* from = args.tail + (int64_t(slot) * args.channels + channel) * (TAPS - 1);
#pragma unroll
        for (int i = 0; i + 1 < TAPS; ++i) tail[i] = load_fresh(from + i);
#pragma unroll
        for (int i = 0; i < TAPS; ++i) taps[i] = args.taps[channel * TAPS + i];
        bias = args.tap_bias ? args.tap_bias[channel] : 0.0f;
    }

    // u, and the tail moves on.
    DEVICE void step(const InputArguments& args, const Place& place, float x) {
        int64_t channel = place.tile * TILE_ROWS + place.tile_row;
        float sum = bias;
#pragma unroll
        for (int i = 0; i + 1 < TAPS; ++i) sum = fmaf(taps[i], tail[i], sum);
        sum = fmaf(taps[TAPS - 1], x, sum);
        args.u[activation_place(place.sequence, channel, args.channel_blocks)] = from_float<bf16>(silu(sum));
        float* to = args.tail + (int64_t(slot) * args.channels + channel) * (TAPS - 1);
#pragma unroll
        for (int i = 0; i + 1 < TAPS; ++i) to[i] = i + 2 < TAPS ? tail[i + 1] : x;
    }
};

KERNEL(decode_input, InputArguments, SHARES * WARP, 1) {
    DYNAMIC_SHARED(float, room);
    constexpr int COUNT = ROWS * COLUMNS, THREADS = SHARES * WARP;
    // Of small blocks each thread has one element, and what it needs is asked for early. No other kernel touches the tails.
    constexpr bool EARLY = COUNT <= THREADS;
    int64_t x_tiles = ceil_div(args.channels, TILE_ROWS);
    Convolution early;
    multiply<SHARES>(args.product, room, [&]() {
        if (!EARLY || int(threadIdx.x) >= COUNT) return;
        Place place = place_of(threadIdx.x);
        if (place.tile < x_tiles) early.load(args, place);
    });
#pragma unroll 1
    for (int index = threadIdx.x; index < COUNT; index += THREADS) {
        Place place = place_of(index);
        if (place.sequence >= args.product.columns || place.tile >= args.product.row_tiles) continue;
        float value = total<SHARES>(room, place);
        bool is_x = place.tile < x_tiles;
        int64_t channel = (is_x ? place.tile : place.tile - x_tiles) * TILE_ROWS + place.tile_row;
        if (channel >= args.channels) continue;
        if (args.bias) value += args.bias[is_x ? channel : args.channels + channel];
        if (is_x) {
            Convolution late;
            if (!EARLY) late.load(args, place);
            Convolution& convolution = EARLY ? early : late;
            if (convolution.slot >= 0) convolution.step(args, place, value);
        } else if (args.slots[place.sequence] >= 0) {
            args.gate[place.sequence * args.channels + channel] = from_float<bf16>(silu(value));
        }
    }
}

// ---- Rows as they are: Δ's input with B and C, and logits ------------------------------------------------------

struct RowsArguments {
    Product product;
    float* out;               // [columns, rows], `stride` apart
    int64_t rows;
    int64_t stride;
};

template <int SPLIT> DEVICE void project_rows(const RowsArguments& args, float* room) {
    multiply<SPLIT>(args.product, room, []() {});
#pragma unroll 1
    for (int index = threadIdx.x; index < ROWS * COLUMNS; index += SPLIT * WARP) {
        Place place = place_of(index);
        int64_t row = place.tile * TILE_ROWS + place.tile_row;
        if (place.sequence >= args.product.columns || row >= args.rows) continue;
        args.out[place.sequence * args.stride + row] = total<SPLIT>(room, place);
    }
}

KERNEL(decode_rows, RowsArguments, SHARES * WARP, 1) {
    DYNAMIC_SHARED(float, room);
    project_rows<SHARES>(args, room);
}

KERNEL(decode_selection, RowsArguments, MANY_SHARES * WARP, 1) {
    DYNAMIC_SHARED(float, room);
    project_rows<MANY_SHARES>(args, room);
}

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

KERNEL(decode_output, OutputArguments, SHARES * WARP, 1) {
    DYNAMIC_SHARED(float, room);
    multiply<SHARES>(args.product, room, []() {});
    // Every thread takes part in the sums of squares.
    constexpr int COUNT = ROWS * COLUMNS;
    for (int base = 0; base < COUNT; base += SHARES * WARP) {
        int index = base + threadIdx.x;
        if (index >= COUNT) break;  // whole warps
        Place place = place_of(index);
        int64_t row = place.tile * TILE_ROWS + place.tile_row;
        bool there = place.sequence < args.product.columns && row < args.rows;
        float value = 0.0f;
        if (there) {
            float* residual = args.residual + place.sequence * args.rows + row;
            value = total<SHARES>(room, place);
            if (args.bias) value += args.bias[row];
            value += load_fresh(residual);
            *residual = value;
            if (args.x)
                args.x[activation_place(place.sequence, row, args.row_blocks)] = from_float<bf16>(value * args.norm[row]);
        }
        float squares = warp_sum<TILE_ROWS>(value * value);
        if (args.x && place.tile_row == 0 && place.sequence < args.product.columns && place.tile < args.product.row_tiles)
            args.squares[place.sequence * args.product.row_tiles + place.tile] = squares;
    }
}
