// Functions of one value and of two, element by element. The operands are read with strides (0 where they are
// repeated), the result lies in order.
//
// The host merges axes that all operands step through evenly; what remains are rows along the innermost axis. A
// thread makes PACK neighbours of a row at a time, moved by 16-byte accesses where the addresses allow it. All
// arithmetic is f32, whatever the types in memory.
//
// Macros: FIRST, SECOND, the types of the operands; RESULT, that of the result.
#include "prelude.cuh"

constexpr int PACK = sizeof(FIRST) == 2 && sizeof(SECOND) == 2 && sizeof(RESULT) == 2 ? 8 : 4;
constexpr int RANK = 6;
// Above this, softplus is the identity and its derivative 1, as in the kernels of Mamba.
constexpr float SOFTPLUS_THRESHOLD = 20.0f;

struct Arguments {
    const FIRST* x;
    const SECOND* y;  // null for functions of one value
    RESULT* out;
    int64_t extents[RANK];  // of the merged axes, the innermost first
    int64_t x_strides[RANK];
    int64_t y_strides[RANK];
    int64_t rank;  // number of merged axes, at least 1
    int64_t rows;  // product of all extents but the innermost
    int64_t function;
    double factor;  // of function 2
};

// Accurate to a few ulp over the whole range, unlike the prelude's function on the special-function unit: these
// kernels wait for memory, not for arithmetic.
DEVICE float exact_sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// y = f(x, y), element by element. The number of the function is that of `Function` in cuda.rs; the same for all
// threads, so that the choice costs nothing beside the accesses to memory.
DEVICE void evaluate(int64_t function, float factor, const float (&x)[PACK], float (&y)[PACK]) {
#define CASE(NUMBER, VALUE)                                \
    case NUMBER:                                           \
        _Pragma("unroll") for (int i = 0; i < PACK; ++i) { \
            float a = x[i];                                \
            y[i] = VALUE;                                  \
        }                                                  \
        return;
    switch (function) {
        // Of one value.
        CASE(0, a)
        CASE(1, -a)
        CASE(2, a * factor)
        CASE(3, expf(a))
        CASE(4, -expf(a))
        CASE(5, exact_sigmoid(a))
        CASE(6, a * exact_sigmoid(a))
        CASE(7, a > SOFTPLUS_THRESHOLD ? a : log1pf(expf(a)))
        // Of two.
        CASE(8, a + y[i])
        CASE(9, a - y[i])
        CASE(10, a * y[i])
        // Gradients: of the sigmoid by its result, of silu and softplus by their operand.
        CASE(11, y[i] * (a * (1.0f - a)))
        CASE(12, y[i] * silu_slope(a, exact_sigmoid(a)))
        CASE(13, a > SOFTPLUS_THRESHOLD ? y[i] : y[i] * exact_sigmoid(a))
    }
#undef CASE
}

// The first `count` of PACK elements, `step` apart; 0 behind them.
template <class E> DEVICE void fetch(float (&to)[PACK], const E* from, int64_t step, int count) {
    if (step == 0) {
        float value = to_float(*from);
#pragma unroll
        for (int i = 0; i < PACK; ++i) to[i] = value;
    } else if (step == 1 && count == PACK && packable<E, PACK>(from, 0)) {
        Pack<E, PACK> pack = load_pack<E, PACK>(from);
#pragma unroll
        for (int i = 0; i < PACK; ++i) to[i] = to_float(pack.at[i]);
    } else {
#pragma unroll
        for (int i = 0; i < PACK; ++i) to[i] = i < count ? to_float(from[i * step]) : 0.0f;
    }
}

// Any number of blocks along x, any block.
KERNEL(elementwise, Arguments, 256, 4) {
    int64_t inner = args.extents[0], packs = ceil_div(inner, PACK), all = packs * args.rows;
    float factor = float(args.factor);
    int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; at < all; at += int64_t(gridDim.x) * blockDim.x) {
        int64_t row = 0, c = at * PACK;
        const FIRST* x_row = args.x;
        const SECOND* y_row = args.y;
        if (args.rank > 1) {
            row = at / packs;
            c -= row * packs * PACK;
            int64_t rest = row;
            for (int axis = 1; axis < args.rank; ++axis) {
                // What is left at the outermost axis is its own index.
                int64_t next = axis + 1 < args.rank ? rest / args.extents[axis] : 0;
                int64_t index = rest - next * args.extents[axis];
                x_row += index * args.x_strides[axis];
                if (args.y) y_row += index * args.y_strides[axis];
                rest = next;
            }
        }
        int count = int(least(int64_t(PACK), inner - c));
        float x[PACK], y[PACK] = {};
        fetch(x, x_row + c * args.x_strides[0], args.x_strides[0], count);
        if (args.y) fetch(y, y_row + c * args.y_strides[0], args.y_strides[0], count);
        evaluate(args.function, factor, x, y);
        Pack<RESULT, PACK> pack;
#pragma unroll
        for (int i = 0; i < PACK; ++i) pack.at[i] = from_float<RESULT>(y[i]);
        RESULT* out = args.out + row * inner + c;
        if (count == PACK && packable<RESULT, PACK>(out, 0)) {
            store_pack<RESULT, PACK>(out, pack);
        } else {
#pragma unroll
            for (int i = 0; i < PACK; ++i)
                if (i < count) out[i] = pack.at[i];
        }
    }
}
