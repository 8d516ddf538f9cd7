// Tiles of the selective scan in shared memory, and the lanes that walk them.
#pragma once
#include "cuda_common.cuh"

// Bias and D of the block's channels in shared memory, zeros where there are none; a barrier must follow.
constexpr int CHANNEL_FLOATS = 2 * CHANNELS;
DEVICE void load_channels(float* to, const Inputs& in, const Place& place) {
    for (int i = threadIdx.x; i < CHANNELS; i += THREADS) {
        bool there = i < place.width;
        to[i] = there && in.delta_bias ? in.delta_bias[place.channel0 + i] : 0.0f;
        to[CHANNELS + i] = there && in.d ? in.d[place.channel0 + i] : 0.0f;
    }
}

// The place of a thread while it stages: its step in the tile and its channels.
struct Stager {
    int first;    // step in the tile; its others are ROWS apart
    int channel;  // within the tile
    int valid;    // channels there are, at most WIDTH

    DEVICE explicit Stager(const Place& place) {
        first = threadIdx.x / COLUMNS;
        channel = threadIdx.x % COLUMNS * WIDTH;
        valid = most(least(place.width - channel, WIDTH), 0);
    }
    DEVICE int step(int pass) const { return first + pass * ROWS; }
    // Whether the tile has its step of a pass at all.
    DEVICE bool has(int pass) const { return STEPS % ROWS == 0 || step(pass) < STEPS; }
    // Its channels at that step if the tile has `steps` steps.
    DEVICE int at(int pass, int steps) const { return has(pass) && step(pass) < steps ? valid : 0; }
};

// Where the pair of a step and channel lies within a tile. The exchange within groups of four 16-byte units keeps
// 16-byte stores of eight neighbouring pairs a thread, the stores of four steps' sums by four lanes, and the reads of
// a warp free of bank conflicts.
DEVICE int pair_index(int step, int channel) {
    if (CHANNELS < 32) return step * CHANNELS + channel;
    int unit = channel / 2, column = unit / 4;
    int exchange = CHANNELS == 64 ? column / 2 ^ (step & 3) : column ^ (step & 1);
    return step * CHANNELS + (unit ^ (exchange & 3)) * 2 + channel % 2;
}

// Delta and delta u of a lane's channels at a step.
struct Step {
    float delta[PAIR], value[PAIR];
};

// The pairs of a lane's channels, for steps whose place in every four is known when compiled.
struct PairRow {
    float2* four[4];

    DEVICE PairRow(float2* tile, int channel) {
#pragma unroll
        for (int j = 0; j < 4; ++j) four[j] = tile + pair_index(j, channel) - j * CHANNELS;
    }
    DEVICE float2* at(int first, int j) const { return four[j] + (first + j) * CHANNELS; }
    DEVICE Step load(int first, int j) const {
        Step step;
        Pack<float, 2 * PAIR> pack = load_pack<float, 2 * PAIR>(reinterpret_cast<const float*>(at(first, j)));
#pragma unroll
        for (int p = 0; p < PAIR; ++p) {
            step.delta[p] = pack.at[2 * p];
            step.value[p] = pack.at[2 * p + 1];
        }
        return step;
    }
};

// A thread's WIDTH neighbouring values while staging, moved by sixteen bytes where that goes.
struct Values {
    float at[WIDTH];

    DEVICE void load(const float* from) {
        if (WIDTH % 4 == 0) {
#pragma unroll
            for (int i = 0; i + 3 < WIDTH; i += 4) {
                Pack<float, 4> four = load_pack<float, 4>(from + i);
#pragma unroll
                for (int k = 0; k < 4; ++k) at[i + k] = four.at[k];
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) at[i] = from[i];
    }
    DEVICE void store(float* to) const {
        if (WIDTH % 4 == 0) {
#pragma unroll
            for (int i = 0; i + 3 < WIDTH; i += 4) {
                store_pack(to + i, Pack<float, 4>{{at[i], at[i + 1], at[i + 2], at[i + 3]}});
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) to[i] = at[i];
    }
};

// The pairs (x, y) of a staging thread's channels.
DEVICE void store_pairs(float2* tile, int step, int channel, const Values& x, const Values& y) {
    if (WIDTH % 2 == 0) {
#pragma unroll
        for (int i = 0; i + 1 < WIDTH; i += 2) {
            float* to = reinterpret_cast<float*>(tile + pair_index(step, channel + i));
            store_pack(to, Pack<float, 4>{{x.at[i], y.at[i], x.at[i + 1], y.at[i + 1]}});
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) tile[pair_index(step, channel + i)] = make_float2(x.at[i], y.at[i]);
}

DEVICE void load_pairs(const float2* tile, int step, int channel, Values& x, Values& y) {
    if (WIDTH % 2 == 0) {
#pragma unroll
        for (int i = 0; i + 1 < WIDTH; i += 2) {
            const float* from = reinterpret_cast<const float*>(tile + pair_index(step, channel + i));
            Pack<float, 4> two = load_pack<float, 4>(from);
            x.at[i] = two.at[0];
            y.at[i] = two.at[1];
            x.at[i + 1] = two.at[2];
            y.at[i + 1] = two.at[3];
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        float2 pair = tile[pair_index(step, channel + i)];
        x.at[i] = pair.x;
        y.at[i] = pair.y;
    }
}

// The tiles of a segment; all are full but the last.
struct Tiles {
    int count, tail;

    DEVICE explicit Tiles(int64_t length) {
        count = int((length + STEPS - 1) / STEPS);
        tail = int(length - int64_t(count - 1) * STEPS);
    }
    DEVICE int steps(int tile) const { return tile == count - 1 ? tail : STEPS; }
};

// ---- B and C --------------------------------------------------------------------------------------------------

// Distance of the copies of a map in shared memory; the pad keeps copies for different lanes in different banks.
template <int COPIES> constexpr int COPY_PITCH = STEPS * PADDED + (COPIES > 1 ? 16 : 0);
template <int COPIES> constexpr int MAP_FLOATS = COPIES * COPY_PITCH<COPIES>;

// Elements of B and C that a thread carries from load to store; none unless STATES is 16.
struct MapRaw {
    Raw<8> values;
};

// With STATES = 16, threads 0 to 63 bring B and 64 to 127 C, eight states of a step each, one tile after another.
struct MapColumn {
    const Element* at;
    int64_t tile;
    int step;
    bool wanted, packed;

    DEVICE MapColumn(const Inputs& in, int group, int64_t row, bool want_b, bool want_c) {
        bool is_c = threadIdx.x >= 64;
        int part = threadIdx.x % 64;
        int64_t stride = is_c ? in.c_stride : in.b_stride;
        const Element* base = (is_c ? in.c : in.b) + group * 16 + part % 2 * 8;
        step = part / 2;
        at = base + (row + step) * stride;
        tile = STEPS * stride;
        wanted = is_c ? want_c : want_b;
        packed = movable<8>(base, stride, true);
    }
    DEVICE void forth() { at += tile; }
    DEVICE void back() { at -= tile; }
    DEVICE void load(MapRaw& raw, int count) const {
        if (SIXTEEN) raw.values = load_some<8>(at, wanted && step < count ? 8 : 0, packed);
    }
};

// Puts the maps into shared memory, B at 0 and C at MAP_FLOATS; copy k has the states of every four in the
// order i ^ k. Without STATES = 16 they are read here.
template <int COPIES>
DEVICE void stage_maps(float* to, const MapRaw& raw, const Inputs& in, int group, int64_t row0, int count,
                       bool want_b, bool want_c) {
    if (SIXTEEN) {
        bool is_c = threadIdx.x >= 64;
        if (!(is_c ? want_c : want_b)) return;
        int part = threadIdx.x % 64, step = part / 2;
        float* row = to + (is_c ? MAP_FLOATS<COPIES> : 0) + step * 16 + part % 2 * 8;
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy) {
#pragma unroll
            for (int half = 0; half < 8; half += 4) {
                Pack<float, 4> four;
                // Every eight threads write the one half or the other, four each: no bank conflicts.
                bool swap = threadIdx.x & 4;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float here = raw.values[half + (i ^ copy)], there = raw.values[(half ^ 4) + (i ^ copy)];
                    four.at[i] = swap ? there : here;
                }
                store_pack(row + copy * COPY_PITCH<COPIES> + (swap ? half ^ 4 : half), four);
            }
        }
        return;
    }
    for (int i = threadIdx.x; i < STEPS * PADDED; i += THREADS) {
        int step = i / PADDED, state = i % PADDED;
        bool there = step < count && state < STATES;
        int64_t row = row0 + step, column = int64_t(group) * STATES + state;
        if (want_b) to[i] = there ? to_float(in.b[row * in.b_stride + column]) : 0.0f;
        if (want_c) to[MAP_FLOATS<COPIES> + i] = there ? to_float(in.c[row * in.c_stride + column]) : 0.0f;
    }
}

// A thread's inputs of one tile on their way from device to shared memory.
struct ScanRaw {
    Raw<WIDTH> delta[PASSES], value[PASSES];
    MapRaw maps;
};

// ---- States of a lane -------------------------------------------------------------------------------------------

// The lane's channels and states; slot i of a channel holds state `first + (i ^ order)`.
struct Lane {
    int64_t offset;  // of its first channel's states in [E, STATES]
    int channel;     // its first within the tile
    int channels;    // it has
    int first;
    int order;

    DEVICE Lane(const Place& place, int order_) {
        channel = threadIdx.x / LANES * PAIR;
        first = threadIdx.x % LANES * OWN;
        order = order_;
        channels = most(least(place.width - channel, PAIR), 0);
        offset = (place.channel0 + channel) * STATES;
    }
    DEVICE int state(int i) const { return first + (i ^ order); }
    DEVICE bool has(int p, int i) const { return p < channels && state(i) < STATES; }
    // From [E, STATES]; zeros where there is nothing or `from` is null.
    DEVICE void load(const float* from, float* values) const {
#pragma unroll
        for (int k = 0; k < HELD; ++k) {
            int p = k / OWN, i = k % OWN;
            values[k] = from && has(p, i) ? from[offset + p * STATES + state(i)] : 0.0f;
        }
    }
    DEVICE void store(float* to, const float* values) const {
        float* at = to + offset;
        bool packed = OWN == 4 && STATES % 4 == 0 && order == 0 && reinterpret_cast<uint64_t>(at) % 16 == 0;
#pragma unroll
        for (int p = 0; p < PAIR; ++p) {
            const float* own = values + p * OWN;
            if (packed) {
                if (has(p, 0)) store_pack(at + p * STATES + first, Pack<float, 4>{{own[0], own[1 % OWN], own[2 % OWN], own[3 % OWN]}});
                continue;
            }
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                if (has(p, i)) at[p * STATES + state(i)] = own[i];
            }
        }
    }
    // A log2(e) with -inf made finite: a step of size 0 must leave the state alone.
    DEVICE void load_rates(const float* a, float* rates) const {
        load(a, rates);
#pragma unroll
        for (int k = 0; k < HELD; ++k) {
            if (rates[k] < -1e38f) rates[k] = -1e38f;
            rates[k] *= LOG2_E;
        }
    }
};

// A lane's OWN values of a step from shared memory.
DEVICE void load_own(const float* from, float* values) {
    if (OWN == 4) {
        Pack<float, 4> four = load_pack<float, 4>(from);
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = four.at[i];
    } else {
#pragma unroll
        for (int i = 0; i < OWN; ++i) values[i] = from[i];
    }
}

// Sums of four values over the lanes of a channel; the lane with number j (mod 4) gets sum j. Three exchanges for
// four sums where LANES is 4.
DEVICE float scatter_four(const float* values) {
    bool upper = threadIdx.x & 2, odd = threadIdx.x & 1;
    float low = upper ? values[2] : values[0], high = upper ? values[3] : values[1];
    low += __shfl_xor_sync(FULL_WARP, upper ? values[0] : values[2], 2);
    high += __shfl_xor_sync(FULL_WARP, upper ? values[1] : values[3], 2);
    float sum = odd ? high : low;
    sum += __shfl_xor_sync(FULL_WARP, odd ? low : high, 1);
#pragma unroll
    for (int step = 4; step < LANES; step *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
    return sum;
}
