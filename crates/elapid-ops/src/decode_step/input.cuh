// The first projection of a layer, decode_input: x with the convolution and SiLU behind it, z as the gate. Part of project.cu,
// with its macros.
#pragma once
#include "prelude.cuh"
#include "decode_product.cuh"

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

// What a row of a tile of weights makes: x or z of a channel.
struct Channel {
    bool is_x;
    int64_t at;

    DEVICE Channel(const Product& product, int64_t tile, int64_t row)
        : is_x(tile < product.first_tiles), at((is_x ? tile : tile - product.first_tiles) * TILE_ROWS + row) {}
};

// The slot of a column of the block, -1 without a sequence.
DEVICE int32_t slot_of(const InputArguments& args, int column) {
    return sequence_of(column) < args.product.columns ? args.slots[sequence_of(column)] : -1;
}

#if COLUMN_WARPS == 0
KERNEL(decode_input, InputArguments, SHARES * WARP, FEW_COLUMNS_BLOCKS) {
    DYNAMIC_SHARED(float, room);
    constexpr int EACH = Block<SHARES>::EACH;
    // Columns whose tails are under way at a time. Few are asked for early: no other kernel touches the tails.
    constexpr int TURN = EACH < 8 ? EACH : 8;
    constexpr bool EARLY = EACH <= 3;
    Own<SHARES> own(args.product);
    Channel made(args.product, own.tile, own.tile_row);
    int64_t channel = made.at;
    bool has_row = own.tile >= 0 && channel < args.channels, is_x = own.tile >= 0 && made.is_x;
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
            own_slots[i] = has_row && column < COLUMNS ? slot_of(args, column) : -1;
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

// Neighbouring numbers of which the first `there` are; by packs of four where WHOLE says that all are, and aligned.
template <bool WHOLE, int COUNT> DEVICE void load_run(float (&to)[COUNT], const float* from, int there) {
    if constexpr (WHOLE) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            Pack<uint32_t, 4> words = load_fresh_words(from + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) to[i + j] = float_of(words.at[j]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) to[i] = i < there ? load_fresh(from + i) : 0.0f;
    }
}
template <bool WHOLE, int COUNT> DEVICE void store_run(float* to, const float (&from)[COUNT], int there) {
    if constexpr (WHOLE) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) store_pack<float, 4>(to + i, {{from[i], from[i + 1], from[i + 2], from[i + 3]}});
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if (i < there) to[i] = from[i];
    }
}

constexpr uint32_t NO_SLOT = 0xffffffffu;
constexpr int WARPS = WIDE_THREADS / WARP;
// Pieces of a warp.
constexpr int EACH = (ROW_TILES * COLUMN_TILES + WARPS - 1) / WARPS;

// What a warp finishes at a time: 16 rows of 8 columns, a lane four rows of a column. Where channels are WHOLE, all four are
// there, and rows start where packs do.
template <bool WHOLE> struct Piece {
    uint32_t row, column;     // in the block: the lane's first row, and its column
    uint32_t channel;         // of that row
    int there;                // of the four rows, those that are; 0 without a sequence
    bool is_x;
    uint32_t place;           // of the sequence's first channel among the slots'

    // Tiles of x and z take turns (tile_at).
    DEVICE Piece(const InputArguments& args, int index, const uint32_t* places) {
        uint32_t tile = uint32_t(index) / COLUMN_TILES, at = blockIdx.x * ROW_TILES + tile;
        row = tile * TILE_ROWS + lane_id() % 4 * 4;
        column = uint32_t(index) % COLUMN_TILES * TILE_COLUMNS + lane_id() / 4;
        is_x = at % 2 == 0;
        channel = at / 2 * TILE_ROWS + row % TILE_ROWS;
        bool is_one = tile < ROW_TILES && at < uint32_t(args.product.row_tiles);
        place = is_one ? places[column] : NO_SLOT;
        there = place == NO_SLOT ? 0 : 4;
        if (!WHOLE && there > 0) there = int(most<int64_t>(0, least<int64_t>(4, args.channels - channel)));
    }
    DEVICE float* tail(const InputArguments& args) const { return args.tail + uint64_t(place + channel) * (TAPS - 1); }
    DEVICE int64_t sequence() const { return sequence_of(int(column)); }
};

// The convolution, SiLU and the gate of the block's sums. `constants` are those of each row: its taps, their bias and the
// product's: [TAPS + 2][ROWS].
template <bool WHOLE> DEVICE void finish(const InputArguments& args, const float* room, const float* constants, const uint32_t* places) {
    // Pieces whose tails are under way at a time, as many in each turn: what registers there are.
    constexpr int MOST = WIDE_THREADS > 256 ? 5 : 7;
    constexpr int TURNS = (EACH + MOST - 1) / MOST, TURN = (EACH + TURNS - 1) / TURNS;
#pragma unroll 1
    for (int turn = 0; turn < EACH; turn += TURN) {
        float tails[TURN][4 * KEPT];
        if (TAPS > 1) {
#pragma unroll
            for (int i = 0; i < TURN; ++i) {
                Piece<WHOLE> piece(args, (turn + i) * WARPS + warp_id(), places);
                if (piece.is_x && piece.there > 0) load_run<WHOLE>(tails[i], piece.tail(args), piece.there * KEPT);
            }
        }
#pragma unroll
        for (int i = 0; i < TURN; ++i) {
            Piece<WHOLE> piece(args, (turn + i) * WARPS + warp_id(), places);
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
                    store_run<WHOLE>(piece.tail(args), tails[i], piece.there * KEPT);
                }
                // Neighbouring terms are a word, and those of the next matrix another.
                bf16* u = args.u + activation_place(piece.sequence(), piece.channel, args.channel_blocks);
#pragma unroll
                for (int j = 0; j < 4; j += 2) {
                    bf16* to = u + j / 2 * (MATRIX / 2);
                    if (WHOLE || j + 1 < piece.there) {
                        *reinterpret_cast<uint32_t*>(to) = pair_of(results[j], results[j + 1]);
                    } else if (j < piece.there) {
                        *to = from_float<bf16>(results[j]);
                    }
                }
                continue;
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) results[j] = silu(values.at[j]);
            bf16* gate = args.gate + piece.sequence() * args.channels + piece.channel;
            if (WHOLE) {
                store_pack<uint32_t, 2>(reinterpret_cast<uint32_t*>(gate), {{pair_of(results[0], results[1]), pair_of(results[2], results[3])}});
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (j < piece.there) gate[j] = from_float<bf16>(results[j]);
            }
        }
    }
}

KERNEL(decode_input, InputArguments, WIDE_THREADS, 1) {
    DYNAMIC_SHARED(float, room);
    __shared__ uint32_t places[COLUMNS];
    constexpr int CONSTANTS = TAPS + 2, OWN_CONSTANTS = (CONSTANTS * ROWS + WIDE_THREADS - 1) / WIDE_THREADS;
    // Behind the sums.
    float* constants = sums_of(room) + COLUMNS * STRIDE;
    float own_constants[OWN_CONSTANTS];
    bool whole = args.channels % TILE_ROWS == 0;
    multiply<SHARES>(args.product, room, [&]() {
        for (int column = threadIdx.x; column < COLUMNS; column += WIDE_THREADS) {
            int32_t slot = slot_of(args, column);
            places[column] = slot < 0 ? NO_SLOT : uint32_t(slot) * uint32_t(args.channels);
        }
#pragma unroll
        for (int i = 0; i < OWN_CONSTANTS; ++i) {
            int index = i * WIDE_THREADS + threadIdx.x, row = index % ROWS, which = index / ROWS;
            int64_t place = int64_t(blockIdx.x) * ROW_TILES + row / TILE_ROWS;
            bool there = place < args.product.row_tiles;
            Channel made(args.product, there ? tile_at(args.product, place) : 0, row % TILE_ROWS);
            own_constants[i] = 0.0f;
            if (!there || made.at >= args.channels) continue;
            if (which < TAPS) {
                if (made.is_x) own_constants[i] = args.taps[made.at * TAPS + which];
            } else if (which == TAPS) {
                if (made.is_x && args.tap_bias) own_constants[i] = args.tap_bias[made.at];
            } else if (which < CONSTANTS && args.bias) {
                own_constants[i] = args.bias[made.is_x ? made.at : args.channels + made.at];
            }
        }
        __syncthreads();
        // No other kernel touches the tails.
        for (int i = 0; TAPS > 1 && i < EACH; ++i) {
            Piece<true> piece(args, i * WARPS + warp_id(), places);
            if (whole && piece.is_x && piece.there > 0) fetch_ahead(piece.tail(args));
        }
    }, [&]() {
#pragma unroll
        for (int i = 0; i < OWN_CONSTANTS; ++i) {
            int index = i * WIDE_THREADS + threadIdx.x;
            if (index < CONSTANTS * ROWS) constants[index] = own_constants[i];
        }
    });
    if (whole) {
        finish<true>(args, room, constants, places);
    } else {
        finish<false>(args, room, constants, places);
    }
}
#endif
