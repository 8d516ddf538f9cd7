// What the special-function units of a card can do at most.
#include "prelude.cuh"

constexpr int CHAINS = 8;

struct ChainsArguments {
    float* out;
    int64_t rounds;
};

// x <- 2^-x in CHAINS independent chains a thread, `rounds` times. The chains tend to 0.64, so nothing overflows.
KERNEL(exp2_chains, ChainsArguments, 256, 4) {
    float x[CHAINS];
    for (int k = 0; k < CHAINS; ++k) x[k] = 0.001f * float(threadIdx.x) + 0.1f * float(k);
    for (int64_t round = 0; round < args.rounds; ++round) {
#pragma unroll
        for (int k = 0; k < CHAINS; ++k) x[k] = exp2_fast(-x[k]);
    }
    float sum = 0.0f;
    for (int k = 0; k < CHAINS; ++k) sum += x[k];
    args.out[int64_t(blockIdx.x) * blockDim.x + threadIdx.x] = sum;
}
