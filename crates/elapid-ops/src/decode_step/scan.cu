// One step of the recurrence: Δ from its low-rank input, the state's update, what is read out of it, and the gate.
//
// A block owns 16 channels of some groups of 8 sequences, one group after another. Δ's projection is one product of the tensor cores, whose terms the warps
// share; then neighbouring lanes share a channel, four states each where N allows, and read and write the state in whole
// sectors. State, decay rates and Δ's weights are asked for before the kernel waits for the one before it: nobody else
// touches them. What is left behind that wait is short, as this kernel stands in every layer's chain.
//
// Macros: those of scan.cuh.
#include "prelude.cuh"
#include "decode_scan.cuh"

constexpr int THREADS = 128, WARPS = THREADS / WARP;
constexpr int PAIRS = TILE_ROWS * TILE_COLUMNS;  // of channel and sequence: one a thread
// Lanes that share a channel: a power of two, or one.
constexpr int QUADS = STATES % 4 == 0 && (STATES / 4 & (STATES / 4 - 1)) == 0 && STATES / 4 <= WARP ? STATES / 4 : 1;
constexpr bool SHARED_CHANNEL = QUADS > 1 || STATES == 4;
// Turns of the block over its states, and those whose states are asked for early.
constexpr int TURNS = QUADS;
constexpr int EARLY = SHARED_CHANNEL ? (TURNS < 4 ? TURNS : 4) : 0;
// Of the selection's rows in shared memory.
constexpr int STRIDE = WIDTH + 4 - WIDTH % 4;
// Blocks of Δ's product of a warp; its weights are kept for two.
constexpr int WARP_BLOCKS = (DELTA_BLOCKS + WARPS - 1) / WARPS;
constexpr int HELD_BLOCKS = WARP_BLOCKS < 2 ? WARP_BLOCKS : 2;
constexpr int DELTA_PARTS = DELTA_BLOCKS < WARPS ? DELTA_BLOCKS : WARPS;

KERNEL(decode_scan, ScanArguments, 128, 4) {
    __shared__ float rows[TILE_COLUMNS * STRIDE];
    __shared__ float deltas[DELTA_PARTS][PAIRS];
    __shared__ Pair pairs[PAIRS];
    __shared__ float reads[PAIRS];
    int64_t tile = blockIdx.x, group = int64_t(blockIdx.y) * args.groups, end_group = group + args.groups;
    int thread = threadIdx.x;

    auto slot_of = [&](int64_t of_group, int column) {
        int64_t sequence = of_group * TILE_COLUMNS + column;
        return sequence < args.columns ? args.slots[sequence] : -1;
    };
    // A unit is four states of a channel of a sequence. A thread keeps its channel and goes through sequences.
    struct Unit {
        int column, channel, quad;
    };
    auto unit_of = [&](int turn) {
        int index = turn * THREADS + thread;
        return Unit{index / (TILE_ROWS * QUADS), index / QUADS % TILE_ROWS, index % QUADS};
    };
    constexpr int ROOM = EARLY > 0 ? EARLY : 1;
    auto load_states = [&](int64_t of_group, Pack<State, 4>(&states)[ROOM]) {
#pragma unroll
        for (int turn = 0; turn < EARLY; ++turn) {
            Unit unit = unit_of(turn);
            int64_t channel = tile * TILE_ROWS + unit.channel;
            int slot = slot_of(of_group, unit.column);
            if (slot >= 0 && channel < args.channels)
                states[turn] = load_pack<State, 4>(args.state + (int64_t(slot) * args.channels + channel) * STATES + 4 * unit.quad);
        }
    };
    Pack<State, 4> early[ROOM], following[ROOM];
    load_states(group, early);
    auto delta_weights = [&](int i) { return args.delta + (tile * DELTA_BLOCKS + warp_id() + i * WARPS) * Narrow::BYTES; };
    Narrow held[HELD_BLOCKS];
#pragma unroll
    for (int i = 0; i < HELD_BLOCKS; ++i)
        if (warp_id() + i * WARPS < DELTA_BLOCKS) held[i].load(delta_weights(i));
    // Of the units of a thread, all of one channel where that fits.
    constexpr bool ONE_CHANNEL = THREADS % (TILE_ROWS * QUADS) == 0;
    Pack<float, 4> rates;
    auto load_rates = [&](const Unit& unit) {
        int64_t channel = tile * TILE_ROWS + unit.channel;
        if (channel < args.channels) rates = load_pack<float, 4>(args.a + channel * STATES + 4 * unit.quad);
    };
    if (SHARED_CHANNEL && ONE_CHANNEL) load_rates(unit_of(0));
    // This thread's pair.
    int pair_channel = thread % TILE_ROWS, pair_column = thread / TILE_ROWS;
    int64_t channel = tile * TILE_ROWS + pair_channel;
    bool has_channel = channel < args.channels;
    float bias = has_channel && args.delta_bias ? args.delta_bias[channel] : 0.0f;
    float skip = has_channel ? args.d[channel] : 0.0f;
    let_next_start();
    wait_for_previous();

#pragma unroll 1
    for (; group < end_group && group * TILE_COLUMNS < args.columns; ++group) {
        int64_t sequence0 = group * TILE_COLUMNS, sequence = sequence0 + pair_column;
        int own_slot = slot_of(group, pair_column);
        bool there = has_channel && own_slot >= 0;
        float u = 0.0f, gate = 0.0f;
        if (there) {
            u = to_float(load_fresh(args.u + activation_place(sequence, channel, args.channel_blocks)));
            gate = to_float(load_fresh(args.gate + sequence * args.channels + channel));
        }
#pragma unroll
        for (int turn = 0; turn < TILE_COLUMNS / WARPS; ++turn) {
            int column = warp_id() + turn * WARPS;
            bool filled = sequence0 + column < args.columns;
            const float* from = args.selection + (sequence0 + column) * WIDTH;
            float* to = rows + column * STRIDE;
#pragma unroll
            for (int base = 0; base < WIDTH; base += WARP) {
                int i = base + lane_id();
                if (i < WIDTH) to[i] = filled ? load_fresh(from + i) : 0.0f;
            }
#if NORMED
            __syncwarp();
            normalise_row(to, args.eps);
#endif
        }
        if (group + 1 < end_group) load_states(group + 1, following);
        __syncthreads();

        if (warp_id() < DELTA_PARTS) {
            float sums[1][4] = {{0.0f, 0.0f, 0.0f, 0.0f}};
            int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
            for (int i = 0; i < WARP_BLOCKS; ++i) {
                int block = warp_id() + i * WARPS;
                if (block >= DELTA_BLOCKS) break;
                Narrow weights = held[i % HELD_BLOCKS];
                if (i >= HELD_BLOCKS) weights.load(delta_weights(i));
                Pack<uint32_t, 4> x[1];
#pragma unroll
                for (int word = 0; word < 4; ++word) {
                    int term = block * BLOCK_TERMS + 8 * t + 2 * word;
                    auto number = [&](int at) { return uint32_t(from_float<bf16>(at < RANK ? rows[g * STRIDE + at] : 0.0f).bits); };
                    x[0].at[word] = number(term) | number(term + 1) << 16;
                }
                weights.multiply(sums, x);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) deltas[warp_id()][(2 * t + i % 2) * TILE_ROWS + g + i / 2 * 8] = sums[0][i];
        }
        __syncthreads();
        float input = deltas[0][thread];
#pragma unroll
        for (int part = 1; part < DELTA_PARTS; ++part) input += deltas[part][thread];
        float delta = softplus(input + bias);
        pairs[thread] = {delta, delta * u};
        if (!SHARED_CHANNEL) {
            if (there) {
            const float* b = rows + pair_column * STRIDE + RANK;
            const float* a = args.a + channel * STATES;
            State* state = args.state + (int64_t(own_slot) * args.channels + channel) * STATES;
            float y = 0.0f;
            for (int n = 0; n < STATES; ++n) {
                float h = fmaf(exp2_fast(delta * (LOG2_E * a[n])), to_float(state[n]), delta * u * b[n]);
                state[n] = from_float<State>(h);
                y = fmaf(b[STATES + n], h, y);
            }
            args.y[activation_place(sequence, channel, args.channel_blocks)] = from_float<bf16>(fmaf(skip, u, y) * gate);
            }
            __syncthreads();
            continue;
        }
        __syncthreads();
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            Unit unit = unit_of(turn);
            int64_t own = tile * TILE_ROWS + unit.channel;
            int slot = slot_of(group, unit.column);
            bool filled = slot >= 0 && own < args.channels;
            float y = 0.0f;
            if (!ONE_CHANNEL) load_rates(unit);
            if (filled) {
                State* state = args.state + (int64_t(slot) * args.channels + own) * STATES + 4 * unit.quad;
                Pack<State, 4> kept = turn < EARLY ? early[turn < EARLY ? turn : 0] : load_pack<State, 4>(state);
                const float* b = rows + unit.column * STRIDE + RANK + 4 * unit.quad;
                Pair pair = pairs[unit.column * TILE_ROWS + unit.channel];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float h = fmaf(exp2_fast(pair.delta * (LOG2_E * rates.at[i])), to_float(kept.at[i]), pair.step * b[i]);
                    kept.at[i] = from_float<State>(h);
                    y = fmaf(b[STATES + i], h, y);
                }
                store_pack<State, 4>(state, kept);
            }
            y = warp_sum<QUADS>(y);
            if (unit.quad == 0) reads[unit.column * TILE_ROWS + unit.channel] = y;
        }
        __syncthreads();
        if (there)
            args.y[activation_place(sequence, channel, args.channel_blocks)] = from_float<bf16>(fmaf(skip, u, reads[thread]) * gate);
#pragma unroll
        for (int turn = 0; turn < EARLY; ++turn) early[turn] = following[turn];
    }
}
