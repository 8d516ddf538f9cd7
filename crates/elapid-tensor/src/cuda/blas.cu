// Products of no terms (k = 0), for which there is nothing to multiply.
//
// Macro: ELEMENT, the type of c and of the bias.
#include "prelude.cuh"

using T = ELEMENT;

struct WithoutTermsArguments {
    T* c;           // [batch, rows, width]
    const T* bias;  // [width], or null
    int64_t batch;
    int64_t batch_stride;
    int64_t rows;
    int64_t width;
    int64_t stride;
    double beta;  // 0: c is not read
};

// c = beta c + bias, threads over all elements.
KERNEL(without_terms, WithoutTermsArguments, 256, 1) {
    int64_t len = args.batch * args.rows * args.width;
    int64_t step = int64_t(gridDim.x) * blockDim.x;
    float beta = float(args.beta);
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < len; i += step) {
        int64_t column = i % args.width;
        int64_t row = i / args.width % args.rows;
        int64_t matrix = i / args.width / args.rows;
        T* c = args.c + matrix * args.batch_stride + row * args.stride + column;
        float value = beta == 0.0f ? 0.0f : beta * to_float(*c);
        if (args.bias) value += to_float(args.bias[column]);
        *c = from_float<T>(value);
    }
}
