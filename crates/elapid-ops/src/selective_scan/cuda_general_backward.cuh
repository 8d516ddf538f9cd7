// The backward kernel of the general scan.
#pragma once
#include "cuda_general_channel.cuh"

struct BackwardArguments {
    Inputs inputs;
    const Element* dy;
    int64_t dy_stride;
    const float* chunks;
    const float* dlast;  // or null
    Element* du;         // [T, E], as the next two
    Element* ddelta;
    Element* dz;         // or null
    float* dh0;          // [slots, E, STATES, PARTS]
    float* da;           // [sequences, E, STATES, PARTS]
    float* db;           // the same, if not TOKEN_B
    float* dc;           // the same, if not TOKEN_C
    float* dd;           // [sequences, E] or null
    float* dbias;        // [sequences, E] or null
    float* dmaps;        // [G * tiles, T, MAPS, STATES, PARTS]
    int64_t tokens;
};

// What a channel's backward pass accumulates, and its gradient by the state.
struct Sums {
    Number carry[OWN], a[OWN], b[OWN], c[OWN];
    float d, bias;
};

// Puts a warp's sum of `value` over its channels where the sum over warps finds it.
DEVICE void put_map(float* room, const Channel& own, int j, Number value) {
    value = chosen(own.there, value, zero());
#pragma unroll
    for (int step = LANES; step < WARP; step *= 2) value = across(value, step);
    if (lane_id() < LANES && own.state(j) < STATES) put(room + own.state(j) * PARTS, value);
}

// Eight steps from `begin` on of the sequence, the last one first, given the states `h[0]` before them.
DEVICE void eight_back(const BackwardArguments& args, const Place& place, const Sequence& sequence, const Channel& own,
                       int64_t begin, bool adds, Number (*h)[OWN], Sums& sums, float* room) {
    const Inputs& in = args.inputs;
    const int mine = own.lane % STEPS;
    const int count = int(least(sequence.length - begin, int64_t(STEPS)));
    const int64_t first = sequence.first + begin;
    const bool valid = own.there && mine < count;
    const Token token = own.token_of(in, first + mine, valid);
    float dout = 0.0f, dy = 0.0f, z = 0.0f, gate = 0.0f;
    if (valid) {
        dout = dy = to_float(args.dy[(first + mine) * args.dy_stride + own.channel]);
        if (in.z) {
            z = to_float(in.z[(first + mine) * in.z_stride + own.channel]);
            gate = sigmoid(z);
            dy *= z * gate;
        }
    }
    Number decays[STEPS][OWN];
#pragma unroll UNROLLED
    for (int s = 0; s < STEPS; ++s) {
        const int64_t row = first + (s < count ? s : 0);
        const float delta = own.give(token.delta, s), step = own.give(token.delta * token.u, s);
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
            decays[s][j] = decay(own.a[j], delta);
            h[s + 1][j] = add(times(decays[s][j], h[s][j]), scale(own.b_of(in, row, j), step));
        }
    }
    // Sums over states: C h, B* G and (A w)* G.
    float y = 0.0f, by_input = 0.0f, by_decay = 0.0f;
#pragma unroll UNROLLED
    for (int part = STEPS / TOGETHER - 1; part >= 0; --part) {
#pragma unroll UNROLLED_TOGETHER
        for (int r = TOGETHER - 1; r >= 0; --r) {
            const int s = part * TOGETHER + r;
            const bool live = s < count;
            const int64_t row = first + (live ? s : 0);
            const float delta = own.give(token.delta, s), u = own.give(token.u, s);
            const float weight = FACTOR * own.give(dy, s);
            float of_y = 0.0f, of_input = 0.0f, of_decay = 0.0f;
            float* put_at = room + (warp_id() * TOGETHER + r) * ROW;
#pragma unroll
            for (int j = 0; j < OWN; ++j) {
                const Number b = own.b_of(in, row, j), c = own.c_of(in, row, j);
                const Number g = add(scale(conj(c), weight), sums.carry[j]);
                const Number w = times(decays[s][j], h[s][j]);
                const Number by_b = scale(g, delta * u), by_c = scale(conj(h[s + 1][j]), weight);
                of_y += real_of_product(c, h[s + 1][j]);
                of_input += dot(b, g);
                of_decay += dot(times(own.a[j], w), g);
                if (TOKEN_B) put_map(put_at, own, j, by_b);
                if (TOKEN_C) put_map(put_at + TOKEN_B * NUMBERS, own, j, by_c);
                if (live) {
                    sums.a[j] = add(sums.a[j], scale(conj_times(w, g), delta));
                    if (!TOKEN_B) sums.b[j] = add(sums.b[j], by_b);
                    if (!TOKEN_C) sums.c[j] = add(sums.c[j], by_c);
                    sums.carry[j] = conj_times(decays[s][j], g);
                }
            }
            of_y = warp_sum<LANES>(of_y);
            of_input = warp_sum<LANES>(of_input);
            of_decay = warp_sum<LANES>(of_decay);
            if (s == mine) y = of_y, by_input = of_input, by_decay = of_decay;
        }
        if (MAPS == 0) continue;
        __syncthreads();
        const int64_t begin_part = begin + part * TOGETHER;
        for (int i = int(threadIdx.x); i < TOGETHER * ROW; i += THREADS) {
            if (begin_part + i / (MAPS ? ROW : 1) >= sequence.length) break;
            float sum = 0.0f;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) sum += room[warp * TOGETHER * ROW + i];
            // The same thread added the tile's earlier channels.
            float* to = args.dmaps + (place.tile * args.tokens + sequence.first + begin_part) * ROW + i;
            *to = adds ? *to + sum : sum;
        }
        __syncthreads();
    }
    if (!valid || own.lane >= STEPS) return;
    const int64_t at = (first + mine) * in.channels + own.channel;
    float by_delta = (token.u * by_input + by_decay) * token.slope;
    float by_u = token.delta * by_input;
    y *= FACTOR;
    if (in.d) {
        y += own.d * token.u;
        by_u += own.d * dy;
        sums.d += dy * token.u;
    }
    sums.bias += by_delta;
    args.du[at] = from_float<Element>(by_u);
    args.ddelta[at] = from_float<Element>(by_delta);
    if (in.z) args.dz[at] = from_float<Element>(dout * y * silu_slope(z, gate));
}

KERNEL(selective_scan_general_backward, BackwardArguments, THREADS, 1) {
    DYNAMIC_SHARED(float, room);
    const Inputs& in = args.inputs;
    const Place place(in, CHANNELS * PASSES);
    const Sequence sequence = in.sequences[place.sequence];
    for (int pass = 0; pass < PASSES && pass * CHANNELS < place.width; ++pass) {
        const Channel own(in, place, pass);
        const int mine = own.lane % STEPS;
        Sums sums;
        sums.d = sums.bias = 0.0f;
#pragma unroll
        for (int j = 0; j < OWN; ++j) sums.carry[j] = sums.a[j] = sums.b[j] = sums.c[j] = zero();
        if (args.dlast) own.load(sums.carry, args.dlast + sequence.slot * own.matrix);
        for (int64_t chunk = ceil_div(sequence.length, CHUNK); chunk-- > 0;) {
            const int64_t begin = chunk * CHUNK;
            const int marks = int(ceil_div(least(sequence.length - begin, int64_t(CHUNK)), STEPS));
            // The states before every eighth step.
            Number mark[MARKS][OWN], h[STEPS + 1][OWN];
            own.load(h[0], args.chunks + (sequence.chunk + chunk) * own.matrix);
            for (int k = 0; k < marks; ++k) {
#pragma unroll
                for (int j = 0; j < OWN; ++j) mark[k][j] = h[0][j];
                if (k + 1 == marks) break;
                const int64_t first = sequence.first + begin + k * STEPS;
                const Token token = own.token_of(in, first + mine, own.there);
#pragma unroll UNROLLED
                for (int s = 0; s < STEPS; ++s) {
                    const float delta = own.give(token.delta, s), step = own.give(token.delta * token.u, s);
#pragma unroll
                    for (int j = 0; j < OWN; ++j) {
                        Number b = own.b_of(in, first + s, j);
                        h[0][j] = add(times(decay(own.a[j], delta), h[0][j]), scale(b, step));
                    }
                }
            }
            for (int k = marks - 1; k >= 0; --k) {
#pragma unroll
                for (int j = 0; j < OWN; ++j) h[0][j] = mark[k][j];
                eight_back(args, place, sequence, own, begin + k * STEPS, pass > 0, h, sums, room);
            }
        }
        const int64_t matrix = place.sequence * own.matrix, vector = place.sequence * in.channels + own.channel;
        own.store(args.da + matrix, sums.a);
        if (!TOKEN_B) own.store(args.db + matrix, sums.b);
        if (!TOKEN_C) own.store(args.dc + matrix, sums.c);
        const float dd = warp_sum<LANES>(sums.d), dbias = warp_sum<LANES>(sums.bias);
        if (own.there && own.lane == 0) {
            if (args.dd) args.dd[vector] = dd;
            if (args.dbias) args.dbias[vector] = dbias;
        }
#pragma unroll
        for (int j = 0; j < OWN; ++j) sums.carry[j] = chosen(sequence.continued, sums.carry[j], zero());
        own.store(args.dh0 + sequence.slot * own.matrix, sums.carry);
    }
}
