// Backward kernels of the selective scan. A block walks its segment's tiles from the last to the first. In a tile it
// goes forward once from the saved state, only for the state before every fourth step, then back in groups of four
// steps whose decays and states it computes again in registers. Sums over channels are formed within warps by
// exchanges, over the block's warps in shared memory, and over tiles of channels by selective_scan_reduce_maps; sums
// over segments by selective_scan_reduce_segments: all in a fixed order.
#pragma once
#include "cuda_sums.cuh"

#ifndef BACKWARD_BLOCKS
#define BACKWARD_BLOCKS 3
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
    Element* y;       // the forward kernel's result once more, rows as du's; with z only, or null
    int64_t du_stride, ddelta_stride, dz_stride;
    float* dh0;    // [slots, E, STATES] or null
    float* da;     // [segments, E, STATES]
    float* dd;     // [segments, E] or null
    float* dbias;  // [segments, E] or null
    float* dmaps;  // [tiles of channels, T, 2, STATES]: B, C
    int64_t tokens;
};

// Brings a line into the second-level cache.
DEVICE void prefetch(const void* at) {
#ifdef ON_CARD
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#else
    (void)at;
#endif
}

constexpr int BACKWARD_FLOATS = STEPS * CHANNELS * 2 + STEPS * VALUE_PITCH + 2 * MAP_FLOATS<COPIES> +
                                GROUPS * WARPS * GROUP_FLOATS + THREADS * 2 * WIDTH + CHANNEL_FLOATS;

constexpr float LN_2 = 0.69314718055994531f;

// FAST: as for forward.
template <bool FAST> DEVICE void scan_backward(const BackwardArguments& args, const Place& place) {
    DYNAMIC_SHARED(float, shared);
    const Inputs& in = args.in;
    float2* pairs = reinterpret_cast<float2*>(shared);
    float* dys = shared + STEPS * CHANNELS * 2;
    float* maps = dys + STEPS * VALUE_PITCH;
    float* saved = maps + 2 * MAP_FLOATS<COPIES>;
    float* sums = saved + GROUPS * WARPS * GROUP_FLOATS;
    float* of_channels = sums + THREADS * 2 * WIDTH;

    const Segment segment = in.segments[place.segment];
    const int64_t state_len = in.channels * STATES;
    const Stager stager(place);
    const Lane lane(place, ORDERED ? threadIdx.x / LANES % 4 : 0);
    const int64_t channel = place.channel0 + stager.channel, row0 = segment.first + stager.first;
    const bool full = FAST || place.width == CHANNELS, gated = FAST || in.z, softened = FAST || in.softplus;
    const Tiles tiles(segment.length);
    const int64_t last = int64_t(most(tiles.count - 1, 0)) * STEPS;
    Column<const Element, FAST> us(in.u, in.u_stride, row0 + last, channel, full);
    Column<const Element, FAST> deltas(in.delta, in.delta_stride, row0 + last, channel, full);
    Column<const Element, FAST> zs(in.z, in.z_stride, row0 + last, channel, full);
    Column<const Element, FAST> douts(args.dy, args.dy_stride, row0 + last, channel, full);
    Column<Element, FAST> dus(args.du, args.du_stride, row0 + last, channel, full);
    Column<Element, FAST> ddeltas(args.ddelta, args.ddelta_stride, row0 + last, channel, full);
    Column<Element, FAST> dzs(args.dz, args.dz_stride, row0 + last, channel, full);
    MapColumn columns(in, place.group, segment.first + last, true, true);
    const float *biases = of_channels + stager.channel, *skips = biases + CHANNELS;

    // One pass over a tile.
    struct PassRaw {
        Raw<WIDTH> delta, u, dout, z;
    };
    // Of the tile that the columns are at.
    auto load = [&](PassRaw& raw, int tile, int pass) {
        int valid = stager.at(pass, tiles.steps(tile));
        raw.delta = deltas.load(pass, valid);
        raw.u = us.load(pass, valid);
        raw.dout = douts.load(pass, valid);
        if (gated) raw.z = zs.load(pass, valid);
    };
    auto stage = [&](const PassRaw& raw, int tile, int pass) {
        if (!stager.has(pass)) return;
        bool there = stager.at(pass, tiles.steps(tile)) > 0;
        Values bias, delta, value, dy;
        bias.load(biases);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            delta.at[i] = there ? step_size(raw.delta[i] + bias.at[i], softened) : 0.0f;
            value.at[i] = delta.at[i] * raw.u[i];
            dy.at[i] = gated ? raw.dout[i] * silu(raw.z[i]) : raw.dout[i];
        }
        store_pairs(pairs, stager.step(pass), stager.channel, delta, value);
        dy.store(dys + stager.step(pass) * VALUE_PITCH + stager.channel);
    };
    auto ahead = [&](int tile) {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            if (stager.at(pass, tiles.steps(tile)) > 0) {
                prefetch(deltas.row(pass * ROWS - STEPS));
                prefetch(us.row(pass * ROWS - STEPS));
                prefetch(douts.row(pass * ROWS - STEPS));
                if (gated) prefetch(zs.row(pass * ROWS - STEPS));
            }
        }
        if (lane.channels > 0) prefetch(args.chunks + (segment.chunk + tile) * state_len + lane.offset + lane.state(0));
    };
    // From the sums of a tile to its gradients by token.
    auto finish = [&](const PassRaw& raw, int tile, int pass) {
        int valid = stager.at(pass, tiles.steps(tile));
        if (valid == 0) return;
        Raw<WIDTH> du, ddelta, dz, out;
        float by_u[2], by_delta[2], by_z[2], outs[2];
        Values bias, skip, sum_bg, sum_ag, ys_own, by_d, by_bias;
        bias.load(biases);
        skip.load(skips);
        load_pairs(pairs, stager.step(pass), stager.channel, sum_bg, sum_ag);
        if (gated) ys_own.load(dys + stager.step(pass) * VALUE_PITCH + stager.channel);
        load_sums(by_d, sums);
        load_sums(by_bias, sums + THREADS * WIDTH);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            int k = i & 1;
            float u = raw.u[i], dy = raw.dout[i], slope;
            float delta = step_size(raw.delta[i] + bias.at[i], softened, &slope);
            if (gated) {
                float z = raw.z[i], s = sigmoid(z), y = ys_own.at[i];
                if (FAST || in.d) y += skip.at[i] * u;
                by_z[k] = dy * y * silu_slope(z, s);
                outs[k] = y * (z * s);
                dy *= z * s;
            }
            by_u[k] = delta * sum_bg.at[i];
            if (FAST || in.d) by_u[k] += skip.at[i] * dy;
            by_delta[k] = (u * sum_bg.at[i] + LN_2 * sum_ag.at[i]) * slope;
            by_d.at[i] += dy * u;
            by_bias.at[i] += by_delta[k];
            if (k == 1 || WIDTH == 1) {
                constexpr int ODD = WIDTH == 1 ? 0 : 1;
                du.put(i - ODD, by_u[0], by_u[ODD]);
                ddelta.put(i - ODD, by_delta[0], by_delta[ODD]);
                if (gated) {
                    dz.put(i - ODD, by_z[0], by_z[ODD]);
                    out.put(i - ODD, outs[0], outs[ODD]);
                }
            }
        }
        store_sums(sums, by_d);
        store_sums(sums + THREADS * WIDTH, by_bias);
        dus.store(pass, du, valid);
        ddeltas.store(pass, ddelta, valid);
        if (gated) {
            dzs.store(pass, dz, valid);
            if (args.y) dus.store_beside(args.y - args.du, pass, out, valid);
        }
    };
    auto gather = [&](int tile) {
        float* to = args.dmaps + (place.tile * args.tokens + segment.first + int64_t(tile) * STEPS) * (2 * STATES);
        int count = tiles.steps(tile);
        constexpr int MANY = PADDED % 4 == 0 ? 4 : 1;
        bool packed = STATES == PADDED && STATES % 4 == 0 && reinterpret_cast<uint64_t>(to) % 16 == 0;
        for (int i = threadIdx.x * MANY; i < STEPS * 2 * PADDED; i += THREADS * MANY) {
            int step = i / (2 * PADDED), which = i / PADDED % 2, state = i % PADDED;
            const float* from = saved + step / 4 * WARPS * GROUP_FLOATS + which * PART_FLOATS;
            from += step % 4 * PADDED + state;
            Pack<float, MANY> sum = load_pack<float, MANY>(from);
#pragma unroll
            for (int warp = 1; warp < WARPS; ++warp) {
                Pack<float, MANY> more = load_pack<float, MANY>(from + warp * GROUP_FLOATS);
#pragma unroll
                for (int k = 0; k < MANY; ++k) sum.at[k] += more.at[k];
            }
            if (step >= count) continue;
            float* there = to + (step * 2 + which) * STATES + state;
            if (packed) {
                store_pack(there, sum);
                continue;
            }
#pragma unroll
            for (int k = 0; k < MANY; ++k) {
                if (state + k < STATES) there[k] = sum.at[k];
            }
        }
    };

    float rates[HELD], carry[HELD], by_rate[HELD];
    lane.load_rates(in.a, rates);
    const float* entry = args.dlast ? args.dlast + segment.slot * state_len : nullptr;
    if (!(segment.flags & LAST)) entry = args.carries + place.segment * state_len;
    lane.load(entry, carry);
#pragma unroll
    for (int k = 0; k < HELD; ++k) by_rate[k] = 0.0f;
    {
        Values none;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) none.at[i] = 0.0f;
        store_sums(sums, none);
        store_sums(sums + THREADS * WIDTH, none);
    }

    float* own_groups = saved + warp_id() * GROUP_FLOATS;
    const float* map = maps + lane.order % COPIES * COPY_PITCH<COPIES> + lane.first;
    const int turn = lane.order & 2;
    // The lane's values of B at an offset, or of C. Two copies have the orders within pairs of states only.
    auto load_map = [&](int at, float* values) {
        if (ORDERED && COPIES == 2) {
            Pack<float, 2> low = load_pack<float, 2>(map + turn + at);
            Pack<float, 2> high = load_pack<float, 2>(map + (2 - turn) + at);
            values[0] = low.at[0];
            values[1 % OWN] = low.at[1];
            values[2 % OWN] = high.at[0];
            values[3 % OWN] = high.at[1];
        } else {
            load_own(map + at, values);
        }
    };
    const PairRow row(pairs, lane.channel);
    float* own_sum = reinterpret_cast<float*>(pairs + pair_index(threadIdx.x & 3, lane.channel));
    float* own_dys = dys + lane.channel;
    // Passes are loaded one ahead of their use, first the tile's that is done, then the next one's.
    PassRaw raw[2];
    MapRaw raw_maps;
    float h[HELD];
    load_channels(of_channels, in, place);
    __syncthreads();
    for (int tile = tiles.count - 1; tile >= 0; --tile) {
        if (tile + 1 == tiles.count) load(raw[PASSES % 2], tile, 0);
        columns.load(raw_maps, tiles.steps(tile));
        lane.load(args.chunks + (segment.chunk + tile) * state_len, h);
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            if (pass + 1 < PASSES) load(raw[(PASSES + pass + 1) % 2], tile, pass + 1);
            stage(raw[(PASSES + pass) % 2], tile, pass);
        }
        stage_maps<COPIES>(maps, raw_maps, in, place.group, segment.first + int64_t(tile) * STEPS, tiles.steps(tile),
                           true, true);
        __syncthreads();
        if (tile > 0) ahead(tile - 1);
        const int groups = (tiles.steps(tile) + 3) / 4;
        store_held(own_groups, h);
#pragma unroll 1
        for (int g = 0; g + 1 < groups; ++g) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                Step step = row.load(g * 4, j);
                float b[OWN];
                load_map((g * 4 + j) * PADDED, b);
#pragma unroll
                for (int k = 0; k < HELD; ++k) {
                    float decay = exp2_fast(step.delta[k / OWN] * rates[k]);
                    h[k] = decay * h[k] + step.value[k / OWN] * b[k % OWN];
                }
            }
            store_held(own_groups + (g + 1) * WARPS * GROUP_FLOATS, h);
        }
#pragma unroll 1
        for (int g = groups - 1; g >= 0; --g) {
            Step step[4];
            float decay[4][HELD], states[5][HELD], by_b[4][OWN], by_c[4][OWN];
            float y[PAIR][4], sum_bg[PAIR][4], sum_ag[PAIR][4];
            float* part = own_groups + g * WARPS * GROUP_FLOATS;
            load_held(part, states[0]);
            // The sums go where the states of all lanes were.
            __syncwarp();
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float b[OWN];
                step[j] = row.load(g * 4, j);
                load_map((g * 4 + j) * PADDED, b);
#pragma unroll
                for (int k = 0; k < HELD; ++k) {
                    decay[j][k] = exp2_fast(step[j].delta[k / OWN] * rates[k]);
                    states[j + 1][k] = decay[j][k] * states[j][k] + step[j].value[k / OWN] * b[k % OWN];
                }
            }
#pragma unroll
            for (int j = 3; j >= 0; --j) {
                int t = g * 4 + j;
                float b[OWN], c[OWN];
                load_map(t * PADDED, b);
                load_map(MAP_FLOATS<COPIES> + t * PADDED, c);
                Pack<float, PAIR> dy = load_pack<float, PAIR>(own_dys + t * VALUE_PITCH);
#pragma unroll
                for (int p = 0; p < PAIR; ++p) {
                    float delta = step[j].delta[p], value = step[j].value[p];
                    y[p][j] = sum_bg[p][j] = sum_ag[p][j] = 0.0f;
#pragma unroll
                    for (int i = 0; i < OWN; ++i) {
                        int k = p * OWN + i;
                        float now = states[j + 1][k], grad = c[i] * dy.at[p] + carry[k];
                        // By the state before the step; times that state it is the gradient by Delta A.
                        carry[k] = decay[j][k] * grad;
                        float product = states[j][k] * carry[k];
                        y[p][j] += c[i] * now;
                        sum_bg[p][j] += b[i] * grad;
                        sum_ag[p][j] += rates[k] * product;
                        by_rate[k] += delta * product;
                        by_b[j][i] = p == 0 ? value * grad : by_b[j][i] + value * grad;
                        by_c[j][i] = p == 0 ? dy.at[p] * now : by_c[j][i] + dy.at[p] * now;
                    }
                }
                if (!(j & 1)) {
                    sum_channels(part + j * PADDED, lane, by_b[j], by_b[j + 1]);
                    sum_channels(part + PART_FLOATS + j * PADDED, lane, by_c[j], by_c[j + 1]);
                }
            }
            Pack<float, 2 * PAIR> both;
            Pack<float, PAIR> outputs;
#pragma unroll
            for (int p = 0; p < PAIR; ++p) {
                both.at[2 * p] = scatter_four(sum_bg[p]);
                both.at[2 * p + 1] = scatter_four(sum_ag[p]);
                if (gated) outputs.at[p] = scatter_four(y[p]);
            }
            // The warp has read these steps' pairs and gradients, and no other warp does.
            __syncwarp();
            if (threadIdx.x % LANES < 4) {
                store_pack(own_sum + g * 4 * CHANNELS * 2, both);
                if (gated) store_pack(own_dys + (g * 4 + (threadIdx.x & 3)) * VALUE_PITCH, outputs);
            }
        }
        load(raw[0], tile, 0);
        __syncthreads();
        // A thread's sums of this tile lie where it stages the next.
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            if (pass + 1 < PASSES) {
                load(raw[(pass + 1) % 2], tile, pass + 1);
            } else if (tile > 0) {
                us.back();
                deltas.back();
                douts.back();
                zs.back();
                columns.back();
                load(raw[PASSES % 2], tile - 1, 0);
            }
            finish(raw[pass % 2], tile, pass);
        }
        dus.back();
        ddeltas.back();
        dzs.back();
        gather(tile);
    }

    lane.store(args.da + place.segment * state_len, by_rate);
    if ((segment.flags & FIRST) && args.dh0) {
        if (!(segment.flags & CONTINUED)) {
#pragma unroll
            for (int k = 0; k < HELD; ++k) carry[k] = 0.0f;
        }
        lane.store(args.dh0 + segment.slot * state_len, carry);
    }
    __syncthreads();
    // The first threads sum their channel over the steps of the tile.
    int own = threadIdx.x;
    if (own < place.width) {
        float by_d = 0.0f, by_bias = 0.0f;
        for (int step = 0; step < ROWS; ++step) {
            int at = sums_index(step * COLUMNS + own / WIDTH, own % WIDTH);
            by_d += sums[at];
            by_bias += sums[at + THREADS * WIDTH];
        }
        int64_t at = place.segment * in.channels + place.channel0 + own;
        if (args.dd) args.dd[at] = by_d;
        if (args.dbias) args.dbias[at] = by_bias;
    }
}

KERNEL(selective_scan_backward, BackwardArguments, 128, BACKWARD_BLOCKS) {
    const Inputs& in = args.in;
    const Place place = place_of(in);
    bool fast = place.width == CHANNELS && in.d && in.z && in.softplus;
    fast = fast && fast_rows(in.u + place.channel0, in.u_stride);
    fast = fast && fast_rows(in.delta + place.channel0, in.delta_stride);
    fast = fast && fast_rows(in.z + place.channel0, in.z_stride);
    fast = fast && fast_rows(args.dy + place.channel0, args.dy_stride);
    fast = fast && fast_rows(args.du + place.channel0, args.du_stride);
    fast = fast && fast_rows(args.ddelta + place.channel0, args.ddelta_stride);
    fast = fast && fast_rows(args.dz + place.channel0, args.dz_stride);
    if (fast) {
        scan_backward<true>(args, place);
    } else {
        scan_backward<false>(args, place);
    }
}
