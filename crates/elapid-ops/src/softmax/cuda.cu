// Softmax and its logarithm of rows, and their gradients.
//
// A block owns a row at a time and reads it three times forward and twice backward: rows are short enough for the
// second reading to come from a cache. A row's sums have an order that its width decides. Each row is shifted by its
// maximum; a NaN is no maximum, but shows in the sum, and so in the whole row.
//
// Macros: ELEMENT, the type of x and y; GRADIENT, that of dy and dx; LOGARITHM (1: log_softmax, 0: softmax).
#include "prelude.cuh"

using T = ELEMENT;
using G = GRADIENT;

constexpr int PACK = sizeof(T) == 2 && sizeof(G) == 2 ? 8 : 4;

struct ForwardArguments {
    const T* x;  // [rows, width]
    T* y;        // [rows, width]
    int64_t rows;
    int64_t width;
};

struct BackwardArguments {
    const T* y;   // [rows, width]
    const G* dy;  // [rows, width]
    G* dx;        // [rows, width]
    int64_t rows;
    int64_t width;
};

// -inf, which has no name in the language.
DEVICE float lowest() { return float_of(0xff800000u); }

// PACK elements from `at` on of a row of `width`; `beyond` behind its end.
template <class E> DEVICE void fetch(float (&to)[PACK], const E* row, int64_t at, int64_t width, float beyond) {
    if (at + PACK <= width && packable<E, PACK>(row + at, 0)) {
        Pack<E, PACK> pack = load_pack<E, PACK>(row + at);
#pragma unroll
        for (int i = 0; i < PACK; ++i) to[i] = to_float(pack.at[i]);
        return;
    }
#pragma unroll
    for (int i = 0; i < PACK; ++i) to[i] = at + i < width ? to_float(row[at + i]) : beyond;
}
template <class E> DEVICE void put(E* row, const float (&from)[PACK], int64_t at, int64_t width) {
    if (at + PACK <= width && packable<E, PACK>(row + at, 0)) {
        Pack<E, PACK> pack;
#pragma unroll
        for (int i = 0; i < PACK; ++i) pack.at[i] = from_float<E>(from[i]);
        store_pack<E, PACK>(row + at, pack);
        return;
    }
#pragma unroll
    for (int i = 0; i < PACK; ++i)
        if (at + i < width) row[at + i] = from_float<E>(from[i]);
}

// As block_sum.
DEVICE float block_max(float value, float* room) {
    auto warp_max = [](float value) {
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, step));
        return value;
    };
    value = warp_max(value);
    int warps = blockDim.x / WARP;
    if (warps == 1) return value;
    __syncthreads();
    if (lane_id() == 0) room[warp_id()] = value;
    __syncthreads();
    return warp_max(lane_id() < warps ? room[lane_id()] : lowest());
}

// Any number of blocks along x, whole warps a block, as many for every number of rows.
KERNEL(softmax_forward, ForwardArguments, 1024, 1) {
    __shared__ float room[WARP];
    int64_t width = args.width, begin = int64_t(threadIdx.x) * PACK, step = int64_t(blockDim.x) * PACK;
    for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
        const T* from = args.x + row * width;
        T* to = args.y + row * width;
        float x[PACK], largest = lowest(), sum = 0.0f;
        for (int64_t at = begin; at < width; at += step) {
            fetch(x, from, at, width, lowest());
#pragma unroll
            for (int i = 0; i < PACK; ++i) largest = fmaxf(largest, x[i]);
        }
        largest = block_max(largest, room);
        for (int64_t at = begin; at < width; at += step) {
            fetch(x, from, at, width, 0.0f);
#pragma unroll
            for (int i = 0; i < PACK; ++i)
                if (at + i < width) sum += expf(x[i] - largest);
        }
        sum = block_sum(sum, room);
        float shift = LOGARITHM ? logf(sum) : 0.0f, factor = 1.0f / sum;
        for (int64_t at = begin; at < width; at += step) {
            fetch(x, from, at, width, 0.0f);
#pragma unroll
            for (int i = 0; i < PACK; ++i) {
                x[i] -= largest;
                x[i] = LOGARITHM ? x[i] - shift : expf(x[i]) * factor;
            }
            put(to, x, at, width);
        }
    }
}

// As above. softmax: dx = y (dy - Σ y dy); its logarithm: dx = dy - e^y Σ dy.
KERNEL(softmax_backward, BackwardArguments, 1024, 1) {
    __shared__ float room[WARP];
    int64_t width = args.width, begin = int64_t(threadIdx.x) * PACK, step = int64_t(blockDim.x) * PACK;
    for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
        const T* y_row = args.y + row * width;
        const G* dy_row = args.dy + row * width;
        float y[PACK], dy[PACK], sum = 0.0f;
        for (int64_t at = begin; at < width; at += step) {
            fetch(dy, dy_row, at, width, 0.0f);
            if (!LOGARITHM) fetch(y, y_row, at, width, 0.0f);
#pragma unroll
            for (int i = 0; i < PACK; ++i) sum = LOGARITHM ? sum + dy[i] : fmaf(y[i], dy[i], sum);
        }
        sum = block_sum(sum, room);
        for (int64_t at = begin; at < width; at += step) {
            fetch(dy, dy_row, at, width, 0.0f);
            fetch(y, y_row, at, width, 0.0f);
#pragma unroll
            for (int i = 0; i < PACK; ++i) dy[i] = LOGARITHM ? fmaf(-expf(y[i]), sum, dy[i]) : y[i] * (dy[i] - sum);
            put(args.dx + row * width, dy, at, width);
        }
    }
}
