// Kernels that test the emulation and the card alike.
#include "prelude.cuh"

struct SumArgs {
    const float* x;
    float* y;
    int64_t rows;
    int64_t width;
};

// y[row] = sum of a row, one block a row.
KERNEL(row_sum, SumArgs, 256, 1) {
    __shared__ float room[32];
    const float* x = args.x + int64_t(blockIdx.x) * args.width;
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < args.width; i += blockDim.x) sum += x[i];
    sum = block_sum(sum, room);
    if (threadIdx.x == 0) args.y[blockIdx.x] = sum;
}

struct MapArgs {
    const float* x;
    float* y;
    int64_t len;
};

// The functions of the prelude: y = [softplus, silu, exp2, bf16 rounding] of x, one after another.
KERNEL(functions, MapArgs, 128, 1) {
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < args.len; i += int64_t(gridDim.x) * blockDim.x) {
        float x = args.x[i];
        args.y[i] = softplus(x);
        args.y[i + args.len] = silu(x);
        args.y[i + 2 * args.len] = exp2_fast(x);
        args.y[i + 3 * args.len] = to_float(from_float<bf16>(x));
    }
}

// Reverses 128 numbers through dynamic shared memory, four a thread.
KERNEL(reverse, MapArgs, 32, 1) {
    DYNAMIC_SHARED(float, room);
    store_pack(room + 4 * threadIdx.x, load_pack<float, 4>(args.x + 4 * threadIdx.x));
    __syncthreads();
    for (int i = 0; i < 4; ++i) args.y[4 * threadIdx.x + i] = room[127 - 4 * int(threadIdx.x) - i];
}

#ifdef MISSING_BARRIER
// A race on purpose: thread 0 may read before its neighbours have written.
KERNEL(race, MapArgs, 64, 1) {
    __shared__ float room[64];
    room[threadIdx.x] = args.x[threadIdx.x];
    if (threadIdx.x == 0) {
        float sum = 0.0f;
        for (int i = 0; i < 64; ++i) sum += room[i];
        args.y[0] = sum;
    }
}
#endif
