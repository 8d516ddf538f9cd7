// How backward sums over channels and steps in shared memory, and what a lane keeps there.
#pragma once
#include "cuda_stage.cuh"

// With four states in four lanes a channel, the lanes of a warp's channels hold them in different orders, so that
// sums over channels need no selects.
constexpr bool ORDERED = LANES == 4 && OWN == 4;
// Copies of B and C in shared memory: one for each order, or with two channels a lane, where shared memory limits how
// many blocks there are, for every other.
constexpr int COPIES = !ORDERED ? 1 : PAIR == 2 ? 2 : 4;
constexpr int WARPS = THREADS / WARP;
constexpr int VALUE_PITCH = CHANNELS + 8;
constexpr int GROUPS = STEPS / 4;
// A warp's room for a group of four steps: the states before it, and later in their place its sums over channels for
// B (four steps), then C.
constexpr int PART_FLOATS = 4 * PADDED;
constexpr int GROUP_FLOATS = WARP * HELD > 2 * PART_FLOATS ? WARP * HELD : 2 * PART_FLOATS;

// A lane's states in its warp's room, without bank conflicts.
DEVICE void store_held(float* to, const float* values) {
#pragma unroll
    for (int p = 0; p < PAIR; ++p) {
        float* own = to + p * WARP * OWN + lane_id() * OWN;
        if (OWN == 4) {
            store_pack(own, Pack<float, 4>{{values[p * OWN], values[p * OWN + 1 % OWN], values[p * OWN + 2 % OWN],
                                            values[p * OWN + 3 % OWN]}});
        } else {
#pragma unroll
            for (int i = 0; i < OWN; ++i) own[i] = values[p * OWN + i];
        }
    }
}
DEVICE void load_held(const float* from, float* values) {
#pragma unroll
    for (int p = 0; p < PAIR; ++p) load_own(from + p * WARP * OWN + lane_id() * OWN, values + p * OWN);
}

// Where the i-th of a staging thread's WIDTH sums over its steps lies.
DEVICE int sums_index(int thread, int i) {
    if (WIDTH % 4 == 0) return (i / 4 * THREADS + thread) * 4 + i % 4;
    return i * THREADS + thread;
}
DEVICE void load_sums(Values& values, const float* sums) {
    if (WIDTH % 4 == 0) {
#pragma unroll
        for (int i = 0; i + 3 < WIDTH; i += 4) {
            Pack<float, 4> four = load_pack<float, 4>(sums + sums_index(threadIdx.x, i));
#pragma unroll
            for (int k = 0; k < 4; ++k) values.at[i + k] = four.at[k];
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) values.at[i] = sums[sums_index(threadIdx.x, i)];
}
DEVICE void store_sums(float* sums, const Values& values) {
    if (WIDTH % 4 == 0) {
#pragma unroll
        for (int i = 0; i + 3 < WIDTH; i += 4) {
            store_pack(sums + sums_index(threadIdx.x, i),
                       Pack<float, 4>{{values.at[i], values.at[i + 1], values.at[i + 2], values.at[i + 3]}});
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) sums[sums_index(threadIdx.x, i)] = values.at[i];
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
