// What the kernels of the selective scan share: the shape of a block, the arguments, and loads.
//
// A block owns CHANNELS neighbouring channels of one group and walks one segment of a sequence in tiles of STEPS
// steps. LANES neighbouring lanes share PAIR channels and keep OWN states of each in registers. The pair (delta,
// delta u) of every step and channel is computed once and staged in shared memory, as are B and C in f32. What a
// multiprocessor can bring from shared memory to registers, one word a lane and cycle for all its warps, is as scarce
// as its arithmetic: with two channels a lane, the values of B and C are brought once for both.
#pragma once
#include "prelude.cuh"

// -D ELEMENT: type of u, delta, z, y, B, C and of their gradients. -D STATES: states a channel, 1 to 256.
using Element = ELEMENT;

constexpr int THREADS = 128;
constexpr int LANES = STATES <= 16 ? 4 : STATES <= 32 ? 8 : STATES <= 64 ? 16 : 32;
constexpr int OWN = (STATES + LANES - 1) / LANES;
constexpr int PADDED = LANES * OWN;
// -D PAIR: channels of a lane, 1 or 2.
#ifndef PAIR
#define PAIR 1
#endif
constexpr int CHANNELS = THREADS / LANES * PAIR;
// States of a lane, those of its first channel first.
constexpr int HELD = PAIR * OWN;
// Steps of a tile; also the distance of the saved states.
constexpr int STEPS = STATES <= 64 ? 32 : 16;
// While staging, COLUMNS threads share a step and have WIDTH neighbouring channels each; PASSES steps a thread.
constexpr int COLUMNS = CHANNELS == 64 ? 8 : 4;
constexpr int WIDTH = CHANNELS / COLUMNS;
constexpr int ROWS = THREADS / COLUMNS;
constexpr int PASSES = (STEPS + ROWS - 1) / ROWS;
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

// A state a step further. Kernels that come to the same state by different ways must round alike.
DEVICE float advance(float state, float decay, float input) {
#ifdef ON_CARD
    return __fmaf_rn(decay, state, input);
#else
    return decay * state + input;
#endif
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

// A thread's part of a [T, E] array: neighbouring channels, at its steps of one tile after another. FAST: fast_rows.
template <class T, bool FAST> struct Column {
    T* at;
    int64_t stride;
    bool packed;

    DEVICE Column(T* data, int64_t stride_, int64_t row, int64_t channel, bool full) {
        // An array that is missing stays null wherever it is moved.
        bool there = FAST || data;
        stride = there ? stride_ : 0;
        at = there ? data + row * stride + channel : nullptr;
        packed = FAST || (there && movable<WIDTH>(data + channel, stride, full));
    }
    // The same step of the row `rows` further, which is within a tile or two.
    DEVICE T* row(int rows) const {
        // Short distances of short rows: one multiplication, of bytes.
        if (FAST) return (T*)((const char*)at + int64_t(rows) * int32_t(stride * int(sizeof(T))));
        return at + rows * stride;
    }
    DEVICE void forth() { at = row(STEPS); }
    DEVICE void back() { at = row(-STEPS); }
    DEVICE Raw<WIDTH> load(int pass, int valid) const { return load_some<WIDTH>(row(pass * ROWS), valid, FAST || packed); }
    DEVICE void store(int pass, const Raw<WIDTH>& raw, int valid) const {
        store_some<WIDTH>(row(pass * ROWS), raw, valid, FAST || packed);
    }
    // Into an array of equal rows that lies `distance` elements behind this one, both aligned alike.
    DEVICE void store_beside(int64_t distance, int pass, const Raw<WIDTH>& raw, int valid) const {
        store_some<WIDTH>(row(pass * ROWS) + distance, raw, valid, FAST || packed);
    }
};

// Whether a block whose channels all exist can take the short way for an array.
DEVICE bool fast_rows(const Element* data, int64_t stride) {
    return movable<WIDTH>(data, stride, true) && stride >= 0 && stride < (int64_t(1) << 24);
}
