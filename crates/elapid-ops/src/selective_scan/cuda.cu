// Forward kernels of the selective scan, real numbers, states and arithmetic in f32 (common parts: cuda_common.cuh
// and cuda_stage.cuh; backward: cuda_backward.cuh).
//
// Every block works on one segment. One segment a sequence: selective_scan_forward alone. Several segments
// (cuda_segments.cuh): selective_scan_ends (each segment's end state from zero and its sum of delta, as its decay is
// exp(A sum delta)), selective_scan_combine (the true start of every segment, one after another),
// selective_scan_forward. With as many sequences as fill the card, selective_scan_joined does all three in one pass over
// whole sequences, with the same bits.
#include "cuda_stage.cuh"

#ifndef FORWARD_BLOCKS
#define FORWARD_BLOCKS (PAIR == 2 ? 3 : 5)
#endif

// Where the output of a step and channel waits in the place of the pairs of its step.
DEVICE float* output_place(float2* tile, int step, int channel) {
    float* unit = reinterpret_cast<float*>(tile + pair_index(step, channel / PAIR * PAIR));
    return PAIR == 2 ? unit + (step & 1) * 2 + channel % 2 : unit + (step / 2 & 1);
}

struct ForwardArguments {
    Inputs in;
    const float* h0;      // [slots, E, STATES] or null (zeros)
    const float* starts;  // [segments, E, STATES]: starts of segments that are not FIRST; null if all are
    float* last;          // [slots, E, STATES]
    float* chunks;        // [chunks, E, STATES] or null: the state before every STEPS-th step of a sequence
    Element* y;
    int64_t y_stride;
};

constexpr int FORWARD_FLOATS = 2 * (STEPS * CHANNELS * 2 + 2 * MAP_FLOATS<1>) + CHANNEL_FLOATS;

// The states of a lane through the pieces of a sequence that is cut, but walked from end to end: beside the states
// themselves those that the piece makes from zero, which with its decay give the states that enter the next one, as
// selective_scan_combine has them.
template <bool JOINED> struct Pieces {
    float start[HELD], own[HELD], size[PAIR];

    DEVICE void begin(const float* h) {
#pragma unroll
        for (int k = 0; k < HELD; ++k) {
            start[k] = h[k];
            own[k] = 0.0f;
        }
#pragma unroll
        for (int p = 0; p < PAIR; ++p) size[p] = 0.0f;
    }
    DEVICE void grow(int p, float delta) { size[p] += delta; }
    DEVICE void step(int k, float decay, float input) { own[k] = advance(own[k], decay, input); }
    DEVICE void end(const float* rates, float* h) {
#pragma unroll
        for (int k = 0; k < HELD; ++k) h[k] = advance(start[k], exp2_fast(size[k / OWN] * rates[k]), own[k]);
        begin(h);
    }
};
template <> struct Pieces<false> {
    DEVICE void begin(const float*) {}
    DEVICE void grow(int, float) {}
    DEVICE void step(int, float, float) {}
    DEVICE void end(const float*, float*) {}
};

// FAST: a full block with D, a gate and softplus, all of whose rows can be moved in packs. Most blocks are such, and
// without the tests for all that they take a tenth (here) to a quarter (backward) less time. JOINED: the segment is a whole
// sequence, cut every `piece` tiles.
template <bool FAST, bool JOINED>
DEVICE void scan_forward(const ForwardArguments& args, const Place& place, int piece) {
    DYNAMIC_SHARED(float, shared);
    const Inputs& in = args.in;
    float2* pairs = reinterpret_cast<float2*>(shared);
    float* maps = shared + 2 * STEPS * CHANNELS * 2;
    float* of_channels = maps + 4 * MAP_FLOATS<1>;
    const Segment segment = in.segments[place.segment];
    const int64_t state_len = in.channels * STATES;
    const Stager stager(place);
    const Lane lane(place, 0);
    const int64_t channel = place.channel0 + stager.channel, row0 = segment.first + stager.first;
    const bool full = FAST || place.width == CHANNELS, gated = FAST || in.z, softened = FAST || in.softplus;
    Column<const Element, FAST> us(in.u, in.u_stride, row0, channel, full), rest_us = us;
    Column<const Element, FAST> deltas(in.delta, in.delta_stride, row0, channel, full);
    Column<const Element, FAST> zs(in.z, in.z_stride, row0, channel, full);
    Column<Element, FAST> ys(args.y, args.y_stride, row0, channel, full);
    MapColumn columns(in, place.group, segment.first, true, true);
    const float *biases = of_channels + stager.channel, *skips = biases + CHANNELS;

    const Tiles tiles(segment.length);
    // Tiles are loaded, staged and finished in order, each once.
    auto load = [&](ScanRaw& raw, int tile) {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            int valid = stager.at(pass, tiles.steps(tile));
            raw.delta[pass] = deltas.load(pass, valid);
            raw.value[pass] = us.load(pass, valid);
        }
        columns.load(raw.maps, tiles.steps(tile));
        deltas.forth();
        us.forth();
        columns.forth();
    };
    auto stage = [&](const ScanRaw& raw, int tile) {
        float2* to = pairs + (tile & 1) * STEPS * CHANNELS;
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            if (!stager.has(pass)) continue;
            bool there = stager.at(pass, tiles.steps(tile)) > 0;
            Values bias, delta, value;
            bias.load(biases);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                // A select: steps after the end change nothing.
                delta.at[i] = there ? step_size(raw.delta[pass][i] + bias.at[i], softened) : 0.0f;
                value.at[i] = delta.at[i] * raw.value[pass][i];
            }
            store_pairs(to, stager.step(pass), stager.channel, delta, value);
        }
        stage_maps<1>(maps + (tile & 1) * 2 * MAP_FLOATS<1>, raw.maps, in, place.group,
                      segment.first + int64_t(tile) * STEPS, tiles.steps(tile), true, true);
    };
    struct Rest {
        Raw<WIDTH> u[PASSES], z[PASSES];
    };
    auto load_rest = [&](Rest& rest, int tile) {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            int valid = stager.at(pass, tiles.steps(tile));
            if (FAST || in.d) rest.u[pass] = rest_us.load(pass, valid);
            if (gated) rest.z[pass] = zs.load(pass, valid);
        }
        rest_us.forth();
        zs.forth();
    };
    auto finish = [&](const Rest& rest, int tile) {
        float2* from = pairs + (tile & 1) * STEPS * CHANNELS;
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            int valid = stager.at(pass, tiles.steps(tile));
            if (valid == 0) continue;
            Values y, skip;
            skip.load(skips);
#pragma unroll
            for (int i = 0; i < WIDTH; i += PAIR) {
                const float* sum = output_place(from, stager.step(pass), stager.channel + i);
                Pack<float, PAIR> sums = load_pack<float, PAIR>(sum);
#pragma unroll
                for (int p = 0; p < PAIR; ++p) y.at[i + p] = sums.at[p];
            }
            auto output = [&](int i) {
                if (i >= WIDTH) return 0.0f;
                float sum = y.at[i];
                if (FAST || in.d) sum += skip.at[i] * rest.u[pass][i];
                if (gated) sum *= silu(rest.z[pass][i]);
                return sum;
            };
            Raw<WIDTH> out;
#pragma unroll
            for (int i = 0; i < WIDTH; i += 2) out.put(i, output(i), output(i + 1));
            ys.store(pass, out, valid);
        }
        ys.forth();
    };

    float rates[HELD], h[HELD];
    lane.load_rates(in.a, rates);
    const float* start = nullptr;
    if (!(segment.flags & FIRST)) {
        start = args.starts + place.segment * state_len;
    } else if (args.h0 && (segment.flags & CONTINUED)) {
        start = args.h0 + segment.slot * state_len;
    }
    lane.load(start, h);
    Pieces<JOINED> pieces;
    pieces.begin(h);
    int next = piece;

    load_channels(of_channels, in, place);
    __syncthreads();
    ScanRaw raw;
    Rest rest;
    if (tiles.count > 0) {
        load(raw, 0);
        stage(raw, 0);
        if (tiles.count > 1) load(raw, 1);
    }
    for (int tile = 0; tile < tiles.count; ++tile) {
        // After this barrier tile is staged and the results of tile - 1 lie in the other buffer, where the thread
        // that takes them also stages tile + 1.
        __syncthreads();
        if (tile > 0) finish(rest, tile - 1);
        if (tile + 1 < tiles.count) stage(raw, tile + 1);
        if (tile + 2 < tiles.count) load(raw, tile + 2);
        load_rest(rest, tile);
        if (JOINED && tile == next) {
            pieces.end(rates, h);
            next += piece;
        }
        if (args.chunks) lane.store(args.chunks + (segment.chunk + tile) * state_len, h);
        const PairRow row(pairs + (tile & 1) * STEPS * CHANNELS, lane.channel);
        float* own = output_place(pairs + (tile & 1) * STEPS * CHANNELS, threadIdx.x & 3, lane.channel);
        const float* map = maps + (tile & 1) * 2 * MAP_FLOATS<1> + lane.first;
        const int count = tiles.steps(tile);
#pragma unroll 1
        for (int t0 = 0; t0 < count; t0 += 4) {
            float y[PAIR][4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                Step step = row.load(t0, j);
                float b[OWN], c[OWN];
                load_own(map + (t0 + j) * PADDED, b);
                load_own(map + MAP_FLOATS<1> + (t0 + j) * PADDED, c);
#pragma unroll
                for (int p = 0; p < PAIR; ++p) {
                    y[p][j] = 0.0f;
                    pieces.grow(p, step.delta[p]);
#pragma unroll
                    for (int i = 0; i < OWN; ++i) {
                        float& state = h[p * OWN + i];
                        float decay = exp2_fast(step.delta[p] * rates[p * OWN + i]), input = step.value[p] * b[i];
                        state = advance(state, decay, input);
                        pieces.step(p * OWN + i, decay, input);
                        y[p][j] += c[i] * state;
                    }
                }
            }
            Pack<float, PAIR> sums;
#pragma unroll
            for (int p = 0; p < PAIR; ++p) sums.at[p] = scatter_four(y[p]);
            // The warp has read these steps' pairs, and no other warp does.
            __syncwarp();
            if (threadIdx.x % LANES < 4) store_pack(own + t0 * CHANNELS * 2, sums);
        }
    }
    __syncthreads();
    if (tiles.count > 0) finish(rest, tiles.count - 1);
    if (segment.flags & LAST) lane.store(args.last + segment.slot * state_len, h);
}

template <bool JOINED> DEVICE void any_scan_forward(const ForwardArguments& args, const int32_t* pieces) {
    const Inputs& in = args.in;
    const Place place = place_of(in);
    const int piece = JOINED ? pieces[place.segment] : 0;
    bool fast = place.width == CHANNELS && in.d && in.z && in.softplus;
    fast = fast && fast_rows(in.u + place.channel0, in.u_stride);
    fast = fast && fast_rows(in.delta + place.channel0, in.delta_stride);
    fast = fast && fast_rows(in.z + place.channel0, in.z_stride);
    fast = fast && fast_rows(args.y + place.channel0, args.y_stride);
    if (fast) {
        scan_forward<true, JOINED>(args, place, piece);
    } else {
        scan_forward<false, JOINED>(args, place, piece);
    }
}

KERNEL(selective_scan_forward, ForwardArguments, 128, FORWARD_BLOCKS) { any_scan_forward<false>(args, nullptr); }

struct JoinedArguments {
    ForwardArguments scan;  // whose segments are whole sequences
    const int32_t* pieces;  // [sequences]: tiles from cut to cut
};

KERNEL(selective_scan_joined, JoinedArguments, 128, FORWARD_BLOCKS) { any_scan_forward<true>(args.scan, args.pieces); }

#include "cuda_segments.cuh"
#include "cuda_backward.cuh"
#include "cuda_reduce.cuh"
