// What a target entry is: a real number, or made from a class label.
//
// Macros: LABELS (1: y holds a label a row), SIGNS (a label means +1 there and -1 elsewhere), CATEGORICAL (the target is a
// class row: smoothed with LABEL_SMOOTHING, and weighted by class with CLASS_WEIGHTS).

#if LABELS
typedef Index Y;
#else
typedef S Y;
#endif

__device__ __forceinline__ S target(const Y* y, Index row, Index column, Index n, const S* class_weight) {
#if LABELS
    S t = y[row] == column ? S(1) : S(SIGNS ? -1 : 0);
#else
    S t = y[row * n + column];
#endif
#if CATEGORICAL
    t = t * S(1.0 - LABEL_SMOOTHING) + S(LABEL_SMOOTHING) / S(n);
#if CLASS_WEIGHTS
    t *= class_weight[column];
#endif
#endif
    return t;
}

// The weight of a row's loss within the batch: its sample's, over TOTAL_WEIGHT; 0 where that is 0.
__device__ __forceinline__ double row_share(const double* weight, Index row, const double* state) {
    double total = state[TOTAL_WEIGHT];
    return (total ? 1 / total : 0) * (weight ? weight[row] : 1);
}
