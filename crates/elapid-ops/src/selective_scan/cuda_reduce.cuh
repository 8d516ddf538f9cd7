// Sums of the selective scan's gradients over tiles of channels and over segments, in a fixed order.
#pragma once
#include "cuda_common.cuh"

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
