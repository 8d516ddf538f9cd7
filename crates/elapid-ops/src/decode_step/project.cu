// The projections of a decode step, with what stands around them. The norm is folded in: its weight was multiplied into x
// when x was written, and what is left, the factor of a whole column, multiplies the sums.
//
// Macros: QUANTISED (0: bf16, 1: int8 with scales), ROW_TILES, COLUMN_TILES, COLUMN_WARPS (0: few columns), GROUPED (1: groups
// of four warps multiply), STAGE_BLOCKS, RING_BYTES, PARTS (blocks that share a sum); where columns are few, AHEAD (blocks of
// terms under way to registers) and WARP_STAGES (stages of a warp's ring, or 0); TAPS of the convolution.
#include "prelude.cuh"
#include "decode_product.cuh"
#include "decode_ranking.cuh"

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

// Inputs of the convolution that a channel keeps.
constexpr int KEPT = TAPS > 1 ? TAPS - 1 : 1;
constexpr int FEW_COLUMNS_BLOCKS = COLUMN_WARPS == 0 && ROW_TILES * COLUMN_TILES <= 4 ? 2 : 1;

#if COLUMN_WARPS == 0
KERNEL(decode_input, InputArguments, SHARES * WARP, FEW_COLUMNS_BLOCKS) {
    DYNAMIC_SHARED(float, room);
    constexpr int EACH = Block<SHARES>::EACH;
    // Columns whose tails are under way at a time. Few are asked for early: no other kernel touches the tails.
    constexpr int TURN = EACH < 8 ? EACH : 8;
    constexpr bool EARLY = EACH <= 3;
    Own<SHARES> own(args.product);
    bool is_x = own.tile >= 0 && own.tile < args.product.first_tiles;
    int64_t channel = (is_x ? own.tile : own.tile - args.product.first_tiles) * TILE_ROWS + own.tile_row;
    bool has_row = own.tile >= 0 && channel < args.channels;
    // Of column 0 of the block, and what lies between columns.
    int64_t sequence0 = sequence_of(0);
    float* tail = args.tail + channel * (TAPS - 1);
    int64_t tail_stride = args.channels * (TAPS - 1);
    bf16* u = args.u + activation_place(sequence0, channel, args.channel_blocks);
    int tile_stride = int(args.channel_blocks) * (COLUMN_BLOCK / 2);
    bf16* gate = args.gate + sequence0 * args.channels + channel;
    float taps[TAPS], tap_bias = 0.0f, bias = 0.0f;
    float tails[TURN][KEPT];
    int32_t own_slots[TURN];
    auto load = [&](int turn) {
#pragma unroll
        for (int i = 0; i < TURN; ++i) {
            int column = own.column(turn + i);
            own_slots[i] = has_row && column < COLUMNS && sequence_of(column) < args.product.columns ? args.slots[sequence_of(column)] : -1;
        }
#pragma unroll
        for (int i = 0; i < TURN; ++i) {
            // Reading something else instead keeps the loads together, but of z's rows all would read the same place.
            if (!is_x || own_slots[i] < 0) continue;
            const float* from = tail + own_slots[i] * tail_stride;
#pragma unroll
            for (int k = 0; k + 1 < TAPS; ++k) tails[i][k] = load_fresh(from + k);
        }
    };
    multiply_few<SHARES>(args.product, room, [&]() {
        if (has_row && args.bias) bias = args.bias[is_x ? channel : args.channels + channel];
        if (has_row && is_x) {
#pragma unroll
            for (int k = 0; k < TAPS; ++k) taps[k] = args.taps[channel * TAPS + k];
            if (args.tap_bias) tap_bias = args.tap_bias[channel];
        }
        if (EARLY) load(0);
    }, []() {});
#pragma unroll 1
    for (int turn = 0; turn < EACH; turn += TURN) {
        if (!EARLY) load(turn);
#pragma unroll
        for (int i = 0; i < TURN; ++i) {
            if (own_slots[i] < 0) continue;
            int column = own.column(turn + i);
            float value = total<SHARES>(room, own.row, column) + bias;
            if (!is_x) {
                gate[column * int(args.channels)] = from_float<bf16>(silu(value));
                continue;
            }
            float sum = tap_bias;
#pragma unroll
            for (int k = 0; k + 1 < TAPS; ++k) sum = fmaf(taps[k], tails[i][k], sum);
            sum = fmaf(taps[TAPS - 1], value, sum);
            u[column / TILE_COLUMNS * tile_stride + column % TILE_COLUMNS * 8] = from_float<bf16>(silu(sum));
            float* to = tail + own_slots[i] * tail_stride;
#pragma unroll
            for (int k = 0; k + 1 < TAPS; ++k) to[k] = k + 2 < TAPS ? tails[i][k + 1] : value;
        }
    }
}
#else

// Neighbouring numbers of which the first `there` are, by packs of four where they can be.
template <int COUNT> DEVICE void load_run(float (&to)[COUNT], const float* from, int there) {
    if (there == COUNT && packable<float, 4>(from, 0)) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            Pack<uint32_t, 4> words = load_fresh_words(from + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) to[i + j] = float_of(words.at[j]);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = i < there ? load_fresh(from + i) : 0.0f;
}
template <int COUNT> DEVICE void store_run(float* to, const float (&from)[COUNT], int there) {
    if (there == COUNT && packable<float, 4>(to, 0)) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) store_pack<float, 4>(to + i, {{from[i], from[i + 1], from[i + 2], from[i + 3]}});
        return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (i < there) to[i] = from[i];
}

// What a warp finishes at a time: 16 rows of 8 columns, a lane four rows of a column.
struct Piece {
    int row, column;          // in the block: the lane's first row, and its column
    int64_t channel;          // of that row
    int there;                // of the four rows, those that are; 0 without a sequence
    bool is_x;
    int64_t slot;

    DEVICE Piece(const InputArguments& args, int index, const int32_t* slots) {
        int tile = index / COLUMN_TILES;
        row = tile * TILE_ROWS + lane_id() % 4 * 4;
        column = index % COLUMN_TILES * TILE_COLUMNS + lane_id() / 4;
        int64_t place = int64_t(blockIdx.x) * ROW_TILES + tile;
        bool is_one = tile < ROW_TILES && place < args.product.row_tiles;
        int64_t weights_tile = is_one ? tile_at(args.product, place) : 0;
        is_x = weights_tile < args.product.first_tiles;
        channel = (is_x ? weights_tile : weights_tile - args.product.first_tiles) * TILE_ROWS + lane_id() % 4 * 4;
        slot = is_one ? slots[column] : -1;
        there = slot < 0 ? 0 : int(most<int64_t>(0, least<int64_t>(4, args.channels - channel)));
    }
    DEVICE float* tail(const InputArguments& args) const { return args.tail + (slot * args.channels + channel) * (TAPS - 1); }
};

KERNEL(decode_input, InputArguments, WIDE_THREADS, 1) {
    DYNAMIC_SHARED(float, room);
    __shared__ int32_t slots[COLUMNS];
    // Of each row its taps, their bias and the product's: [CONSTANTS][ROWS], behind the sums.
    constexpr int CONSTANTS = TAPS + 2, OWN_CONSTANTS = (CONSTANTS * ROWS + WIDE_THREADS - 1) / WIDE_THREADS;
    float* constants = sums_of(room) + COLUMNS * STRIDE;
    float own_constants[OWN_CONSTANTS];
    constexpr int WARPS = WIDE_THREADS / WARP, EACH = (ROW_TILES * COLUMN_TILES + WARPS - 1) / WARPS;
    // Pieces whose tails are under way at a time.
    constexpr int TURN = EACH < 5 ? EACH : 5;
    multiply<SHARES>(args.product, room, [&]() {
        for (int column = threadIdx.x; column < COLUMNS; column += WIDE_THREADS)
            slots[column] = sequence_of(column) < args.product.columns ? args.slots[sequence_of(column)] : -1;
#pragma unroll
        for (int i = 0; i < OWN_CONSTANTS; ++i) {
            int index = i * WIDE_THREADS + threadIdx.x, row = index % ROWS, which = index / ROWS;
            int64_t place = int64_t(blockIdx.x) * ROW_TILES + row / TILE_ROWS;
            int64_t tile = place < args.product.row_tiles ? tile_at(args.product, place) : 0;
            bool is_x = tile < args.product.first_tiles;
            int64_t channel = (is_x ? tile : tile - args.product.first_tiles) * TILE_ROWS + row % TILE_ROWS;
            own_constants[i] = 0.0f;
            if (place >= args.product.row_tiles || channel >= args.channels) continue;
            if (which < TAPS) {
                if (is_x) own_constants[i] = args.taps[channel * TAPS + which];
            } else if (which == TAPS) {
                if (is_x && args.tap_bias) own_constants[i] = args.tap_bias[channel];
            } else if (which < CONSTANTS && args.bias) {
                own_constants[i] = args.bias[is_x ? channel : args.channels + channel];
            }
        }
        __syncthreads();
        // No other kernel touches the tails.
        for (int i = 0; TAPS > 1 && i < EACH; ++i) {
            Piece piece(args, i * WARPS + warp_id(), slots);
            if (piece.is_x && piece.there > 0) fetch_ahead(piece.tail(args));
        }
    }, [&]() {
#pragma unroll
        for (int i = 0; i < OWN_CONSTANTS; ++i) {
            int index = i * WIDE_THREADS + threadIdx.x;
            if (index < CONSTANTS * ROWS) constants[index] = own_constants[i];
        }
    });
#pragma unroll 1
    for (int turn = 0; turn < EACH; turn += TURN) {
        float tails[TURN][4 * KEPT];
        if (TAPS > 1) {
#pragma unroll
            for (int i = 0; i < TURN; ++i) {
                Piece piece(args, (turn + i) * WARPS + warp_id(), slots);
                if (piece.is_x && piece.there > 0) load_run(tails[i], piece.tail(args), piece.there * KEPT);
            }
        }
#pragma unroll
        for (int i = 0; i < TURN; ++i) {
            Piece piece(args, (turn + i) * WARPS + warp_id(), slots);
            if (piece.there == 0) continue;
            auto constant = [&](int which) { return load_pack<float, 4>(constants + which * ROWS + piece.row); };
            Pack<float, 4> values = load_pack<float, 4>(sums_of(room) + piece.column * STRIDE + piece.row), bias = constant(TAPS + 1);
#pragma unroll
            for (int j = 0; j < 4; ++j) values.at[j] = values.at[j] * room[piece.column] + bias.at[j];
            float results[4];
            if (piece.is_x) {
                Pack<float, 4> sums = constant(TAPS);
#pragma unroll
                for (int k = 0; k < TAPS; ++k) {
                    Pack<float, 4> taps = constant(k);
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        sums.at[j] = fmaf(taps.at[j], k + 1 < TAPS ? tails[i][j * KEPT + (k < KEPT ? k : 0)] : values.at[j], sums.at[j]);
                }
#pragma unroll
                for (int j = 0; j < 4; ++j) results[j] = silu(sums.at[j]);
                if (TAPS > 1) {
#pragma unroll
                    for (int j = 0; j < 4; ++j)
#pragma unroll
                        for (int k = 0; k < KEPT; ++k) tails[i][j * KEPT + k] = k + 1 < KEPT ? tails[i][j * KEPT + k + 1] : values.at[j];
                    store_run(piece.tail(args), tails[i], piece.there * KEPT);
                }
                // Neighbouring terms are a word, and those of the next matrix another.
                bf16* u = args.u + activation_place(sequence_of(piece.column), piece.channel, args.channel_blocks);
#pragma unroll
                for (int j = 0; j < 4; j += 2) {
                    bf16* to = u + j / 2 * (MATRIX / 2);
                    if (j + 1 < piece.there) {
                        *reinterpret_cast<uint32_t*>(to) = pair_of(results[j], results[j + 1]);
                    } else if (j < piece.there) {
                        *to = from_float<bf16>(results[j]);
                    }
                }
                continue;
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) results[j] = silu(values.at[j]);
            bf16* gate = args.gate + sequence_of(piece.column) * args.channels + piece.channel;
            if (piece.there == 4 && packable<bf16, 4>(gate, 0)) {
                store_pack<uint32_t, 2>(reinterpret_cast<uint32_t*>(gate), {{pair_of(results[0], results[1]), pair_of(results[2], results[3])}});
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (j < piece.there) gate[j] = from_float<bf16>(results[j]);
            }
        }
    }
}
#endif

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
