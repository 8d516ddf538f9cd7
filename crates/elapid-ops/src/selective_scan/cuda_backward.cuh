// Backward kernels of the selective scan. A block walks its segment's tiles from the last to the first. In a tile it
// goes forward once from the saved state (outputs, gradient of C, the state before every fourth step), then back in
// groups of four steps whose decays and states it computes again in registers. Sums over channels are formed within
// warps by exchanges, over the block's warps in shared memory, and over tiles of channels by
// selective_scan_reduce_maps; sums over segments by selective_scan_reduce_segments: all in a fixed order.
#pragma once
#include "cuda_common.cuh"

#ifndef BACKWARD_BLOCKS
#define BACKWARD_BLOCKS 3
#endif
#ifndef BACKWARD_UNROLL
#define BACKWARD_UNROLL 2
#endif

struct BackwardArguments {
    Inputs in;
    const Element* dy;  // gradient of y
    int64_t dy_stride;
    const float* chunks;   // as the forward kernel saved them
    const float* dlast;    // [slots, E, STATES] or null (zeros)
    const float* carries;  // [segments, E, STATES]: what enters segments that are not LAST; null if all are
    Element* du;
    Element* ddelta;  // by delta before bias and softplus
    Element* dz;      // with z only
    int64_t du_stride, ddelta_stride, dz_stride;
    float* dh0;    // [slots, E, STATES] or null
    float* da;     // [segments, E, STATES]
    float* dd;     // [segments, E] or null
    float* dbias;  // [segments, E] or null
    float* dmaps;  // [tiles of channels, T, 2, STATES]: B, C
    int64_t tokens;
};

// With four states in four lanes a channel, the lanes of a warp's channels hold them in different orders, so that
// sums over channels need no selects.
constexpr bool ORDERED = LANES == 4 && OWN == 4;
constexpr int COPIES = ORDERED ? 4 : 1;
constexpr int WARPS = THREADS / WARP;
constexpr int VALUE_PITCH = CHANNELS + 4;
constexpr int PART_FLOATS = STEPS * 2 * PADDED;
constexpr int BACKWARD_FLOATS = STEPS * CHANNELS * 2 + 2 * STEPS * VALUE_PITCH + 2 * MAP_FLOATS<COPIES> +
                                STEPS / 4 * THREADS * OWN + WARPS * PART_FLOATS + THREADS * 2 * WIDTH +
                                CHANNEL_FLOATS;

DEVICE void prefetch(const void* at) {
#ifdef ON_CARD
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#else
    (void)at;
#endif
}

// Sums over the warp's channels of a step's values `now` and the next step's `next`, put at `part` and
// `part + PADDED`.
DEVICE void sum_channels(float* part, const Lane& lane, const float* now, const float* next) {
    if (ORDERED) {
        // Slot i of a lane and slot i ^ 2 of the lane eight on are the same state, as are i and i ^ 1 four on.
        float n0 = now[0] + __shfl_xor_sync(FULL_WARP, now[2], 8);
        float n1 = now[1] + __shfl_xor_sync(FULL_WARP, now[3], 8);
        float m0 = next[0] + __shfl_xor_sync(FULL_WARP, next[2], 8);
        float m1 = next[1] + __shfl_xor_sync(FULL_WARP, next[3], 8);
        n0 += __shfl_xor_sync(FULL_WARP, n1, 4);
        m0 += __shfl_xor_sync(FULL_WARP, m1, 4);
        bool upper = threadIdx.x & 16;
        float sum = (upper ? m0 : n0) + __shfl_xor_sync(FULL_WARP, upper ? n0 : m0, 16);
        part[(upper ? PADDED : 0) + lane.state(0)] = sum;
        return;
    }
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        float n = now[i], m = next[i];
#pragma unroll
        for (int step = LANES; step < WARP; step *= 2) {
            n += __shfl_xor_sync(FULL_WARP, n, step);
            m += __shfl_xor_sync(FULL_WARP, m, step);
        }
        if (threadIdx.x % WARP < LANES) {
            part[lane.first + i] = n;
            part[PADDED + lane.first + i] = m;
        }
    }
}

KERNEL(selective_scan_backward, BackwardArguments, 128, BACKWARD_BLOCKS) {
    DYNAMIC_SHARED(float, shared);
    const Inputs& in = args.in;
    float2* pairs = reinterpret_cast<float2*>(shared);
    float* dys = shared + STEPS * CHANNELS * 2;
    float* ys = dys + STEPS * VALUE_PITCH;
    float* maps = ys + STEPS * VALUE_PITCH;
    float* saved = maps + 2 * MAP_FLOATS<COPIES>;
    float* parts = saved + STEPS / 4 * THREADS * OWN;
    float* of_channels = parts + WARPS * PART_FLOATS;
    float* sums = of_channels + CHANNEL_FLOATS + threadIdx.x;

    const Place place = place_of(in);
    const Segment segment = in.segments[place.segment];
    const int64_t state_len = in.channels * STATES;
    const Stager stager(place);
    const Lane lane(place, ORDERED ? threadIdx.x / LANES % 4 : 0);
    const int64_t channel = place.channel0 + stager.channel, row0 = segment.first + stager.step;
    const bool full = place.width == CHANNELS;
    const Column us(in.u, in.u_stride, row0, channel, full), deltas(in.delta, in.delta_stride, row0, channel, full);
    const Column zs(in.z, in.z_stride, row0, channel, full), douts(args.dy, args.dy_stride, row0, channel, full);
    const bool du_packed = movable<WIDTH>(args.du + channel, args.du_stride, full);
    const bool ddelta_packed = movable<WIDTH>(args.ddelta + channel, args.ddelta_stride, full);
    const bool dz_packed = movable<WIDTH>(args.dz + channel, args.dz_stride, full);
    const float *biases = of_channels + stager.channel, *skips = biases + CHANNELS;

    const Tiles tiles(segment.length);
    auto valid_at = [&](int tile) { return stager.step < tiles.steps(tile) ? stager.valid : 0; };
    struct TileRaw {
        Raw<WIDTH> delta, u, dout, z;
    };
    auto load = [&](TileRaw& raw, int tile) {
        int valid = valid_at(tile);
        raw.delta = deltas.load(int64_t(tile) * STEPS, valid);
        raw.u = us.load(int64_t(tile) * STEPS, valid);
        raw.dout = douts.load(int64_t(tile) * STEPS, valid);
        if (in.z) raw.z = zs.load(int64_t(tile) * STEPS, valid);
    };
    auto stage = [&](const TileRaw& raw, const MapRaw& raw_maps, int tile) {
        if (stager.step < STEPS) {
            bool there = valid_at(tile) > 0;
            Values bias, delta, value, dy;
            bias.load(biases);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                delta.at[i] = there ? step_size(raw.delta[i] + bias.at[i], in.softplus) : 0.0f;
                value.at[i] = delta.at[i] * raw.u[i];
                dy.at[i] = in.z ? raw.dout[i] * silu(raw.z[i]) : raw.dout[i];
            }
            store_pairs(pairs, stager, delta, value);
            dy.store(dys + stager.step * VALUE_PITCH + stager.channel);
        }
        stage_maps<COPIES>(maps, raw_maps, in, place.group, segment.first + int64_t(tile) * STEPS, tiles.steps(tile),
                           true, true);
    };
    auto ahead = [&](int tile) {
        int64_t row = int64_t(tile) * STEPS;
        if (valid_at(tile) > 0) {
            prefetch(deltas.at + row * deltas.stride);
            prefetch(us.at + row * us.stride);
            prefetch(douts.at + row * douts.stride);
            if (in.z) prefetch(zs.at + row * zs.stride);
        }
        if (lane.live) prefetch(args.chunks + (segment.chunk + tile) * state_len + lane.offset + lane.state(0));
    };
    // From the sums of a tile to its gradients by token.
    auto finish = [&](const TileRaw& raw, int tile) {
        int valid = valid_at(tile);
        if (valid > 0) {
            Raw<WIDTH> du, ddelta, dz;
            float by_u[2], by_delta[2], by_z[2];
            const int at = stager.step * VALUE_PITCH + stager.channel;
            Values bias, skip, sum_bg, sum_ag, dys_own, ys_own;
            bias.load(biases);
            skip.load(skips);
            load_pairs(pairs, stager, sum_bg, sum_ag);
            dys_own.load(dys + at);
            if (in.z) ys_own.load(ys + at);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                int k = i & 1;
                float u = raw.u[i], dy = dys_own.at[i], slope;
                float delta = step_size(raw.delta[i] + bias.at[i], in.softplus, &slope);
                by_u[k] = delta * sum_bg.at[i];
                if (in.d) by_u[k] += skip.at[i] * dy;
                by_delta[k] = (u * sum_bg.at[i] + sum_ag.at[i]) * slope;
                if (in.z) {
                    float z = raw.z[i], y = ys_own.at[i];
                    if (in.d) y += skip.at[i] * u;
                    by_z[k] = raw.dout[i] * y * silu_slope(z, sigmoid(z));
                }
                if (args.dd) sums[i * THREADS] += dy * u;
                if (args.dbias) sums[(WIDTH + i) * THREADS] += by_delta[k];
                if (k == 1 || WIDTH == 1) {
                    constexpr int ODD = WIDTH == 1 ? 0 : 1;
                    du.put(i - ODD, by_u[0], by_u[ODD]);
                    ddelta.put(i - ODD, by_delta[0], by_delta[ODD]);
                    if (in.z) dz.put(i - ODD, by_z[0], by_z[ODD]);
                }
            }
            int64_t row = row0 + int64_t(tile) * STEPS;
            store_some<WIDTH>(args.du + row * args.du_stride + channel, du, valid, du_packed);
            store_some<WIDTH>(args.ddelta + row * args.ddelta_stride + channel, ddelta, valid, ddelta_packed);
            if (in.z) store_some<WIDTH>(args.dz + row * args.dz_stride + channel, dz, valid, dz_packed);
        }
        float* to = args.dmaps + (place.tile * args.tokens + segment.first + int64_t(tile) * STEPS) * (2 * STATES);
        int count = tiles.steps(tile);
        if (STATES == PADDED && STATES % 4 == 0 && reinterpret_cast<uint64_t>(to) % 16 == 0) {
            for (int i = threadIdx.x * 4; i < PART_FLOATS; i += THREADS * 4) {
                int which = i / (STEPS * PADDED), step = i / PADDED % STEPS, state = i % PADDED;
                Pack<float, 4> sum = load_pack<float, 4>(parts + i);
#pragma unroll
                for (int warp = 1; warp < WARPS; ++warp) {
                    Pack<float, 4> more = load_pack<float, 4>(parts + warp * PART_FLOATS + i);
#pragma unroll
                    for (int k = 0; k < 4; ++k) sum.at[k] += more.at[k];
                }
                if (step < count) store_pack(to + (step * 2 + which) * STATES + state, sum);
            }
            return;
        }
        for (int i = threadIdx.x; i < PART_FLOATS; i += THREADS) {
            int which = i / (STEPS * PADDED), step = i / PADDED % STEPS, state = i % PADDED;
            float sum = parts[i];
#pragma unroll
            for (int warp = 1; warp < WARPS; ++warp) sum += parts[warp * PART_FLOATS + i];
            if (step < count && state < STATES) to[(step * 2 + which) * STATES + state] = sum;
        }
    };

    float rates[OWN], rates2[OWN], carry[OWN], by_rate[OWN];
    lane.load_rates(in.a, rates, rates2);
    const float* entry = args.dlast ? args.dlast + segment.slot * state_len : nullptr;
    if (!(segment.flags & LAST)) entry = args.carries + place.segment * state_len;
    lane.load(entry, carry);
#pragma unroll
    for (int i = 0; i < OWN; ++i) by_rate[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * WIDTH; ++i) sums[i * THREADS] = 0.0f;

    float* own_saved = saved + threadIdx.x * OWN;
    float* own_part = parts + warp_id() * PART_FLOATS;
    const float* map = maps + lane.order * COPY_PITCH<COPIES> + lane.first;
    const PairRow row(pairs, lane.channel);
    float2* own_sum = row.at(0, threadIdx.x & 3);
    const float* own_dys = dys + lane.channel;
    TileRaw raw, done;
    MapRaw raw_maps;
    float h[OWN], next[OWN];
    auto load_tile = [&](int tile) {
        load(raw, tile);
        load_maps(raw_maps, in, place.group, segment.first + int64_t(tile) * STEPS, tiles.steps(tile), true, true);
        lane.load(args.chunks + (segment.chunk + tile) * state_len, next);
    };
    load_channels(of_channels, in, place);
    __syncthreads();
    if (tiles.count > 0) load_tile(tiles.count - 1);
    for (int tile = tiles.count - 1; tile >= 0; --tile) {
        // A thread's sums of the last tile lie where it stages this one.
        if (tile + 1 < tiles.count) finish(done, tile + 1);
        stage(raw, raw_maps, tile);
#pragma unroll
        for (int i = 0; i < OWN; ++i) h[i] = next[i];
        __syncthreads();
        if (tile > 0) ahead(tile - 1);
        const int groups = (tiles.steps(tile) + 3) / 4;
#pragma unroll BACKWARD_UNROLL
        for (int g = 0; g < groups; ++g) {
            float y[4], by_c[4][OWN];
#pragma unroll
            for (int i = 0; i < OWN; ++i) own_saved[g * THREADS * OWN + i] = h[i];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int t = g * 4 + j;
                float2 pair = *row.at(g * 4, j);
                float dy = own_dys[t * VALUE_PITCH], b[OWN], c[OWN];
                load_own(map + t * PADDED, b);
                load_own(map + MAP_FLOATS<COPIES> + t * PADDED, c);
                y[j] = 0.0f;
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    float decay = exp2_fast(pair.x * rates2[i]);
                    h[i] = decay * h[i] + pair.y * b[i];
                    y[j] += c[i] * h[i];
                    by_c[j][i] = dy * h[i];
                }
                if (j & 1) sum_channels(own_part + (STEPS + t - 1) * PADDED, lane, by_c[j - 1], by_c[j]);
            }
            if (in.z) {
                float sum = scatter_four(y);
                int t = g * 4 + (threadIdx.x & 3);
                if (threadIdx.x % LANES < 4) ys[t * VALUE_PITCH + lane.channel] = sum;
            }
        }
#pragma unroll 1
        for (int g = groups - 1; g >= 0; --g) {
            float2 pair[4];
            float decay[4][OWN], before[4][OWN], by_b[4][OWN], sum_bg[4], sum_ag[4];
            load_own(own_saved + g * THREADS * OWN, h);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int t = g * 4 + j;
                float b[OWN];
                pair[j] = *row.at(g * 4, j);
                load_own(map + t * PADDED, b);
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    decay[j][i] = exp2_fast(pair[j].x * rates2[i]);
                    before[j][i] = decay[j][i] * h[i];
                    h[i] = before[j][i] + pair[j].y * b[i];
                }
            }
#pragma unroll
            for (int j = 3; j >= 0; --j) {
                int t = g * 4 + j;
                float dy = own_dys[t * VALUE_PITCH], b[OWN], c[OWN];
                load_own(map + t * PADDED, b);
                load_own(map + MAP_FLOATS<COPIES> + t * PADDED, c);
                sum_bg[j] = sum_ag[j] = 0.0f;
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    float grad = c[i] * dy + carry[i];
                    float product = before[j][i] * grad;
                    sum_bg[j] += b[i] * grad;
                    sum_ag[j] += rates[i] * product;
                    by_rate[i] += pair[j].x * product;
                    by_b[j][i] = pair[j].y * grad;
                    carry[i] = decay[j][i] * grad;
                }
                if (!(j & 1)) sum_channels(own_part + t * PADDED, lane, by_b[j], by_b[j + 1]);
            }
            float bg = scatter_four(sum_bg), ag = scatter_four(sum_ag);
            // The warp has read these steps' pairs, and no other warp does.
            __syncwarp();
            if (threadIdx.x % LANES < 4) own_sum[g * 4 * CHANNELS] = make_float2(bg, ag);
        }
        // Under way while the block gathers.
        load(done, tile);
        if (tile > 0) load_tile(tile - 1);
        __syncthreads();
    }
    if (tiles.count > 0) finish(done, 0);

    lane.store(args.da + place.segment * state_len, by_rate);
    if ((segment.flags & FIRST) && args.dh0) {
        if (!(segment.flags & CONTINUED)) {
#pragma unroll
            for (int i = 0; i < OWN; ++i) carry[i] = 0.0f;
        }
        lane.store(args.dh0 + segment.slot * state_len, carry);
    }
    __syncthreads();
    // The first threads sum their channel over the steps of the tile.
    int own = threadIdx.x;
    if (own < place.width) {
        float by_d = 0.0f, by_bias = 0.0f;
        for (int step = 0; step < STEPS; ++step) {
            const float* from = sums - threadIdx.x + own % WIDTH * THREADS + step * COLUMNS + own / WIDTH;
            by_d += from[0];
            by_bias += from[WIDTH * THREADS];
        }
        int64_t at = place.segment * in.channels + place.channel0 + own;
        if (args.dd) args.dd[at] = by_d;
        if (args.dbias) args.dbias[at] = by_bias;
    }
}

// ---- Ordered sums ---------------------------------------------------------------------------------------------

struct ReduceMapsArguments {
    const float* dmaps;  // [G * tiles, T, 2, STATES]
    Element* db;         // [T, G, STATES]
    Element* dc;
    int64_t db_stride, dc_stride;
    int64_t tokens;
    int32_t groups;
    int32_t tiles;  // of a group
};

// One gradient a thread, the tiles of its group in order.
KERNEL(selective_scan_reduce_maps, ReduceMapsArguments, 256, 4) {
    const int64_t row = 2 * STATES, plane = args.tokens * row;
    int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (i >= plane * args.groups) return;
    int64_t group = i / plane, within = i - group * plane, token = within / row;
    int column = int(within - token * row);
    const float* from = args.dmaps + group * args.tiles * plane + within;
    float sum = 0.0f;
#pragma unroll 8
    for (int tile = 0; tile < args.tiles; ++tile) sum += from[tile * plane];
    bool is_c = column >= STATES;
    Element* to = is_c ? args.dc + token * args.dc_stride : args.db + token * args.db_stride;
    to[group * STATES + column - (is_c ? STATES : 0)] = from_float<Element>(sum);
}

struct ReduceSegmentsArguments {
    const float* parts;  // [segments, length]
    float* sum;          // [length]
    int64_t length;
    int64_t segments;
};

KERNEL(selective_scan_reduce_segments, ReduceSegmentsArguments, 256, 4) {
    int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (i >= args.length) return;
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t k = 0; k < args.segments; ++k) sum += args.parts[k * args.length + i];
    args.sum[i] = sum;
}
