// The rows of a minibatch, picked out of a data set and cast on the way.
//
// Macros: FROM and TO, the element types; SAME (1 where they are one type), NARROW (1 where TO is the storage type T).

// out[i] = source[rows[i]], (batch, n).
extern "C" __global__ void __launch_bounds__(THREADS)
gather(const FROM* __restrict__ source, const Index* __restrict__ rows, TO* out, Index batch, Index n) {
    Index column = tile_column();
    for (Index row = tile_row(); column < n && row < batch; row += tile_stride()) {
        Pack<FROM> from = load(source + rows[row] * n + column);
        Pack<TO> to;
        for (int i = 0; i < VEC; ++i) {
#if SAME
            to.v[i] = from.v[i];
#elif NARROW
            narrow(&to.v[i], S(from.v[i]));
#else
            to.v[i] = TO(from.v[i]);
#endif
        }
        store(out + row * n + column, to);
    }
}
