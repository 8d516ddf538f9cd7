// What stands between a step's projections: token ids to rows of the residual stream, the parts of W_out y back to it, the
// norm where a kernel of its own takes it, and weights put into the order of layout.cuh.
//
// Macros: QUANTISED (0: bf16, 1: int8 with scales): the weights that are read or made.
#include "prelude.cuh"
#include "decode_layout.cuh"

// SHARES in product.cuh, two by two.
constexpr int MOST_PAIRS = 4;

// The weight of the norm and what comes of it: as in project.cu.
struct Normed {
    const float* norm;       // [D]
    const float* norm_bias;  // [D], or none
    bf16* x;                 // activations [columns, D]
    float* squares;          // [columns, ceil(D / 16)]; none where x is normed as a whole
    float* factors;          // [columns], what is made of the squares where a block has a whole column
    int64_t width;           // D
    int64_t blocks;          // blocks of 32 of D
    float eps;
    int32_t centred;         // LayerNorm
};

struct EmbedArguments {
    const uint8_t* table;    // weights [V, D]
    const uint32_t* ids;     // [columns]
    float* residual;         // [columns, D]
    Normed to;
    int64_t columns;
    int64_t classes;         // V; an id beyond it makes a row of NaN
};

struct NormArguments {
    const float* residual;   // [columns, D]
    Normed to;
    int64_t columns;
};

DEVICE float weight_at(const uint8_t* table, int64_t row, int64_t term, int64_t blocks) {
#if QUANTISED
    float scale = half_to_float(*reinterpret_cast<const uint16_t*>(table + scale_place(row, term, blocks)));
    return scale * float(*reinterpret_cast<const int8_t*>(table + quantised_place(row, term, blocks)));
#else
    return to_float(*reinterpret_cast<const bf16*>(table + narrow_place(row, term, blocks)));
#endif
}

// The sums of squares of 16 numbers of a block's column, and of them all in the order of product.cuh.
constexpr int SQUARES_AT_ONCE = 512;
struct ColumnSquares {
    const Normed& to;
    int64_t column, tiles;
    float* room;              // SQUARES_AT_ONCE numbers: of the tiles, in turns
    float sum = 0.0f;

    // Every thread of the block calls it, with the number of a term that follows those of the threads before it.
    DEVICE void add(int64_t term, float value) {
        float squares = warp_sum<TILE_ROWS>(value * value);
        if (threadIdx.x % TILE_ROWS == 0 && term < tiles * TILE_ROWS) {
            to.squares[column * tiles + term / TILE_ROWS] = squares;
            room[term / TILE_ROWS % SQUARES_AT_ONCE] = squares;
        }
    }
    // The first warp gathers what came since the last call.
    DEVICE void gather(int64_t first_tile, int64_t end_tile) {
        __syncthreads();
        if (warp_id() == 0)
            for (int64_t tile = first_tile + lane_id(); tile < end_tile && tile < tiles; tile += WARP) sum += room[tile % SQUARES_AT_ONCE];
        __syncthreads();
    }
    DEVICE void finish() {
        if (warp_id() != 0) return;
        float all = warp_sum(sum);
        if (lane_id() == 0) to.factors[column] = norm_factor(all, float(to.width), to.eps);
    }
};

// A thread's terms of a column, in the order of the threads, and their squares: `fetch(term)` asks for what `value_of(term,
// fetched)` makes the value of, a turn earlier.
template <class Fetch, class F> DEVICE void each_term(const Normed& to, int64_t column, float* room, Fetch fetch, F value_of) {
    int64_t tiles = ceil_div(to.width, TILE_ROWS);
    ColumnSquares squares = {to, column, tiles, room};
    int64_t gathered = 0;
    int64_t last = to.width - 1;
    auto next = fetch(least<int64_t>(threadIdx.x, last));
    for (int64_t base = 0; base < tiles * TILE_ROWS; base += blockDim.x) {
        int64_t term = base + threadIdx.x;
        auto fetched = next;
        if (base + blockDim.x < tiles * TILE_ROWS) next = fetch(least<int64_t>(term + blockDim.x, last));
        float value = term < to.width ? value_of(term, fetched) : 0.0f;
        if (!to.squares) continue;
        if (term < to.width) to.x[activation_place(column, term, to.blocks)] = from_float<bf16>(value * to.norm[term]);
        squares.add(term, value);
        int64_t done = (base + blockDim.x) / TILE_ROWS;
        if (done - gathered == SQUARES_AT_ONCE || done >= tiles) {
            squares.gather(gathered, done);
            gathered = done;
        }
    }
    if (to.squares) squares.finish();
}

// A block a column.
KERNEL(decode_embed, EmbedArguments, 1024, 1) {
    __shared__ float room[SQUARES_AT_ONCE];
    int64_t column = blockIdx.x, width = args.to.width;
    let_next_start();
    wait_for_previous();
    int64_t id = load_fresh(args.ids + column);
    auto fetch = [&](int64_t term) { return id < args.classes ? weight_at(args.table, id, term, args.to.blocks) : float_of(0x7fc00000u); };
    each_term(args.to, column, room, fetch, [&](int64_t term, float value) {
        args.residual[column * width + term] = value;
        return value;
    });
}

struct JoinArguments {
    const float* parts;      // [pairs, columns, row tiles, 16], of W_out y
    int64_t pairs;           // of runs
    int64_t row_tiles;
    const float* bias;       // [D], or none
    float* residual;         // [columns, D]
    Normed to;
    int64_t columns;
};

// What a term of the residual stream is made of.
struct Terms {
    float parts[MOST_PAIRS];
    float past;
};

// A block a column: adds the pairs of runs of W_out y, in order, and goes back to the residual stream.
KERNEL(decode_join, JoinArguments, 1024, 1) {
    __shared__ float room[SQUARES_AT_ONCE];
    int64_t column = blockIdx.x, width = args.to.width;
    let_next_start();
    wait_for_previous();
    const float* parts = args.parts + column * args.row_tiles * TILE_ROWS;
    int64_t stride = args.columns * args.row_tiles * TILE_ROWS;
    auto fetch = [&](int64_t term) {
        Terms terms;
#pragma unroll
        for (int pair = 0; pair < MOST_PAIRS; ++pair)
            // The last one again instead of none: no branch keeps loads apart.
            terms.parts[pair] = load_fresh(parts + least<int64_t>(pair, args.pairs - 1) * stride + term);
        terms.past = load_fresh(args.residual + column * width + term);
        return terms;
    };
    each_term(args.to, column, room, fetch, [&](int64_t term, const Terms& terms) {
        float sum = terms.parts[0];
#pragma unroll
        for (int pair = 1; pair < MOST_PAIRS; ++pair)
            if (pair < args.pairs) sum += terms.parts[pair];
        float value = sum + (args.bias ? args.bias[term] : 0.0f) + terms.past;
        args.residual[column * width + term] = value;
        return value;
    });
}

// A block a column: LayerNorm or RMSNorm of its row.
KERNEL(decode_norm, NormArguments, 256, 1) {
    __shared__ float room[WARP];
    let_next_start();
    wait_for_previous();
    int64_t column = blockIdx.x, width = args.to.width;
    const float* row = args.residual + column * width;
    float mean = 0.0f;
    if (args.to.centred) {
        float sum = 0.0f;
        for (int64_t i = threadIdx.x; i < width; i += blockDim.x) sum += load_fresh(row + i);
        mean = block_sum(sum, room) / float(width);
    }
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
        float value = load_fresh(row + i) - mean;
        sum = fmaf(value, value, sum);
    }
    float factor = 1.0f / sqrtf(block_sum(sum, room) / float(width) + args.to.eps);
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
        float value = (load_fresh(row + i) - mean) * factor * args.to.norm[i];
        if (args.to.norm_bias) value += args.to.norm_bias[i];
        args.to.x[activation_place(column, i, args.to.blocks)] = from_float<bf16>(value);
    }
}

// ---- Weights ----------------------------------------------------------------------------------------------------

struct PackArguments {
    const void* from;        // [rows, K], f32 or blocks of Q8_0 (a half-precision scale and 32 int8)
    uint8_t* to;
    int64_t rows;
    int64_t terms;           // K
    int64_t first_rows;      // rows of the first part; the second starts at a tile of its own
    int64_t tiles;           // row tiles of both parts
    int64_t blocks;          // blocks of 32 terms
    int32_t quantised_source;
};

// The row that stands in a tile's row; none if below 0.
DEVICE int64_t source_row(const PackArguments& args, int64_t packed) {
    int64_t first = ceil_div(args.first_rows, TILE_ROWS) * TILE_ROWS;
    if (packed < first) return packed < args.first_rows ? packed : -1;
    int64_t row = args.first_rows + packed - first;
    return row < args.rows ? row : -1;
}

// A warp a block of weights, any number of warps.
KERNEL(decode_pack, PackArguments, 256, 1) {
    int g = lane_id() / 4, t = lane_id() % 4;
    int64_t warps = int64_t(gridDim.x) * (blockDim.x / WARP);
    for (int64_t at = int64_t(blockIdx.x) * (blockDim.x / WARP) + warp_id(); at < args.tiles * args.blocks; at += warps) {
        int64_t tile = at / args.blocks, block = at % args.blocks;
        float values[2][8];
        float scales[2];
        int8_t numbers[2][8];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int64_t row = source_row(args, tile * TILE_ROWS + g + 8 * half);
            if (args.quantised_source) {
                const uint8_t* from = static_cast<const uint8_t*>(args.from) + (row * args.blocks + block) * 34;
                scales[half] = row < 0 ? 0.0f : half_to_float(uint16_t(from[0] | from[1] << 8));
#pragma unroll
                for (int k = 0; k < 8; ++k) {
                    numbers[half][k] = row < 0 ? int8_t(0) : int8_t(from[2 + 8 * t + k]);
                    values[half][k] = scales[half] * float(numbers[half][k]);
                }
                continue;
            }
            const float* from = static_cast<const float*>(args.from) + row * args.terms;
            float largest = 0.0f;
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                int64_t term = block * BLOCK_TERMS + 8 * t + k;
                values[half][k] = row >= 0 && term < args.terms ? from[term] : 0.0f;
                largest = fmaxf(largest, fabsf(values[half][k]));
            }
            for (int step = 1; step < 4; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, step));
            float scale = largest / 127.0f, inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
            scales[half] = scale;
#pragma unroll
            for (int k = 0; k < 8; ++k) numbers[half][k] = int8_t(roundf(values[half][k] * inverse));
        }
        // With blocks of one source only, all lanes come here together.
        for (int half = 0; half < 2; ++half)
            for (int k = 0; k < 8; ++k) {
                int64_t row = tile * TILE_ROWS + g + 8 * half, term = block * BLOCK_TERMS + 8 * t + k;
#if QUANTISED
                *reinterpret_cast<int8_t*>(args.to + quantised_place(row, term, args.blocks)) = numbers[half][k];
#else
                *reinterpret_cast<bf16*>(args.to + narrow_place(row, term, args.blocks)) = from_float<bf16>(values[half][k]);
#endif
            }
#if QUANTISED
        if (t == 0)
            for (int half = 0; half < 2; ++half)
                *reinterpret_cast<uint16_t*>(args.to + scale_place(tile * TILE_ROWS + g + 8 * half, block * BLOCK_TERMS, args.blocks)) =
                    float_to_half(scales[half]);
#endif
    }
}
