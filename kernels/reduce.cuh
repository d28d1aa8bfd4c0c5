// Sums in a fixed order: across a warp, across a block. No float atomics anywhere, so the same bits every run.

// A loop over a flat array: where a thread begins, and how far it steps.
__device__ __forceinline__ Index flat_first() { return Index(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ Index flat_stride() { return Index(gridDim.x) * blockDim.x; }

// The sum or the maximum over a warp, in every lane; every lane must arrive.
template <typename V>
__device__ __forceinline__ V warp_sum(V x) {
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
    return x;
}

template <typename V>
__device__ __forceinline__ V warp_max(V x) {
    for (int offset = 16; offset > 0; offset >>= 1) {
        V other = __shfl_xor_sync(0xFFFFFFFFu, x, offset);
        x = x > other ? x : other;
    }
    return x;
}

// The sum over a block of a multiple of 32 threads, at most 1024, in every thread; 32 shared numbers for it.
template <typename V>
__device__ __forceinline__ V block_sum(V x, V* shared) {
    int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
    x = warp_sum(x);
    __syncthreads();  // the numbers of an earlier call have been read
    if (thread % 32 == 0) shared[thread / 32] = x;
    __syncthreads();
    V sum = 0;
    for (int warp = 0; warp < threads / 32; ++warp) sum += shared[warp];
    return sum;
}
