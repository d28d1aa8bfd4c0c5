// Philox-4x32-10 (Salmon et al., 2011) and the dropout mask made of it: the same bits as gpu_mlp/ops/philox.py.

struct Words {
    unsigned int w[4];
};

__device__ __forceinline__ Words philox(unsigned int c0, unsigned int c1, unsigned int c2, unsigned int c3,
                                        unsigned int k0, unsigned int k1) {
    for (int round = 0; round < 10; ++round) {
        unsigned int high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        unsigned int high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return Words{{c0, c1, c2, c3}};
}

// The 128 random bits of the eight columns from 8 * group on, in one row of one layer in one round.
__device__ __forceinline__ Words dropout_bits(unsigned long long seed, unsigned int layer, unsigned long long round,
                                              Index row, unsigned int group) {
    return philox(group, (unsigned int)row, layer + ((unsigned int)(round >> 32) << 16), (unsigned int)round,
                  (unsigned int)seed, (unsigned int)(seed >> 32));
}

// The 16-bit number of one of the eight columns.
__device__ __forceinline__ unsigned int sixteen(const Words& words, unsigned int column) {
    unsigned int low = column & 2u ? words.w[1] : words.w[0];  // selects, not an index: words stay in registers
    unsigned int high = column & 2u ? words.w[3] : words.w[2];
    unsigned int pair = column & 4u ? high : low;
    return column & 1u ? pair >> 16 : pair & 0xFFFFu;
}
