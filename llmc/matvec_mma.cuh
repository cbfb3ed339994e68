// matvec.cuh's linear layer for 9 to 64 rows of bf16, by tensor cores. What counts is the same as there:
// weights are asked for before the kernel in front has ended, all of a block's at once, and read once.
//
// A block takes 16 outputs and 16 or 32 rows. Its eight warps share the sum: warp w has every eighth piece of
// 32 columns, from the w-th on, and multiplies weights [16 outputs x 32 columns] with inputs [32 columns x 8
// rows] as two products of 16 columns. A sum does not mind the order of its columns, so that a lane gets what
// it needs from memory as it lies there: with g = lane / 4 and t = lane % 4, columns 8t ... 8t + 7 of outputs
// g and g + 8, and of row g, a pack each. The first product takes the first halves of all packs, the second
// one the others (mma.cuh has the places).
//
// The eight sums are added in the order of the warps: a row's result depends on IC alone.
#pragma once
#include "matvec.cuh"

inline constexpr int kMaxMmaRows = 64;
inline constexpr int kMmaOutputs = 16;  // of a block
inline constexpr int kMmaColumns = 32;  // of a piece
inline constexpr int kMmaPieces = 12;   // that a warp has under way, at most
inline constexpr int kMmaPadding = 32;  // between rows in shared memory: neighbours in different banks

// Bytes of dynamic shared memory of a block of 8 TILES rows whose warps have `ahead` pieces under way each:
// the weights, and with a layernorm the normalized rows and its parameters.
inline size_t mma_shared(int tiles, int ahead, int IC, bool normalize) {
    const size_t staged = normalize ? (size_t)8 * tiles * (IC + kMmaPadding) + 2 * IC : 0;
    return kMatvecWarps * ahead * 2 * 32 * sizeof(Pack<__nv_bfloat16>) + staged * sizeof(__nv_bfloat16);
}

// Pieces that a warp can have under way: all of its own, if the device has the memory. 0: not even one.
inline int mma_pieces(const Context& ctx, int tiles, int IC, bool normalize) {
    const size_t sums = sizeof(float) * kMatvecWarps * 8 * tiles * (kMmaOutputs + 1);
    int ahead = std::min(ceil_div(IC / kMmaColumns, kMatvecWarps), kMmaPieces);
    while (ahead > 0 && mma_shared(tiles, ahead, IC, normalize) + sums > ctx.max_shared - 1024) ahead--;
    return ahead;
}

// blockIdx.x: which 8 TILES rows. blockIdx.y: outputs, in strides of the grid. Dynamic shared memory:
// mma_shared(), the weights with a lane's own packs side by side with the others'.
template <int TILES>
__global__ void __launch_bounds__(32 * kMatvecWarps, 2)
    matvec_mma_kernel(__nv_bfloat16* out, const __nv_bfloat16* inp, const __nv_bfloat16* weight,
                      const __nv_bfloat16* bias, Normalize<__nv_bfloat16> norm, const __nv_bfloat16* residual,
                      bool gelu, int rows, int IC, int OC, int ahead) {
    using Float = __nv_bfloat16;
    constexpr int N = Pack<Float>::size, ROWS = 8 * TILES, THREADS = 32 * kMatvecWarps;
    constexpr int LANES = THREADS / ROWS;  // that normalize a row
    extern __shared__ __align__(16) char matvec_shared[];
    __shared__ float partial[kMatvecWarps][ROWS][kMmaOutputs + 1];
    start_next_kernel();
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    const int first_row = blockIdx.x * ROWS, pieces = ceil_div(IC, kMmaColumns);
    Float* weights = reinterpret_cast<Float*>(matvec_shared);
    Float* w = weights + (warp * ahead * 2 * 32 + lane) * N;  // packs 2i, 2i + 1 for the i-th piece
    Float* x = weights + kMatvecWarps * ahead * 2 * 32 * N;

    // Rows that are not there repeat the last, as do outputs.
    const auto row_of = [&](int row) { return min(first_row + row, rows - 1); };
    const auto load = [&](int first, int first_piece) {
        for (int i = 0; i < ahead; i++) {
            const int piece = first_piece + i * kMatvecWarps + warp;
            if (piece >= pieces) break;
            for (int half = 0; half < 2; half++) {
                const int output = min(first + half * 8 + g, OC - 1);
                cp_async_16(shared_address(w + (2 * i + half) * 32 * N),
                            weight + (size_t)output * IC + piece * kMmaColumns + t * N);
            }
        }
        cp_async_commit();
    };

    const Float* from = inp + (size_t)first_row * IC;  // the rows, where the products find them
    int stride = IC;
    if (norm.weight) {
        Float *gain = x + ROWS * (IC + kMmaPadding), *shift = gain + IC;
        for (int c = tid * N; c < IC; c += THREADS * N) {
            cp_async_16(shared_address(gain + c), norm.weight + c);
            cp_async_16(shared_address(shift + c), norm.bias + c);
        }
        cp_async_commit();
        load(blockIdx.y * kMmaOutputs, 0);
        const float inverse_C = 1.0f / IC;
        cp_async_wait<1>();  // all but the weights
        __syncthreads();
        wait_for_previous_kernel();
        const int row = tid / LANES;
        normalize_row<LANES>(x + row * (IC + kMmaPadding), inp + (size_t)row_of(row) * IC, gain, shift, IC,
                             inverse_C, tid % LANES);
        __syncthreads();
        from = x;
        stride = IC + kMmaPadding;
    } else {
        load(blockIdx.y * kMmaOutputs, 0);
        wait_for_previous_kernel();
    }
    const Float* row_from[TILES];  // this lane's rows, and its first columns of them
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
        row_from[tile] = from + (size_t)(row_of(tile * 8 + g) - first_row) * stride + t * N;

#pragma unroll 1
    for (int first = blockIdx.y * kMmaOutputs; first < OC;) {
        float sum[TILES][4] = {};
#pragma unroll 1
        for (int first_piece = 0; first_piece < pieces;) {
            // inputs first: where they are not in shared memory, they take longer than what is left of the
            // weights' way
            constexpr int AT_ONCE = 3;
#pragma unroll 1
            for (int i0 = 0; i0 < ahead; i0 += AT_ONCE) {
                PackWords b[AT_ONCE][TILES];
                const auto piece_of = [&](int i) { return first_piece + (i0 + i) * kMatvecWarps + warp; };
                const auto inside = [&](int i) { return i0 + i < ahead && piece_of(i) < pieces; };
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
                    for (int tile = 0; tile < TILES; tile++)
                        b[i][tile] = load_words_if(inside(i), row_from[tile] + piece_of(i) * kMmaColumns);
                if (i0 == 0) cp_async_wait<0>();
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) {
                    if (!inside(i)) break;
                    const Float* packs = w + 2 * (i0 + i) * 32 * N;
                    const PackWords upper = load_words_if(true, packs),
                                    lower = load_words_if(true, packs + 32 * N);
#pragma unroll
                    for (int half = 0; half < 4; half += 2) {
                        const uint32_t a[4] = {upper[half], lower[half], upper[half + 1], lower[half + 1]};
#pragma unroll
                        for (int tile = 0; tile < TILES; tile++) {
                            const uint32_t columns[2] = {b[i][tile][half], b[i][tile][half + 1]};
                            mma_m16n8k16_bf16(sum[tile], a, columns);
                        }
                    }
                }
            }
            first_piece += ahead * kMatvecWarps;
            if (first_piece < pieces) load(first, first_piece);
        }
        const int next = first + gridDim.y * kMmaOutputs;
        if (next < OC) load(next, 0);

#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int i = 0; i < 4; i++) partial[warp][tile * 8 + 2 * t + i % 2][g + i / 2 * 8] = sum[tile][i];
        __syncthreads();
        for (int i = tid; i < ROWS * kMmaOutputs; i += THREADS) {
            const int row = i / kMmaOutputs, output = first + i % kMmaOutputs;
            if (first_row + row >= rows || output >= OC) continue;
            const size_t place = (size_t)(first_row + row) * OC + output;
            const float r = residual ? (float)residual[place] : 0.0f;
            const float b = bias ? (float)bias[output] : 0.0f;
            float y = 0.0f;
            for (int v = 0; v < kMatvecWarps; v++) y += partial[v][row][i % kMmaOutputs];
            out[place] = (Float)finish_output(y, b, gelu, r);
        }
        __syncthreads();  // before the next outputs' sums
        first = next;
    }
}

// Whether matvec_mma_forward can multiply matrices of IC columns and, with a layernorm or without, 4 IC.
template <class Float>
bool takes_matvec_mma(const Context& ctx, int rows, int IC) {
    return sizeof(Float) == 2 && ctx.row_lanes == 32 && rows <= kMaxMmaRows && IC % kMmaColumns == 0 &&
           mma_pieces(ctx, 2, IC, true) > 0;
}

// As matvec_forward, for rows up to kMaxMmaRows and IC a multiple of kMmaColumns.
inline void matvec_mma_forward(const Context& ctx, __nv_bfloat16* out, const __nv_bfloat16* inp,
                               const __nv_bfloat16* weight, const __nv_bfloat16* bias,
                               Normalize<__nv_bfloat16> norm, const __nv_bfloat16* residual, bool gelu,
                               int rows, int IC, int OC) {
    assert(rows >= 1 && rows <= kMaxMmaRows && IC % kMmaColumns == 0 && OC % 8 == 0 && !(gelu && residual));
    assert(!norm.weight == !norm.bias);
    const int turns = ceil_div(OC, kMmaOutputs);
    const auto launch = [&](auto tiles, int ahead) {
        constexpr int TILES = tiles, ROWS = 8 * TILES;
        assert(ahead > 0);
        const size_t shared = mma_shared(TILES, ahead, IC, norm.weight);
        auto kernel = matvec_mma_kernel<TILES>;
        allow_shared(kernel, shared);
        const int groups = ceil_div(rows, ROWS), most = ceil_div(2 * ctx.num_sms, groups);
        launch_early(ctx, kernel, dim3(groups, turns < most ? turns : most), 32 * kMatvecWarps, shared, out,
                     inp, weight, bias, norm, residual, gelu, rows, IC, OC, ahead);
    };
    // Half as many rows a block where blocks would not fill the device, and where more leave less room for
    // weights.
    const int ahead2 = mma_pieces(ctx, 2, IC, norm.weight), ahead4 = mma_pieces(ctx, 4, IC, norm.weight);
    if (rows <= 16 || turns * ceil_div(rows, 32) < ctx.num_sms || ahead4 < ahead2)
        launch(std::integral_constant<int, 2>(), ahead2);
    else
        launch(std::integral_constant<int, 4>(), ahead4);
}
