// Sums over flat arrays in a fixed order, gathers, and the one-thread kernels that keep the state.

// partial[block] = the block's part of sum(l1 |theta_i| + l2 / 2 theta_i^2).
extern "C" __global__ void __launch_bounds__(THREADS)
penalty(const S* __restrict__ theta, Index n, double l1, double l2, double* partial) {
    __shared__ double shared[32];
    double sum = 0;
    for (Index i = flat_first(); i < n; i += flat_stride()) {
        double x = double(theta[i]);
        sum += l1 * fabs(x) + 0.5 * l2 * x * x;
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// partial[block] = the block's part of sum((g_i / LOSS_SCALE + penalty gradient of the first `covered`)^2).
extern "C" __global__ void __launch_bounds__(THREADS)
square_norm(const S* __restrict__ theta, const S* __restrict__ g, Index n, Index covered, S l1, S l2, double* partial,
            const double* __restrict__ state) {
    __shared__ double shared[32];
    double sum = 0;
    S unscale = S(1 / state[LOSS_SCALE]);
    for (Index i = flat_first(); i < n; i += flat_stride()) {
        S x = g[i] * unscale;
        if (i < covered) x += l1 * sign(theta[i]) + l2 * theta[i];
        sum += double(x) * double(x);
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// What is done with a sum of partial sums.
enum Finish { ADD_TO_COST, SET_NORM, SET_TOTAL_WEIGHT };

// One block: state[...] from the sum of `count` numbers, in a fixed order.
extern "C" __global__ void __launch_bounds__(THREADS)
finish_sum(const double* __restrict__ partial, Index count, int finish, double* state) {
    __shared__ double shared[32];
    double sum = 0;
    for (Index i = threadIdx.x; i < count; i += blockDim.x) sum += partial[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x != 0) return;
    if (finish == ADD_TO_COST) state[COST] += sum;
    if (finish == SET_NORM) state[GRADIENT_NORM] = sqrt(sum);
    if (finish == SET_TOTAL_WEIGHT) state[TOTAL_WEIGHT] = sum;
}

// partial[block] = the block's part of the sum of the rows' weights; `labels` and `class_weight`, (classes,), go together.
// A label that is no class weighs nothing.
extern "C" __global__ void __launch_bounds__(THREADS)
total_weight(const double* __restrict__ weight, const Index* __restrict__ labels, const S* __restrict__ class_weight,
             Index rows, Index classes, double* partial) {
    __shared__ double shared[32];
    double sum = 0;
    for (Index i = flat_first(); i < rows; i += flat_stride()) {
        double w = weight ? weight[i] : 1;
        if (class_weight) w *= labels[i] >= 0 && labels[i] < classes ? double(class_weight[labels[i]]) : 0;
        sum += w;
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// state[slot] = value. One thread.
extern "C" __global__ void set_state(int slot, double value, double* state) {
    state[slot] = value;
}

// What changes from step to step, before one; see begin_step in ops/interface.py. One thread.
extern "C" __global__ void begin_step(double learning_rate, double round, double cursor, double* state) {
    state[LEARNING_RATE] = learning_rate;
    state[ROUND] = round;
    state[CURSOR] = cursor;
    state[COST] = state[GRADIENT_NORM] = 0;
}

// Count the step; see finish_step in ops/interface.py. One thread.
extern "C" __global__ void finish_step(double rows, int scaled, double growth, double backoff, double interval,
                                       double minimum, double* state) {
    bool cost = isfinite(state[COST]), norm = isfinite(state[GRADIENT_NORM]);
    bool too_large = scaled && state[LOSS_SCALE] >= minimum;  // a smaller scale may still help
    state[EPOCH_COST] += rows * state[COST];
    if (!cost || !(norm || too_large)) {
        if (state[BAD_ROUND] == 0) state[BAD_ROUND] = state[ROUND] + 1;
    } else if (norm) {
        state[STEP] += 1;
    }
    if (!scaled) return;
    state[GOOD_STEPS] = norm ? state[GOOD_STEPS] + 1 : 0;
    if (!norm) {
        state[LOSS_SCALE] *= backoff;
        state[SKIPPED] += 1;
    } else if (state[GOOD_STEPS] == interval) {
        state[LOSS_SCALE] *= growth;
        state[GOOD_STEPS] = 0;
    }
}
