// Sums in place: the gradients of a value that was used more than once.
#include "prelude.cuh"

constexpr int THREADS = 256;
constexpr int PACK = 4;

struct AddArguments {
    SUM* sum;
    const TERM* term;
    int64_t elements;
};

KERNEL(add_in_place, AddArguments, THREADS, 4) {
    int64_t step = int64_t(gridDim.x) * THREADS;
    int64_t first = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    int64_t packs = packable<SUM, PACK>(args.sum, 0) && packable<TERM, PACK>(args.term, 0) ? args.elements / PACK : 0;
    for (int64_t i = first; i < packs; i += step) {
        Pack<SUM, PACK> sum = load_pack<SUM, PACK>(args.sum + i * PACK);
        Pack<TERM, PACK> term = load_pack<TERM, PACK>(args.term + i * PACK);
#pragma unroll
        for (int k = 0; k < PACK; ++k) sum.at[k] = from_float<SUM>(to_float(sum.at[k]) + to_float(term.at[k]));
        store_pack<SUM, PACK>(args.sum + i * PACK, sum);
    }
    for (int64_t i = packs * PACK + first; i < args.elements; i += step) {
        args.sum[i] = from_float<SUM>(to_float(args.sum[i]) + to_float(args.term[i]));
    }
}
