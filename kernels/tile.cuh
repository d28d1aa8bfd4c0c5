// How a block of rows is cut among threads: each thread owns VEC neighbouring columns and walks down the rows.
//
// Block (bx, by): bx threads across the columns, by down the rows, bx * by = 256. Grid (x, y): x covers the columns, y
// strides over the rows. What depends on the column alone (a bias, a column sum) stays in registers, and no division by n
// is needed. VEC is 1 unless n and every pointer are multiples of a whole pack. The loops over rows are not unrolled: what
// they store may be what they load, so that unrolled rows would wait for each other and only take registers.

__device__ __forceinline__ Index tile_column() { return (Index(blockIdx.x) * blockDim.x + threadIdx.x) * VEC; }
__device__ __forceinline__ Index tile_row() { return Index(blockIdx.y) * blockDim.y + threadIdx.y; }
__device__ __forceinline__ Index tile_stride() { return Index(gridDim.y) * blockDim.y; }

// The sums of a block's columns into row blockIdx.y of `partial`, (gridDim.y, n), which begins at a multiple of 16 bytes;
// every thread of the block must arrive.
__device__ __forceinline__ void store_column_sums(const S (&sum)[VEC], Index column, Index n, S* partial) {
    __shared__ S tile[THREADS * VEC];
    S* mine = tile + (threadIdx.y * blockDim.x + threadIdx.x) * VEC;
    for (int i = 0; i < VEC; ++i) mine[i] = sum[i];
    __syncthreads();
    if (threadIdx.y == 0 && column < n) {
        Pack<S> total = {};
#pragma unroll 1  // the columns are independent already, and unrolled rows are most of the kernel's code
        for (int y = 0; y < blockDim.y; ++y) {
            for (int i = 0; i < VEC; ++i) total.v[i] += tile[(y * blockDim.x + threadIdx.x) * VEC + i];
        }
        store(partial + Index(blockIdx.y) * n + column, total);
    }
}

#if DROPOUT
// What the entries of one pack are multiplied with: 1 / keep, or 0 where they are dropped.
struct Mask {
    unsigned int threshold;
    unsigned int layer;
    unsigned long long seed;
    Index first_row;
    unsigned long long round;

    __device__ __forceinline__ S keep() const { return S(threshold) / S(65536); }

    __device__ __forceinline__ void apply(S (&x)[VEC], Index row, Index column) const {
        Words words = dropout_bits(seed, layer, round, first_row + row, (unsigned int)(column / 8));
        S scale = S(1) / keep();
        for (int i = 0; i < VEC; ++i) {
            x[i] = sixteen(words, (unsigned int)(column + i)) < threshold ? x[i] * scale : S(0);
        }
    }
};
#endif
