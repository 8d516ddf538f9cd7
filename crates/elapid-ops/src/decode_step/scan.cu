// One step of the recurrence: Δ from its low-rank input, the state's update, what is read out of it, and the gate.
//
// A block owns 16 channels of up to 8 sequences. Δ's projection is one product of the tensor cores; then neighbouring
// lanes share a channel, four states each where N allows, and read and write the state in whole sectors. State, decay rates
// and Δ's weights are asked for before the kernel waits for the one before it: nobody else touches them.
//
// Macros: STATES, N; NORMED (1: Δ's input, B and C are divided by their root mean square first).
#include "prelude.cuh"
#include "decode_layout.cuh"

constexpr int THREADS = 128;
constexpr int PAIRS = TILE_ROWS * TILE_COLUMNS;  // of channel and sequence: one a thread
// Lanes that share a channel: a power of two, or one.
constexpr int QUADS = STATES % 4 == 0 && (STATES / 4 & (STATES / 4 - 1)) == 0 && STATES / 4 <= WARP ? STATES / 4 : 1;
constexpr bool SHARED_CHANNEL = QUADS > 1 || STATES == 4;
// Turns of the block over its states, and those whose states are asked for early.
constexpr int TURNS = QUADS;
constexpr int EARLY = SHARED_CHANNEL ? (TURNS < 8 ? TURNS : 8) : 0;

struct ScanArguments {
    const float* selection;   // [columns, R + 2 N]: Δ's input, B, C
    int64_t selection_stride;
    const uint8_t* delta;     // weights of Δ [E, R], bf16
    int64_t delta_blocks;     // blocks of 32 of R
    int64_t rank;             // R
    const float* delta_bias;  // [E], or none
    const float* a;           // [E, N]
    const float* d;           // [E]
    float* state;             // [slots, E, N]
    const int32_t* slots;     // [columns], -1 for a column without a sequence
    const bf16* u;            // activations [columns, E]
    const bf16* gate;         // [columns, E]
    bf16* y;                  // activations [columns, E]
    int64_t channels;
    int64_t channel_blocks;
    int64_t columns;
    float eps;                // of the norms
};

// What a pair brings to its states.
struct Pair {
    float delta, step;        // Δ, Δ u
};

KERNEL(decode_scan, ScanArguments, 128, 8) {
    // rows [8, width] of the selection; Δ of [8, 16]; pairs
    DYNAMIC_SHARED(float, rows);
    __shared__ float deltas[PAIRS];
    __shared__ Pair pairs[PAIRS];
    __shared__ float skips[PAIRS];
    int64_t tile = blockIdx.x, sequence0 = int64_t(blockIdx.y) * TILE_COLUMNS;
    int64_t width = args.rank + 2 * STATES;
    int64_t stride = width + 4 - width % 4;
    int thread = threadIdx.x;

    auto slot_of = [&](int column) {
        int64_t sequence = sequence0 + column;
        return sequence < args.columns ? args.slots[sequence] : -1;
    };
    // A unit is four states of a channel of a sequence.
    struct Unit {
        int column, channel, quad;
    };
    auto unit_of = [&](int turn) {
        int index = turn * THREADS + thread;
        return Unit{index / (TILE_ROWS * QUADS), index / QUADS % TILE_ROWS, index % QUADS};
    };
    Pack<float, 4> early[EARLY > 0 ? EARLY : 1];
#pragma unroll
    for (int turn = 0; turn < EARLY; ++turn) {
        Unit unit = unit_of(turn);
        int64_t channel = tile * TILE_ROWS + unit.channel;
        int slot = slot_of(unit.column);
        if (slot >= 0 && channel < args.channels)
            early[turn] = load_pack<float, 4>(args.state + (int64_t(slot) * args.channels + channel) * STATES + 4 * unit.quad);
    }
    // This thread's pair.
    int pair_channel = thread % TILE_ROWS, pair_column = thread / TILE_ROWS;
    int64_t channel = tile * TILE_ROWS + pair_channel, sequence = sequence0 + pair_column;
    bool there = channel < args.channels && slot_of(pair_column) >= 0;
    float bias = there && args.delta_bias ? args.delta_bias[channel] : 0.0f;
    float skip = there ? args.d[channel] : 0.0f;
    let_next_start();
    wait_for_previous();

    float u = 0.0f, gate = 0.0f;
    if (there) {
        u = to_float(load_fresh(args.u + activation_place(sequence, channel, args.channel_blocks)));
        gate = to_float(load_fresh(args.gate + sequence * args.channels + channel));
    }
    for (int column = warp_id(); column < TILE_COLUMNS; column += THREADS / WARP) {
        bool filled = sequence0 + column < args.columns;
        const float* from = args.selection + (sequence0 + column) * args.selection_stride;
        float* to = rows + column * stride;
        for (int64_t i = lane_id(); i < width; i += WARP) to[i] = filled ? load_fresh(from + i) : 0.0f;
#if NORMED
        __syncwarp();
        auto normalise = [&](int64_t first, int64_t count) {
            float sum = 0.0f;
            for (int64_t i = lane_id(); i < count; i += WARP) sum = fmaf(to[first + i], to[first + i], sum);
            float factor = 1.0f / sqrtf(warp_sum(sum) / float(count) + args.eps);
            for (int64_t i = lane_id(); i < count; i += WARP) to[first + i] *= factor;
        };
        normalise(0, args.rank);
        normalise(args.rank, STATES);
        normalise(args.rank + STATES, STATES);
#endif
    }
    __syncthreads();

    if (warp_id() == 0) {
        float sums[1][4] = {{0.0f, 0.0f, 0.0f, 0.0f}};
        int g = lane_id() / 4, t = lane_id() % 4;
        for (int64_t block = 0; block < args.delta_blocks; ++block) {
            Narrow weights;
            weights.load(args.delta + (tile * args.delta_blocks + block) * Narrow::BYTES);
            Pack<uint32_t, 4> x[1];
#pragma unroll
            for (int word = 0; word < 4; ++word) {
                int64_t term = block * BLOCK_TERMS + 8 * t + 2 * word;
                auto number = [&](int64_t at) {
                    return uint32_t(from_float<bf16>(at < args.rank ? rows[g * stride + at] : 0.0f).bits);
                };
                x[0].at[word] = number(term) | number(term + 1) << 16;
            }
            weights.multiply(sums, x);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) deltas[(2 * t + i % 2) * TILE_ROWS + g + i / 2 * 8] = sums[0][i];
    }
    __syncthreads();
    float delta = softplus(deltas[thread] + bias);
    pairs[thread] = {delta, delta * u};
    float past = skip * u;
    if (!SHARED_CHANNEL) {
        if (!there) return;
        const float* b = rows + pair_column * stride + args.rank;
        const float* a = args.a + channel * STATES;
        float* state = args.state + (int64_t(slot_of(pair_column)) * args.channels + channel) * STATES;
        float y = 0.0f;
        for (int n = 0; n < STATES; ++n) {
            float h = fmaf(exp2_fast(delta * (LOG2_E * a[n])), state[n], delta * u * b[n]);
            state[n] = h;
            y = fmaf(b[STATES + n], h, y);
        }
        args.y[activation_place(sequence, channel, args.channel_blocks)] = from_float<bf16>((y + past) * gate);
        return;
    }
    __syncthreads();
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        Unit unit = unit_of(turn);
        int64_t own = tile * TILE_ROWS + unit.channel;
        int slot = slot_of(unit.column);
        bool filled = slot >= 0 && own < args.channels;
        float y = 0.0f;
        if (filled) {
            float* state = args.state + (int64_t(slot) * args.channels + own) * STATES + 4 * unit.quad;
            Pack<float, 4> h = turn < EARLY ? early[turn < EARLY ? turn : 0] : load_pack<float, 4>(state);
            Pack<float, 4> a = load_pack<float, 4>(args.a + own * STATES + 4 * unit.quad);
            const float* b = rows + unit.column * stride + args.rank + 4 * unit.quad;
            Pair pair = pairs[unit.column * TILE_ROWS + unit.channel];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                h.at[i] = fmaf(exp2_fast(pair.delta * (LOG2_E * a.at[i])), h.at[i], pair.step * b[i]);
                y = fmaf(b[STATES + i], h.at[i], y);
            }
            store_pack<float, 4>(state, h);
        }
        y = warp_sum<QUADS>(y);
        if (unit.quad == 0) skips[unit.column * TILE_ROWS + unit.channel] = y;
    }
    __syncthreads();
    if (there)
        args.y[activation_place(sequence, channel, args.channel_blocks)] = from_float<bf16>((skips[thread] + past) * gate);
}
