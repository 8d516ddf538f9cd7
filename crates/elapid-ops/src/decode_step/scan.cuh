// What the two kernels of the recurrence, scan.cu and scan_many.cu, share: what they are given, and the norms of the
// selection's rows.
//
// Macros: STATES, N; RANK, R; NORMED (1: Δ's input, B and C are divided by their root mean square first); NARROW_STATE (1:
// the state is kept in bf16).
#pragma once
#include "prelude.cuh"
#include "decode_layout.cuh"

#if NARROW_STATE
using State = bf16;
#else
using State = float;
#endif

// Of a row of the selection, and blocks of 32 terms of Δ's product.
constexpr int WIDTH = RANK + 2 * STATES;
constexpr int DELTA_BLOCKS = (RANK + BLOCK_TERMS - 1) / BLOCK_TERMS;

struct ScanArguments {
    const float* selection;   // [columns, R + 2 N]: Δ's input, B, C
    const uint8_t* delta;     // weights of Δ [E, R], bf16
    const float* delta_bias;  // [E], or none
    const float* a;           // [E, N]
    const float* d;           // [E]
    State* state;             // [slots, E, N]
    const int32_t* slots;     // [columns], -1 for a column without a sequence
    const bf16* u;            // activations [columns, E]
    const bf16* gate;         // [columns, E]
    bf16* y;                  // activations [columns, E]
    int64_t channels;
    int64_t channel_blocks;
    int64_t columns;
    int64_t groups;           // of a block of scan.cu
    float eps;                // of the norms
};

// What a pair of channel and sequence brings to its states.
struct Pair {
    float delta, step;        // Δ, Δ u
};

// Divides `count` numbers of a row of the selection in shared memory by their root mean square, by a whole warp.
DEVICE void normalise(float* row, int first, int count, float eps) {
    float sum = 0.0f;
    for (int i = lane_id(); i < count; i += WARP) sum = fmaf(row[first + i], row[first + i], sum);
    float factor = 1.0f / sqrtf(warp_sum(sum) / float(count) + eps);
    for (int i = lane_id(); i < count; i += WARP) row[first + i] *= factor;
}
DEVICE void normalise_row(float* row, float eps) {
    normalise(row, 0, RANK, eps);
    normalise(row, RANK, STATES, eps);
    normalise(row, RANK + STATES, STATES, eps);
}
