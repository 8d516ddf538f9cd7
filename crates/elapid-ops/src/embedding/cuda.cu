// Rows of a table by token id, and the gradient of the table.
//
// The gradient has no atomics: the host sorts the tokens by id, keeping their order among equals, and cuts the tokens
// of each id into pieces of at most a fixed number. A thread adds the rows of one piece in order for its own columns.
// The sum of an id's only piece goes straight to the table's gradient; where there are several, each leaves a row in
// a workspace, and a second kernel adds these in order. So the bits depend on the ids and on nothing else, and a
// token that fills half the batch is shared out like any other.
//
// Macros: TABLE, the type of the table; ELEMENT, that of the rows taken and of their gradient.
#include "prelude.cuh"

using T = ELEMENT;

constexpr int PACK = 4;
// Rows whose loads are under way together.
constexpr int GROUP = 4;

struct ForwardArguments {
    const TABLE* table;  // [V, D]
    int64_t table_stride;
    const uint32_t* ids;  // [T], each below V
    T* out;               // [T, D]
    int64_t out_stride;
    int64_t tokens;
    int64_t width;
};

// `count` tokens from `first` on in the sorted order, all of one id.
struct Piece {
    uint32_t first;
    uint32_t count;
    uint32_t id;
    uint32_t row;  // of the workspace, or WHOLE if the id has no other piece
};
constexpr uint32_t WHOLE = 0xffffffffu;

struct PiecesArguments {
    const T* dy;  // [T, D]
    int64_t dy_stride;
    const uint32_t* order;  // [T]: tokens sorted by id, equal ids in their order
    const Piece* pieces;
    int64_t piece_count;
    float* workspace;  // [rows, D]
    float* dtable;     // [V, D]; rows of ids that do not occur are left as they are
    int64_t dtable_stride;
    int64_t width;
    int64_t accumulate;  // 1: add to dtable, 0: replace the rows of ids that occur
};

struct JoinArguments {
    const float* workspace;  // [rows, D]
    const Piece* joins;      // ids with several pieces: workspace rows `first` to `first + count`; `row` is not read
    int64_t join_count;
    float* dtable;  // [V, D]
    int64_t dtable_stride;
    int64_t width;
    int64_t accumulate;
};

template <class E> DEVICE Pack<E, PACK> fetch(const E* from, int count, bool whole) {
    if (whole) return load_pack<E, PACK>(from);
    Pack<E, PACK> pack;
#pragma unroll
    for (int i = 0; i < PACK; ++i) pack.at[i] = i < count ? from[i] : from_float<E>(0.0f);
    return pack;
}
template <class E> DEVICE void put(E* to, const Pack<E, PACK>& pack, int count, bool whole) {
    if (whole) {
        store_pack<E, PACK>(to, pack);
        return;
    }
#pragma unroll
    for (int i = 0; i < PACK; ++i)
        if (i < count) to[i] = pack.at[i];
}

// Any number of blocks along x, any block.
KERNEL(embedding_forward, ForwardArguments, 256, 2) {
    int64_t packs = ceil_div(args.width, PACK);
    bool in_whole = packable<TABLE, PACK>(args.table, args.table_stride);
    bool out_whole = packable<T, PACK>(args.out, args.out_stride);
    int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; at < args.tokens * packs; at += int64_t(gridDim.x) * blockDim.x) {
        int64_t t = at / packs, c = at % packs * PACK;
        int count = int(least(int64_t(PACK), args.width - c));
        const TABLE* row = args.table + int64_t(args.ids[t]) * args.table_stride;
        Pack<TABLE, PACK> from = fetch(row + c, count, in_whole && count == PACK);
        Pack<T, PACK> to;
#pragma unroll
        for (int i = 0; i < PACK; ++i) to.at[i] = from_float<T>(to_float(from.at[i]));
        put(args.out + t * args.out_stride + c, to, count, out_whole && count == PACK);
    }
}

// Adds `count` rows, whose numbers `row_of` tells, in order for the columns from `c` on, and leaves the sum in `to`.
template <class E, class RowOf>
DEVICE void add_rows(const E* rows, int64_t stride, RowOf row_of, int64_t count, int64_t c, int columns, bool whole,
                     float* to, bool to_whole, bool accumulate) {
    Pack<float, PACK> sum;
#pragma unroll
    for (int i = 0; i < PACK; ++i) sum.at[i] = 0.0f;
    auto add = [&](const Pack<E, PACK>& pack) {
#pragma unroll
        for (int i = 0; i < PACK; ++i) sum.at[i] += to_float(pack.at[i]);
    };
    int64_t k = 0;
    for (; k + GROUP <= count; k += GROUP) {
        Pack<E, PACK> packs[GROUP];
#pragma unroll
        for (int j = 0; j < GROUP; ++j) packs[j] = fetch(rows + row_of(k + j) * stride + c, columns, whole);
#pragma unroll
        for (int j = 0; j < GROUP; ++j) add(packs[j]);
    }
    for (; k < count; ++k) add(fetch(rows + row_of(k) * stride + c, columns, whole));
    if (accumulate) {
        Pack<float, PACK> before = fetch(to, columns, to_whole);
#pragma unroll
        for (int i = 0; i < PACK; ++i) sum.at[i] = before.at[i] + sum.at[i];
    }
    put(to, sum, columns, to_whole);
}

// Grid: (pieces, ceil(D / (4 threads))), any block.
KERNEL(embedding_pieces, PiecesArguments, 256, 2) {
    int64_t c = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * PACK;
    if (c >= args.width) return;
    Piece piece = args.pieces[blockIdx.x];
    if (piece.count == 0) return;
    int columns = int(least(int64_t(PACK), args.width - c));
    bool full = columns == PACK, direct = piece.row == WHOLE;
    int64_t stride = direct ? args.dtable_stride : args.width;
    float* base = direct ? args.dtable : args.workspace;
    float* to = base + int64_t(direct ? piece.id : piece.row) * stride + c;
    const uint32_t* order = args.order + piece.first;
    auto row_of = [&](int64_t k) { return int64_t(order[k]); };
    bool whole = full && packable<T, PACK>(args.dy, args.dy_stride);
    add_rows(args.dy, args.dy_stride, row_of, piece.count, c, columns, whole, to,
             full && packable<float, PACK>(base, stride), direct && args.accumulate);
}

// Grid: (joins, ceil(D / (4 threads))), any block; after embedding_pieces.
KERNEL(embedding_join, JoinArguments, 256, 2) {
    int64_t c = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * PACK;
    if (c >= args.width) return;
    Piece join = args.joins[blockIdx.x];
    if (join.count == 0) return;
    int columns = int(least(int64_t(PACK), args.width - c));
    bool full = columns == PACK;
    auto row_of = [&](int64_t k) { return int64_t(join.first) + k; };
    bool whole = full && packable<float, PACK>(args.workspace, args.width);
    float* to = args.dtable + int64_t(join.id) * args.dtable_stride + c;
    add_rows(args.workspace, args.width, row_of, join.count, c, columns, whole, to,
             full && packable<float, PACK>(args.dtable, args.dtable_stride), args.accumulate != 0);
}
