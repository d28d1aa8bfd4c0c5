// How rows are shared out where a row's entries belong together (softmax): a group of threads has one row at a time.
//
// Block (32, 8): a warp a row, for short rows. Block (256, 1): the whole block a row, for long ones. The grid strides over
// the rows, and every group goes round as often as every other of its block, since a block's threads share barriers.

__device__ __forceinline__ Index first_row_of_block() { return Index(blockIdx.x) * blockDim.y; }
__device__ __forceinline__ Index rows_of_grid() { return Index(gridDim.x) * blockDim.y; }

__device__ __forceinline__ S group_sum(S x, S* shared) { return blockDim.y > 1 ? warp_sum(x) : block_sum(x, shared); }

__device__ __forceinline__ S group_max(S x, S* shared) {
    x = warp_max(x);
    if (blockDim.y > 1) return x;
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    for (int warp = 0; warp < blockDim.x / 32; ++warp) x = smax(x, shared[warp]);
    return x;
}

// One thread's maximum of a row and the sum of exponentials below it, from one pass (Milakov and Gimelshein, Online
// normalizer calculation for softmax, 2018).
struct Normalizer {
    S top = LOWEST;
    S sum = 0;

    __device__ __forceinline__ void add(S x) {
        S higher = smax(x, top);
        sum = sum * M(exp)(top - higher) + M(exp)(x - higher);
        top = higher;
    }

    // The maximum and the sum of the whole row, in every thread of the group.
    __device__ __forceinline__ void combine(S* shared) {
        S highest = group_max(top, shared);
        sum = group_sum(sum == S(0) ? S(0) : sum * M(exp)(top - highest), shared);
        top = highest;
    }
};
