// A lane's part of the general scan: numbers, its channel and states, what it loads.
#pragma once
#include "prelude.cuh"

// -D ELEMENT: type of u, delta, z, y, token B and C, and of their gradients. -D STATES: 1 to 256.
// -D COMPLEX, -D TOKEN_B, -D TOKEN_C: 0 or 1. -D CHANNELS: channels that a block has at a time, 8, 16 or 32.
// -D CHUNK: steps from one saved state to the next. -D PASSES: channels that a thread of backward has, one after
// another. -D TOGETHER: steps, 1 to 8, whose gradients by B and C backward sums over a block's warps at a time.
using Element = ELEMENT;

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int LANES = THREADS / CHANNELS;
constexpr int OWN = (STATES + LANES - 1) / LANES;
constexpr int STEPS = 8;
constexpr int MARKS = CHUNK / STEPS;
constexpr int PARTS = COMPLEX ? 2 : 1;
// y = FACTOR Re(C h): a complex state stands for its conjugate too.
constexpr float FACTOR = PARTS;
// Floats of a channel's states.
constexpr int NUMBERS = STATES * PARTS;
// B and C of the token: their gradients are sums over channels.
constexpr int MAPS = TOKEN_B + TOKEN_C;
constexpr int ROW = MAPS * NUMBERS;
// Loops over steps are unrolled where the states of all steps fit in registers.
constexpr int UNROLLED = OWN == 1 ? STEPS : 1;
constexpr int UNROLLED_TOGETHER = OWN == 1 ? TOGETHER : 1;
static_assert(LANES >= STEPS && LANES <= WARP && STEPS % TOGETHER == 0 && CHUNK % STEPS == 0, "divisions");

// ---- Numbers ---------------------------------------------------------------------------------------------------

#if COMPLEX
struct Number {
    float re, im;
};
template <class T> DEVICE Number number_at(const T* from) { return {to_float(from[0]), to_float(from[1])}; }
DEVICE void put(float* to, Number x) { to[0] = x.re, to[1] = x.im; }
DEVICE Number conj(Number x) { return {x.re, -x.im}; }
DEVICE Number add(Number x, Number y) { return {x.re + y.re, x.im + y.im}; }
DEVICE Number scale(Number x, float r) { return {x.re * r, x.im * r}; }
DEVICE Number times(Number x, Number y) { return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re}; }
DEVICE float real_of_product(Number x, Number y) { return x.re * y.re - x.im * y.im; }
// exp(delta a).
DEVICE Number decay(Number a, float delta) {
    float size = exp2_fast(LOG2_E * (delta * a.re)), sine, cosine;
    sincosf(delta * a.im, &sine, &cosine);
    return {size * cosine, size * sine};
}
DEVICE Number across(Number x, int step) {
    return {x.re + __shfl_xor_sync(FULL_WARP, x.re, step), x.im + __shfl_xor_sync(FULL_WARP, x.im, step)};
}
#else
struct Number {
    float re;
};
template <class T> DEVICE Number number_at(const T* from) { return {to_float(from[0])}; }
DEVICE void put(float* to, Number x) { to[0] = x.re; }
DEVICE Number conj(Number x) { return x; }
DEVICE Number add(Number x, Number y) { return {x.re + y.re}; }
DEVICE Number scale(Number x, float r) { return {x.re * r}; }
DEVICE Number times(Number x, Number y) { return {x.re * y.re}; }
DEVICE float real_of_product(Number x, Number y) { return x.re * y.re; }
DEVICE Number decay(Number a, float delta) { return {exp2_fast(LOG2_E * (delta * a.re))}; }
DEVICE Number across(Number x, int step) { return {x.re + __shfl_xor_sync(FULL_WARP, x.re, step)}; }
#endif

DEVICE Number zero() { return Number(); }
DEVICE Number conj_times(Number x, Number y) { return times(conj(x), y); }
// Re(x* y).
DEVICE float dot(Number x, Number y) { return real_of_product(conj(x), y); }
// A select: NaN in the number that is not chosen does not matter.
DEVICE Number chosen(bool first, Number x, Number y) { return first ? x : y; }

// ---- Arguments, places, loads ----------------------------------------------------------------------------------

struct Sequence {
    int64_t first;   // token
    int64_t length;  // tokens, 0 allowed
    int64_t chunk;   // index of its first saved state
    int32_t slot;
    int32_t continued;
};

struct Inputs {
    const Element* u;
    const Element* delta;
    const Element* z;        // or null
    const Element* b;        // [T, G, STATES, PARTS] if TOKEN_B
    const Element* c;        // [T, G, STATES, PARTS] if TOKEN_C
    const float* constant_b; // [E, STATES, PARTS] if not
    const float* constant_c;
    int64_t u_stride, delta_stride, z_stride, b_stride, c_stride;
    const float* a;           // [E, STATES, PARTS]
    const float* d;           // [E] or null
    const float* delta_bias;  // [E] or null
    const Sequence* sequences;
    int64_t channels;
    int32_t groups;
    int32_t softplus;
};

// The block's sequence and tile of up to `size` channels of one group.
struct Place {
    int64_t sequence, channel0;
    int64_t width;  // channels there are
    int group;
    int tile;

    DEVICE Place(const Inputs& in, int size) {
        int64_t of_group = in.channels / in.groups;
        unsigned tiles_of_group = unsigned(ceil_div(of_group, size));
        unsigned tiles = tiles_of_group * unsigned(in.groups);
        sequence = blockIdx.x / tiles;
        tile = int(blockIdx.x % tiles);
        group = int(unsigned(tile) / tiles_of_group);
        int64_t within = int64_t(unsigned(tile) % tiles_of_group) * size;
        channel0 = group * of_group + within;
        width = least(of_group - within, int64_t(size));
    }
};

// What a step needs of its token, for one channel; zeros where there is none.
struct Token {
    float u, delta, slope;
};

// A lane's channel and states: lane, lane + LANES, .. The states from STATES on are zeros.
struct Channel {
    int64_t channel;
    int64_t matrix;  // floats of [E, STATES, PARTS]
    int64_t within;  // of the channel's first state in a row of B or C
    int lane;
    int base;  // the channel's first lane in the warp
    bool there;
    float d, bias;
    Number a[OWN], b[OWN], c[OWN];

    DEVICE Channel(const Inputs& in, const Place& place, int pass) {
        int index = pass * CHANNELS + int(threadIdx.x) / LANES;
        lane = lane_id() % LANES;
        base = lane_id() - lane;
        there = index < place.width;
        // Lanes without a channel read another's, and write nothing.
        channel = place.channel0 + (there ? index : 0);
        matrix = in.channels * NUMBERS;
        within = int64_t(place.group) * NUMBERS;
        d = in.d ? in.d[channel] : 0.0f;
        bias = in.delta_bias ? in.delta_bias[channel] : 0.0f;
        load(a, in.a);
        if (!TOKEN_B) load(b, in.constant_b);
        if (!TOKEN_C) load(c, in.constant_c);
    }
    DEVICE int state(int j) const { return lane + j * LANES; }
    DEVICE int64_t offset(int j) const { return channel * NUMBERS + state(j) * PARTS; }
    DEVICE void load(Number* to, const float* matrix_of) const {
#pragma unroll
        for (int j = 0; j < OWN; ++j) to[j] = state(j) < STATES ? number_at(matrix_of + offset(j)) : zero();
    }
    DEVICE void store(float* matrix_of, const Number* from) const {
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
            if (there && state(j) < STATES) put(matrix_of + offset(j), from[j]);
        }
    }
    DEVICE Number of_token(const Element* map, int64_t stride, int64_t token, int j) const {
        return state(j) < STATES ? number_at(map + token * stride + within + state(j) * PARTS) : zero();
    }
    DEVICE Number b_of(const Inputs& in, int64_t token, int j) const {
        return TOKEN_B ? of_token(in.b, in.b_stride, token, j) : b[j];
    }
    DEVICE Number c_of(const Inputs& in, int64_t token, int j) const {
        return TOKEN_C ? of_token(in.c, in.c_stride, token, j) : c[j];
    }
    DEVICE Token token_of(const Inputs& in, int64_t token, bool valid) const {
        Token result = {0.0f, 0.0f, 0.0f};
        if (!valid) return result;
        result.u = to_float(in.u[token * in.u_stride + channel]);
        float x = to_float(in.delta[token * in.delta_stride + channel]) + bias;
        result.slope = 1.0f;
        result.delta = in.softplus ? softplus(x, &result.slope) : x;
        return result;
    }
    DEVICE float give(float value, int step) const { return __shfl_sync(FULL_WARP, value, base + step); }
};
