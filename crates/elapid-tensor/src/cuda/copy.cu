// Copies between layouts and element types, and sums in place: what tensors need of a GPU. FROM and TO are the types;
// equal types are copied as they are.
#include "prelude.cuh"

constexpr int THREADS = 256;
constexpr int MAX_AXES = 6;

DEVICE void convert(uint8_t from, uint8_t& to) { to = from; }
DEVICE void convert(uint16_t from, uint16_t& to) { to = from; }
DEVICE void convert(uint32_t from, uint32_t& to) { to = from; }
DEVICE void convert(uint64_t from, uint64_t& to) { to = from; }
DEVICE void convert(float from, bf16& to) { to = from_float<bf16>(from); }
DEVICE void convert(bf16 from, float& to) { to = to_float(from); }

struct RowsArguments {
    const FROM* from;
    TO* to;
    int64_t from_stride;
    int64_t to_stride;
    int64_t rows;
    int64_t width;
};

constexpr int LARGER = sizeof(FROM) > sizeof(TO) ? sizeof(FROM) : sizeof(TO);
constexpr int PACK = 16 / LARGER;

template <int COUNT, class INDEX> DEVICE void move_rows(const RowsArguments& args) {
    INDEX packs = INDEX(args.width / COUNT);
    INDEX all = INDEX(args.rows) * packs;
    INDEX step = INDEX(gridDim.x) * THREADS;
    for (INDEX i = INDEX(blockIdx.x) * THREADS + threadIdx.x; i < all; i += step) {
        INDEX row = i / packs;
        int64_t at = int64_t(i - row * packs) * COUNT;
        Pack<FROM, COUNT> from = load_pack<FROM, COUNT>(args.from + int64_t(row) * args.from_stride + at);
        Pack<TO, COUNT> to;
#pragma unroll
        for (int k = 0; k < COUNT; ++k) convert(from.at[k], to.at[k]);
        store_pack<TO, COUNT>(args.to + int64_t(row) * args.to_stride + at, to);
    }
}

// Rows of neighbouring elements, some elements apart on either side.
KERNEL(copy_rows, RowsArguments, THREADS, 4) {
    bool packs = args.width % PACK == 0 && packable<FROM, PACK>(args.from, args.from_stride) &&
                 packable<TO, PACK>(args.to, args.to_stride);
    bool small = args.rows * args.width < (int64_t(1) << 31);
    if (packs && small) {
        move_rows<PACK, uint32_t>(args);
    } else if (packs) {
        move_rows<PACK, int64_t>(args);
    } else {
        move_rows<1, int64_t>(args);
    }
}

struct StridedArguments {
    const FROM* from;
    TO* to;
    int64_t elements;
    int64_t shape[MAX_AXES];
    int64_t from_strides[MAX_AXES];
    int64_t to_strides[MAX_AXES];
};

// Any layout to any other; axes that are not there have extent 1.
KERNEL(copy_strided, StridedArguments, THREADS, 4) {
    int64_t step = int64_t(gridDim.x) * THREADS;
    for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < args.elements; i += step) {
        int64_t rest = i, from = 0, to = 0;
#pragma unroll
        for (int axis = MAX_AXES - 1; axis >= 0; --axis) {
            int64_t above = rest / args.shape[axis];
            int64_t index = rest - above * args.shape[axis];
            from += index * args.from_strides[axis];
            to += index * args.to_strides[axis];
            rest = above;
        }
        convert(args.from[from], args.to[to]);
    }
}
