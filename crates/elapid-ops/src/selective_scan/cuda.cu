// Forward kernels of the selective scan, real numbers, states and arithmetic in f32 (common parts: cuda_common.cuh;
// backward: cuda_backward.cuh).
//
// Every block works on one segment. One segment a sequence: selective_scan_forward alone. Several segments:
// selective_scan_ends (each segment's end state from zero and its sum of delta, as its decay is exp(A sum delta)),
// selective_scan_combine (the true start of every segment, one after another), selective_scan_forward.
#include "cuda_common.cuh"

#ifndef FORWARD_BLOCKS
#define FORWARD_BLOCKS 5
#endif
#ifndef FORWARD_UNROLL
#define FORWARD_UNROLL 1
#endif
// One exp in eight by arithmetic (1): no gain as long as the special-function unit is not the limit.
#ifndef FORWARD_ARITHMETIC
#define FORWARD_ARITHMETIC 0
#endif

// A thread's inputs of one tile on their way from device to shared memory.
struct ScanRaw {
    Raw<WIDTH> delta, value;
    MapRaw maps;
};

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

KERNEL(selective_scan_forward, ForwardArguments, 128, FORWARD_BLOCKS) {
    DYNAMIC_SHARED(float, shared);
    const Inputs& in = args.in;
    float2* pairs = reinterpret_cast<float2*>(shared);
    float* maps = shared + 2 * STEPS * CHANNELS * 2;
    float* of_channels = maps + 4 * MAP_FLOATS<1>;
    const Place place = place_of(in);
    const Segment segment = in.segments[place.segment];
    const int64_t state_len = in.channels * STATES;
    const Stager stager(place);
    const Lane lane(place, 0);
    const int64_t channel = place.channel0 + stager.channel, row0 = segment.first + stager.step;
    const bool full = place.width == CHANNELS;
    const Column us(in.u, in.u_stride, row0, channel, full), deltas(in.delta, in.delta_stride, row0, channel, full);
    const Column zs(in.z, in.z_stride, row0, channel, full);
    const bool y_packed = movable<WIDTH>(args.y + channel, args.y_stride, full);
    const float *biases = of_channels + stager.channel, *skips = biases + CHANNELS;

    const Tiles tiles(segment.length);
    auto valid_at = [&](int tile) { return stager.step < tiles.steps(tile) ? stager.valid : 0; };
    auto load = [&](ScanRaw& raw, int tile) {
        raw.delta = deltas.load(int64_t(tile) * STEPS, valid_at(tile));
        raw.value = us.load(int64_t(tile) * STEPS, valid_at(tile));
        load_maps(raw.maps, in, place.group, segment.first + int64_t(tile) * STEPS, tiles.steps(tile), true, true);
    };
    auto stage = [&](const ScanRaw& raw, int tile) {
        float2* to = pairs + (tile & 1) * STEPS * CHANNELS;
        int valid = valid_at(tile);
        if (stager.step < STEPS) {
            Values bias, delta, value;
            bias.load(biases);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                // A select: steps after the end change nothing.
                delta.at[i] = valid == 0 ? 0.0f : step_size(raw.delta[i] + bias.at[i], in.softplus);
                value.at[i] = delta.at[i] * raw.value[i];
            }
            store_pairs(to, stager, delta, value);
        }
        stage_maps<1>(maps + (tile & 1) * 2 * MAP_FLOATS<1>, raw.maps, in, place.group,
                      segment.first + int64_t(tile) * STEPS, tiles.steps(tile), true, true);
    };
    struct Rest {
        Raw<WIDTH> u, z;
    };
    auto load_rest = [&](Rest& rest, int tile) {
        if (in.d) rest.u = us.load(int64_t(tile) * STEPS, valid_at(tile));
        if (in.z) rest.z = zs.load(int64_t(tile) * STEPS, valid_at(tile));
    };
    auto finish = [&](const Rest& rest, int tile) {
        int valid = valid_at(tile);
        if (valid == 0) return;
        const float2* from = pairs + (tile & 1) * STEPS * CHANNELS;
        Values x, y, skip;
        load_pairs(from, stager, x, y);
        skip.load(skips);
        auto output = [&](int i) {
            if (i >= WIDTH) return 0.0f;
            float sum = stager.step & 2 ? y.at[i] : x.at[i];
            if (in.d) sum += skip.at[i] * rest.u[i];
            if (in.z) sum *= silu(rest.z[i]);
            return sum;
        };
        Raw<WIDTH> out;
#pragma unroll
        for (int i = 0; i < WIDTH; i += 2) out.put(i, output(i), output(i + 1));
        store_some<WIDTH>(args.y + (row0 + int64_t(tile) * STEPS) * args.y_stride + channel, out, valid, y_packed);
    };

    float rates[OWN], rates2[OWN], h[OWN];
    lane.load_rates(in.a, rates, rates2);
    const float* start = nullptr;
    if (!(segment.flags & FIRST)) {
        start = args.starts + place.segment * state_len;
    } else if (args.h0 && (segment.flags & CONTINUED)) {
        start = args.h0 + segment.slot * state_len;
    }
    lane.load(start, h);

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
        if (args.chunks) lane.store(args.chunks + (segment.chunk + tile) * state_len, h);
        const PairRow row(pairs + (tile & 1) * STEPS * CHANNELS, lane.channel);
        float* own = &row.at(0, threadIdx.x & 3)->x + (threadIdx.x & 2) / 2;
        const float* map = maps + (tile & 1) * 2 * MAP_FLOATS<1> + lane.first;
        const int count = tiles.steps(tile);
#pragma unroll FORWARD_UNROLL
        for (int t0 = 0; t0 < count; t0 += 4) {
            float y[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float2 pair = *row.at(t0, j);
                float b[OWN], c[OWN];
                load_own(map + (t0 + j) * PADDED, b);
                load_own(map + MAP_FLOATS<1> + (t0 + j) * PADDED, c);
                y[j] = 0.0f;
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    float x = pair.x * rates2[i];
                    float decay = FORWARD_ARITHMETIC && i % 4 == 0 && (j & 1) ? exp2_arithmetic(x) : exp2_fast(x);
                    h[i] = decay * h[i] + pair.y * b[i];
                    y[j] += c[i] * h[i];
                }
            }
            float sum = scatter_four(y);
            // The warp has read these steps' pairs, and no other warp does.
            __syncwarp();
            if (threadIdx.x % LANES < 4) own[t0 * CHANNELS * 2] = sum;
        }
    }
    __syncthreads();
    if (tiles.count > 0) finish(rest, tiles.count - 1);
    if (segment.flags & LAST) lane.store(args.last + segment.slot * state_len, h);
}

// ---- Segments -------------------------------------------------------------------------------------------------

struct EndsArguments {
    Inputs in;
    const Element* dy;  // gradient of y, backward only
    int64_t dy_stride;
    float* ends;   // [segments, E, STATES]
    float* sizes;  // [segments, E]: sums of delta
};

constexpr int ENDS_FLOATS = FORWARD_FLOATS;

// Forward: the state at the segment's end, from zero. BACKWARD: the gradient of the state before the segment, from
// the segment's own outputs alone.
template <bool BACKWARD> DEVICE void segment_ends(const EndsArguments& args) {
    DYNAMIC_SHARED(float, shared);
    const Inputs& in = args.in;
    float2* pairs = reinterpret_cast<float2*>(shared);
    float* maps = shared + 2 * STEPS * CHANNELS * 2;
    float* of_channels = maps + 4 * MAP_FLOATS<1>;
    const Place place = place_of(in);
    const Segment segment = in.segments[place.segment];
    const int64_t state_len = in.channels * STATES;
    // Nothing asks for what leaves the sequence.
    if (segment.flags & (BACKWARD ? FIRST : LAST)) return;
    const Stager stager(place);
    const Lane lane(place, 0);
    const int64_t channel = place.channel0 + stager.channel, row0 = segment.first + stager.step;
    const bool full = place.width == CHANNELS;
    const Column values(BACKWARD ? args.dy : in.u, BACKWARD ? args.dy_stride : in.u_stride, row0, channel, full);
    const Column deltas(in.delta, in.delta_stride, row0, channel, full);
    const Column zs(in.z, in.z_stride, row0, channel, full);
    const float* biases = of_channels + stager.channel;
    const Tiles tiles(segment.length);
    auto valid_at = [&](int tile) { return stager.step < tiles.steps(tile) ? stager.valid : 0; };
    // The k-th tile on the way.
    auto tile_at = [&](int k) { return BACKWARD ? tiles.count - 1 - k : k; };
    ScanRaw raw;
    Raw<WIDTH> z;
    auto load = [&](int k) {
        int tile = tile_at(k);
        raw.delta = deltas.load(int64_t(tile) * STEPS, valid_at(tile));
        raw.value = values.load(int64_t(tile) * STEPS, valid_at(tile));
        if (BACKWARD && in.z) z = zs.load(int64_t(tile) * STEPS, valid_at(tile));
        load_maps(raw.maps, in, place.group, segment.first + int64_t(tile) * STEPS, tiles.steps(tile), !BACKWARD,
                  BACKWARD);
    };
    auto stage = [&](int k) {
        int tile = tile_at(k);
        float2* to = pairs + (k & 1) * STEPS * CHANNELS;
        int valid = valid_at(tile);
        if (stager.step < STEPS) {
            Values bias, delta, value;
            bias.load(biases);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                delta.at[i] = valid == 0 ? 0.0f : step_size(raw.delta[i] + bias.at[i], in.softplus);
                value.at[i] = BACKWARD ? raw.value[i] : raw.value[i] * delta.at[i];
                if (BACKWARD && in.z) value.at[i] *= silu(z[i]);
            }
            store_pairs(to, stager, delta, value);
        }
        stage_maps<1>(maps + (k & 1) * 2 * MAP_FLOATS<1>, raw.maps, in, place.group,
                      segment.first + int64_t(tile) * STEPS, tiles.steps(tile), !BACKWARD, BACKWARD);
    };
    float rates[OWN], rates2[OWN], h[OWN], size = 0.0f;
    lane.load_rates(in.a, rates, rates2);
#pragma unroll
    for (int i = 0; i < OWN; ++i) h[i] = 0.0f;
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
            for (int j = 0; j < 4; ++j) {
                int t = t0 + (BACKWARD ? 3 - j : j);
                float2 pair = *row.at(t0, BACKWARD ? 3 - j : j);
                float m[OWN];
                load_own(map + t * PADDED, m);
                size += pair.x;
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    float x = pair.x * rates2[i];
                    float decay = FORWARD_ARITHMETIC && i % 4 == 0 && (j & 1) ? exp2_arithmetic(x) : exp2_fast(x);
                    h[i] = BACKWARD ? decay * (h[i] + pair.y * m[i]) : decay * h[i] + pair.y * m[i];
                }
            }
        }
    }
    lane.store(args.ends + place.segment * state_len, h);
    if (lane.live && lane.first == 0) args.sizes[place.segment * in.channels + place.channel0 + lane.channel] = size;
}

KERNEL(selective_scan_ends, EndsArguments, 128, FORWARD_BLOCKS) { segment_ends<false>(args); }
KERNEL(selective_scan_backward_ends, EndsArguments, 128, FORWARD_BLOCKS) { segment_ends<true>(args); }

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
    for (int k = 0; k < count; ++k) {
        int64_t at = first + (args.backward ? count - 1 - k : k);
        float* state = args.states + at * state_len + i;
        // The last one's end was not computed.
        float end = k + 1 < count ? *state : 0.0f;
        float size = k + 1 < count ? args.sizes[at * args.channels + i / STATES] : 0.0f;
        *state = h;
        h = exp2_fast(size * rate) * h + end;
    }
}

#include "cuda_backward.cuh"
