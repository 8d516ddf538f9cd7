// What the kernels of the selective scan share: the shape of a block, the arguments, and staging of a tile.
//
// A block owns CHANNELS neighbouring channels of one group and walks one segment of a sequence in tiles of STEPS
// steps. LANES neighbouring lanes share a channel and keep OWN of its states each in registers. The pair (delta,
// delta u) of every step and channel is computed once and staged in shared memory, as are B and C in f32.
#pragma once
#include "prelude.cuh"

// -D ELEMENT: type of u, delta, z, y, B, C and of their gradients. -D STATES: states a channel, 1 to 256.
using Element = ELEMENT;

constexpr int THREADS = 128;
constexpr int LANES = STATES <= 16 ? 4 : STATES <= 32 ? 8 : STATES <= 64 ? 16 : 32;
constexpr int OWN = (STATES + LANES - 1) / LANES;
constexpr int PADDED = LANES * OWN;
constexpr int CHANNELS = THREADS / LANES;
// Steps of a tile; also the distance of the saved states.
constexpr int STEPS = STATES <= 64 ? 32 : 16;
// While staging, four threads share a step and have WIDTH neighbouring channels each.
constexpr int COLUMNS = 4;
constexpr int WIDTH = CHANNELS / COLUMNS;
constexpr bool SIXTEEN = STATES == 16;

// A stretch of a sequence. Its length is a multiple of STEPS unless it is the sequence's last.
struct Segment {
    int64_t first;   // token
    int64_t length;  // tokens, 0 allowed
    int64_t chunk;   // index of its first saved state
    int32_t slot;
    int32_t flags;
};
constexpr int32_t FIRST = 1, LAST = 2, CONTINUED = 4;

struct Inputs {
    const Element* u;
    const Element* delta;
    const Element* z;  // or null
    const Element* b;  // [T, G, STATES]
    const Element* c;
    int64_t u_stride, delta_stride, z_stride, b_stride, c_stride;
    const float* a;           // [E, STATES]
    const float* d;           // [E] or null
    const float* delta_bias;  // [E] or null
    const Segment* segments;
    int64_t channels;
    int32_t groups;
    int32_t softplus;
};

// The block's channels and segment; blocks are numbered tile by tile within a segment.
struct Place {
    int64_t channel0;
    int64_t segment;
    int width;  // channels there are
    int group;
    int tile;
};

DEVICE Place place_of(const Inputs& in) {
    int64_t of_group = in.channels / in.groups;
    unsigned tiles_of_group = unsigned((of_group + CHANNELS - 1) / CHANNELS);
    unsigned tiles = tiles_of_group * unsigned(in.groups);
    Place place;
    place.segment = blockIdx.x / tiles;
    place.tile = int(blockIdx.x % tiles);
    place.group = int(unsigned(place.tile) / tiles_of_group);
    int64_t within = int64_t(unsigned(place.tile) % tiles_of_group) * CHANNELS;
    place.channel0 = place.group * of_group + within;
    place.width = int(least(of_group - within, int64_t(CHANNELS)));
    return place;
}

// Delta of delta + bias; `slope` is the derivative.
DEVICE float step_size(float x, bool with_softplus, float* slope = nullptr) {
    if (with_softplus) return softplus(x, slope);
    if (slope) *slope = 1.0f;
    return x;
}

// 2^x by arithmetic, relative error 3e-7, 2^-126 below that: relieves the special-function unit.
DEVICE float exp2_arithmetic(float x) {
    x = fminf(fmaxf(x, -126.0f), 128.0f);
    float shifted = x + 12582912.0f;
    float f = x - (shifted - 12582912.0f);
    float p = 0.00133813025f;
    p = p * f + 0.00966636852f;
    p = p * f + 0.0555038101f;
    p = p * f + 0.24022349f;
    p = p * f + 0.693147181f;
    p = p * f + 1.0f;
    return float_of(bits_of(p) + (bits_of(shifted) << 23));
}

// ---- Loads ----------------------------------------------------------------------------------------------------

// COUNT elements as loaded. Kept as words: single 16-bit elements would be taken apart, and so waited for, at once.
template <int COUNT> struct Raw {
    static constexpr int WORDS = (COUNT * int(sizeof(Element)) + 3) / 4;
    uint32_t word[WORDS];

    DEVICE float operator[](int i) const {
        if (sizeof(Element) == 4) return float_of(word[i]);
        return float_of(i & 1 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
    }
    // Rounds and puts elements i and i + 1 (i even).
    DEVICE void put(int i, float value, float next) {
        if (sizeof(Element) == 4) {
            word[i] = bits_of(value);
            if (i + 1 < COUNT) word[i + 1] = bits_of(next);
            return;
        }
#ifdef ON_CARD
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word[i / 2]) : "f"(next), "f"(value));
#else
        word[i / 2] = from_float<bf16>(value).bits | uint32_t(from_float<bf16>(next).bits) << 16;
#endif
    }
};

DEVICE uint32_t word_of(float value) { return bits_of(value); }
DEVICE uint32_t word_of(bf16 value) { return value.bits; }
DEVICE void set_word(float& to, uint32_t word) { to = float_of(word); }
DEVICE void set_word(bf16& to, uint32_t word) { to.bits = uint16_t(word); }

// True if all rows can be moved in packs of COUNT; `full` says that no pack is cut.
template <int COUNT> DEVICE bool movable(const Element* from, int64_t stride, bool full) {
    return full && COUNT * sizeof(Element) >= 4 && packable<Element, COUNT>(from, stride);
}

// COUNT elements of which the first `valid` exist (all or none if packed); the others are zeros.
template <int COUNT> DEVICE Raw<COUNT> load_some(const Element* from, int valid, bool packed) {
    constexpr int WORDS = Raw<COUNT>::WORDS;
    Raw<COUNT> raw;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) raw.word[i] = 0;
    if (packed) {
        if (valid > 0) {
#ifdef ON_CARD
            Pack<uint32_t, WORDS> pack = load_pack<uint32_t, WORDS>(reinterpret_cast<const uint32_t*>(from));
#pragma unroll
            for (int i = 0; i < WORDS; ++i) raw.word[i] = pack.at[i];
#else
            memcpy(raw.word, from, sizeof(raw.word));
#endif
        }
        return raw;
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        if (i < valid) raw.word[i * sizeof(Element) / 4] |= word_of(from[i]) << (sizeof(Element) == 2 ? i % 2 * 16 : 0);
    }
    return raw;
}

template <int COUNT> DEVICE void store_some(Element* to, const Raw<COUNT>& raw, int valid, bool packed) {
    if (packed) {
        if (valid <= 0) return;
#ifdef ON_CARD
        constexpr int WORDS = Raw<COUNT>::WORDS;
        Pack<uint32_t, WORDS> pack;
#pragma unroll
        for (int i = 0; i < WORDS; ++i) pack.at[i] = raw.word[i];
        store_pack<uint32_t, WORDS>(reinterpret_cast<uint32_t*>(to), pack);
#else
        memcpy(to, raw.word, sizeof(raw.word));
#endif
        return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        if (i < valid) {
            set_word(to[i], raw.word[i * sizeof(Element) / 4] >> (sizeof(Element) == 2 ? i % 2 * 16 : 0));
        }
    }
}

// A thread's part of a [T, E] array: neighbouring channels, at the thread's step of every tile.
struct Column {
    const Element* at;
    int64_t stride;
    bool packed;

    DEVICE Column(const Element* data, int64_t stride_, int64_t first_row, int64_t channel, bool full) {
        stride = stride_;
        at = data + first_row * stride + channel;
        packed = movable<WIDTH>(data + channel, stride, full);
    }
    DEVICE Raw<WIDTH> load(int64_t row, int valid) const { return load_some<WIDTH>(at + row * stride, valid, packed); }
};

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
    int step;
    int channel;  // within the tile
    int valid;    // channels there are, at most WIDTH

    DEVICE explicit Stager(const Place& place) {
        step = threadIdx.x / COLUMNS;
        channel = threadIdx.x % COLUMNS * WIDTH;
        valid = step < STEPS ? most(least(place.width - channel, WIDTH), 0) : 0;
    }
};

// Where the pair of a step and channel lies within a tile. The exchange within groups of four 16-byte units keeps
// 16-byte stores of eight neighbouring pairs a thread, and the reads of a warp, free of bank conflicts.
DEVICE int pair_index(int step, int channel) {
    if (CHANNELS != 32) return step * CHANNELS + channel;
    int unit = channel / 2, column = unit / 4;
    return step * CHANNELS + (column * 4 + ((unit % 4) ^ column ^ (step & 1))) * 2 + channel % 2;
}

// The pairs of a lane's channel, for steps whose parity is known when compiled.
struct PairRow {
    float2 *even, *odd;

    DEVICE PairRow(float2* tile, int channel) {
        even = tile + pair_index(0, channel);
        odd = tile + pair_index(1, channel) - CHANNELS;
    }
    DEVICE float2* at(int first, int j) const { return (j & 1 ? odd : even) + (first + j) * CHANNELS; }
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
DEVICE void store_pairs(float2* tile, const Stager& stager, const Values& x, const Values& y) {
    if (WIDTH % 2 == 0) {
#pragma unroll
        for (int i = 0; i + 1 < WIDTH; i += 2) {
            float* to = reinterpret_cast<float*>(tile + pair_index(stager.step, stager.channel + i));
            store_pack(to, Pack<float, 4>{{x.at[i], y.at[i], x.at[i + 1], y.at[i + 1]}});
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) tile[pair_index(stager.step, stager.channel + i)] = make_float2(x.at[i], y.at[i]);
}

DEVICE void load_pairs(const float2* tile, const Stager& stager, Values& x, Values& y) {
    if (WIDTH % 2 == 0) {
#pragma unroll
        for (int i = 0; i + 1 < WIDTH; i += 2) {
            const float* from = reinterpret_cast<const float*>(tile + pair_index(stager.step, stager.channel + i));
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
        float2 pair = tile[pair_index(stager.step, stager.channel + i)];
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

// With STATES = 16, threads 0 to 63 bring B and 64 to 127 C, eight states of a step each.
DEVICE void load_maps(MapRaw& raw, const Inputs& in, int group, int64_t row0, int count, bool want_b, bool want_c) {
    if (!SIXTEEN) return;
    bool is_c = threadIdx.x >= 64;
    int part = threadIdx.x % 64, step = part / 2;
    bool wanted = (is_c ? want_c : want_b) && step < count;
    const Element* data = is_c ? in.c : in.b;
    int64_t stride = is_c ? in.c_stride : in.b_stride;
    const Element* base = data + group * 16 + part % 2 * 8;
    raw.values = load_some<8>(base + (row0 + step) * stride, wanted ? 8 : 0, movable<8>(base, stride, true));
}

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
#pragma unroll
                for (int i = 0; i < 4; ++i) four.at[i] = raw.values[half + (i ^ copy)];
                store_pack(row + copy * COPY_PITCH<COPIES> + half, four);
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

// ---- States of a lane -------------------------------------------------------------------------------------------

// The lane's channel and states; slot i of a lane holds state `first + (i ^ order)`.
struct Lane {
    int64_t offset;  // of its channel's states in [E, STATES]
    int channel;     // within the tile
    int first;
    int order;
    bool live;

    DEVICE Lane(const Place& place, int order_) {
        channel = threadIdx.x / LANES;
        first = threadIdx.x % LANES * OWN;
        order = order_;
        live = channel < place.width;
        offset = (place.channel0 + channel) * STATES;
    }
    DEVICE int state(int i) const { return first + (i ^ order); }
    DEVICE bool has(int i) const { return live && state(i) < STATES; }
    // From [E, STATES]; zeros where there is nothing or `from` is null.
    DEVICE void load(const float* from, float* values) const {
#pragma unroll
        for (int i = 0; i < OWN; ++i) values[i] = from && has(i) ? from[offset + state(i)] : 0.0f;
    }
    DEVICE void store(float* to, const float* values) const {
        float* at = to + offset;
        if (OWN == 4 && STATES % 4 == 0 && order == 0 && reinterpret_cast<uint64_t>(at) % 16 == 0) {
            if (has(0)) store_pack(at + first, Pack<float, 4>{{values[0], values[1], values[2], values[3]}});
            return;
        }
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            if (has(i)) at[state(i)] = values[i];
        }
    }
    // A, and A log2(e) with -inf made finite: a step of size 0 must leave the state alone.
    DEVICE void load_rates(const float* a, float* rates, float* rates2) const {
        load(a, rates);
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            if (rates[i] < -1e38f) rates[i] = -1e38f;
            rates2[i] = rates[i] * LOG2_E;
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
