// The rows of a minibatch, picked out of a data set and cast on the way.
//
// Macros: FROM and TO, the element types; SAME (1 where they are one type), NARROW (1 where TO is the storage type T), WIDEN
// (1 where only FROM is).

// out[i] = scale * source[rows[first + i]], (batch, n), with first = CURSOR; without rows source[first + i], without a state
// first = 0. Labels, which are no numbers of type T, are not scaled. Moves each array once: reads source, writes out.
extern "C" __global__ void __launch_bounds__(THREADS)
gather(const FROM* __restrict__ source, const Index* __restrict__ rows, TO* out, Index batch, Index n, S scale,
       const double* __restrict__ state) {
    Index first = state ? Index(state[CURSOR]) : 0;
    Index column = tile_column();
    for (Index row = tile_row(); column < n && row < batch; row += tile_stride()) {
        Pack<FROM> from = load(source + (rows ? rows[first + row] : first + row) * n + column);
        Pack<TO> to;
        for (int i = 0; i < VEC; ++i) {
#if NARROW && SAME
            narrow(&to.v[i], widen(from.v[i]) * scale);
#elif NARROW
            narrow(&to.v[i], S(from.v[i]) * scale);
#elif SAME
            to.v[i] = from.v[i];
#elif WIDEN
            to.v[i] = TO(widen(from.v[i]) * scale);
#else
            to.v[i] = TO(from.v[i]);
#endif
        }
        store(out + row * n + column, to);
    }
}
