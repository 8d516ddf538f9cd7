// Cut sequences: what enters each of their segments, forward a state, backward a gradient.
#pragma once
#include "cuda_stage.cuh"

struct EndsArguments {
    Inputs in;
    const Element* dy;  // gradient of y, backward only
    int64_t dy_stride;
    float* ends;   // [segments, E, STATES]
    float* sizes;  // [segments, E]: sums of delta
};

// Forward: the state at the segment's end, from zero. BACKWARD: the gradient of the state before the segment, from
// the segment's own outputs alone.
template <bool BACKWARD, bool FAST> DEVICE void segment_ends(const EndsArguments& args, const Place& place) {
    DYNAMIC_SHARED(float, shared);
    const Inputs& in = args.in;
    float2* pairs = reinterpret_cast<float2*>(shared);
    float* maps = shared + 2 * STEPS * CHANNELS * 2;
    float* of_channels = maps + 4 * MAP_FLOATS<1>;
    const Segment segment = in.segments[place.segment];
    const int64_t state_len = in.channels * STATES;
    // Nothing asks for what leaves the sequence.
    if (segment.flags & (BACKWARD ? FIRST : LAST)) return;
    const Stager stager(place);
    const Lane lane(place, 0);
    const int64_t channel = place.channel0 + stager.channel, row0 = segment.first + stager.first;
    const bool full = FAST || place.width == CHANNELS;
    const bool gated = FAST || in.z, softened = FAST || in.softplus;
    const float* biases = of_channels + stager.channel;
    const Tiles tiles(segment.length);
    const int64_t start = BACKWARD ? int64_t(most(tiles.count - 1, 0)) * STEPS : 0;
    Column<const Element, FAST> values(BACKWARD ? args.dy : in.u, BACKWARD ? args.dy_stride : in.u_stride,
                                       row0 + start, channel, full);
    Column<const Element, FAST> deltas(in.delta, in.delta_stride, row0 + start, channel, full);
    Column<const Element, FAST> zs(in.z, in.z_stride, row0 + start, channel, full);
    MapColumn columns(in, place.group, segment.first + start, !BACKWARD, BACKWARD);
    // The k-th tile on the way.
    auto tile_at = [&](int k) { return BACKWARD ? tiles.count - 1 - k : k; };
    ScanRaw raw;
    Raw<WIDTH> z[PASSES];
    auto load = [&](int k) {
        int tile = tile_at(k);
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            int valid = stager.at(pass, tiles.steps(tile));
            raw.delta[pass] = deltas.load(pass, valid);
            raw.value[pass] = values.load(pass, valid);
            if (BACKWARD && gated) z[pass] = zs.load(pass, valid);
        }
        columns.load(raw.maps, tiles.steps(tile));
        if (BACKWARD) {
            deltas.back();
            values.back();
            zs.back();
            columns.back();
        } else {
            deltas.forth();
            values.forth();
            columns.forth();
        }
    };
    auto stage = [&](int k) {
        int tile = tile_at(k);
        float2* to = pairs + (k & 1) * STEPS * CHANNELS;
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            if (!stager.has(pass)) continue;
            bool there = stager.at(pass, tiles.steps(tile)) > 0;
            Values bias, delta, value;
            bias.load(biases);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                delta.at[i] = there ? step_size(raw.delta[pass][i] + bias.at[i], softened) : 0.0f;
                value.at[i] = BACKWARD ? raw.value[pass][i] : raw.value[pass][i] * delta.at[i];
                if (BACKWARD && gated) value.at[i] *= silu(z[pass][i]);
            }
            store_pairs(to, stager.step(pass), stager.channel, delta, value);
        }
        stage_maps<1>(maps + (k & 1) * 2 * MAP_FLOATS<1>, raw.maps, in, place.group,
                      segment.first + int64_t(tile) * STEPS, tiles.steps(tile), !BACKWARD, BACKWARD);
    };
    float rates[HELD], h[HELD], size[PAIR];
    lane.load_rates(in.a, rates);
#pragma unroll
    for (int k = 0; k < HELD; ++k) h[k] = 0.0f;
#pragma unroll
    for (int p = 0; p < PAIR; ++p) size[p] = 0.0f;
    load_channels(of_channels, in, place);
    __syncthreads();
    if (tiles.count > 0) {
        load(0);
        stage(0);
        if (tiles.count > 1) load(1);
    }
    for (int k = 0; k < tiles.count; ++k) {
        __syncthreads();
        if (k + 1 < tiles.count) stage(k + 1);
        if (k + 2 < tiles.count) load(k + 2);
        const PairRow row(pairs + (k & 1) * STEPS * CHANNELS, lane.channel);
        const float* map = maps + (k & 1) * 2 * MAP_FLOATS<1> + (BACKWARD ? MAP_FLOATS<1> : 0) + lane.first;
        const int groups = (tiles.steps(tile_at(k)) + 3) / 4;
#pragma unroll 1
        for (int g = 0; g < groups; ++g) {
            int t0 = (BACKWARD ? groups - 1 - g : g) * 4;
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                int j = BACKWARD ? 3 - n : n;
                Step step = row.load(t0, j);
                float m[OWN];
                load_own(map + (t0 + j) * PADDED, m);
#pragma unroll
                for (int p = 0; p < PAIR; ++p) {
                    size[p] += step.delta[p];
#pragma unroll
                    for (int i = 0; i < OWN; ++i) {
                        float& state = h[p * OWN + i];
                        float decay = exp2_fast(step.delta[p] * rates[p * OWN + i]);
                        float input = step.value[p] * m[i];
                        state = BACKWARD ? decay * (state + input) : advance(state, decay, input);
                    }
                }
            }
        }
    }
    lane.store(args.ends + place.segment * state_len, h);
    if (lane.first == 0) {
#pragma unroll
        for (int p = 0; p < PAIR; ++p) {
            int64_t at = place.segment * in.channels + place.channel0 + lane.channel + p;
            if (p < lane.channels) args.sizes[at] = size[p];
        }
    }
}

template <bool BACKWARD> DEVICE void any_segment_ends(const EndsArguments& args) {
    const Inputs& in = args.in;
    const Place place = place_of(in);
    const Element* values = BACKWARD ? args.dy : in.u;
    bool fast = place.width == CHANNELS && in.softplus && (!BACKWARD || in.z);
    fast = fast && fast_rows(values + place.channel0, BACKWARD ? args.dy_stride : in.u_stride);
    fast = fast && fast_rows(in.delta + place.channel0, in.delta_stride);
    fast = fast && (!BACKWARD || fast_rows(in.z + place.channel0, in.z_stride));
    if (fast) {
        segment_ends<BACKWARD, true>(args, place);
    } else {
        segment_ends<BACKWARD, false>(args, place);
    }
}

KERNEL(selective_scan_ends, EndsArguments, 128, FORWARD_BLOCKS) { any_segment_ends<false>(args); }
KERNEL(selective_scan_backward_ends, EndsArguments, 128, FORWARD_BLOCKS) { any_segment_ends<true>(args); }

struct CombineArguments {
    const Segment* segments;
    const int32_t* runs;  // [sequences + 1]: where the segments of a sequence start
    const float* a;
    const float* edge;   // [slots, E, STATES] or null: h0, in backward dlast
    const float* sizes;  // [segments, E]
    float* states;       // [segments, E, STATES]: ends in; out what enters each segment
    int64_t channels;
    int32_t backward;
};

// What enters the segments of one sequence, one state a thread; ceil(E STATES / 128) blocks a sequence.
KERNEL(selective_scan_combine, CombineArguments, 128, 4) {
    int64_t state_len = args.channels * STATES;
    unsigned blocks = unsigned((state_len + THREADS - 1) / THREADS), run = blockIdx.x / blocks;
    int64_t i = int64_t(blockIdx.x % blocks) * THREADS + threadIdx.x;
    int first = args.runs[run], count = args.runs[run + 1] - first;
    if (i >= state_len || count < 2) return;
    float rate = args.a[i] * LOG2_E;
    if (rate < -1e38f) rate = -1e38f;
    Segment segment = args.segments[first];
    bool starts_empty = !args.edge || (!args.backward && !(segment.flags & CONTINUED));
    float h = starts_empty ? 0.0f : args.edge[segment.slot * state_len + i];
    // Loads of several segments are under way at once: they do not depend on the states.
    constexpr int BATCH = 8;
    for (int k0 = 0; k0 < count; k0 += BATCH) {
        float ends[BATCH], decays[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
            int64_t at = first + (args.backward ? count - 1 - k0 - k : k0 + k);
            // The last one's end was not computed.
            bool there = k0 + k + 1 < count;
            ends[k] = there ? args.states[at * state_len + i] : 0.0f;
            decays[k] = exp2_fast((there ? args.sizes[at * args.channels + i / STATES] : 0.0f) * rate);
        }
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
            if (k0 + k >= count) break;
            int64_t at = first + (args.backward ? count - 1 - k0 - k : k0 + k);
            args.states[at * state_len + i] = h;
            h = advance(h, decays[k], ends[k]);
        }
    }
}
