// The two products of a low-rank addition for a few positions, whose sums stay in registers.

#pragma once

#include "vectors.h"

namespace {

constexpr int POSITIONS = 4;  // positions at a time, which share what is read of A and B
constexpr int RANKS = 4;      // rows of A at a time; ranks are multiples of it

// h[p][j] = w x[p] . A[j], for N positions and the r rows of A; rows of h are `stride` apart.
// The order of a sum does not depend on N.
template <typename T, int N>
void down(const T* x, const T* A, float w, int64_t in, int64_t r, float* h, int64_t stride) {
    const int64_t whole = in - in % WIDTH;
    for (int64_t j = 0; j < r; j += RANKS) {
        Floats sums[N][RANKS] = {};
        for (int64_t i = 0; i < whole; i += WIDTH) {
            Floats a[RANKS];
            __builtin_prefetch(x + (N + j / RANKS % N) * in + i, 0, 3);
            for (int q = 0; q < RANKS; q++) a[q] = load(A + (j + q) * in + i);
            for (int p = 0; p < N; p++) {
                const Floats v = load(x + p * in + i);
                for (int q = 0; q < RANKS; q++) sums[p][q] += v * a[q];
            }
        }
        if (whole < in)
            for (int p = 0; p < N; p++)
                for (int q = 0; q < RANKS; q++)
                    sums[p][q] += load_some(x + p * in + whole, in - whole)
                                * load_some(A + (j + q) * in + whole, in - whole);
        if constexpr (N * RANKS == WIDTH) {
            const Floats all = w * sums_of(&sums[0][0]);
            for (int p = 0; p < N; p++)
                std::memcpy(h + p * stride + j, (const float*)&all + p * RANKS, RANKS * sizeof(float));
        } else {
            for (int p = 0; p < N; p++)
                for (int q = 0; q < RANKS; q++) h[p * stride + j + q] = w * sum(sums[p][q]);
        }
    }
}

// y += h B for N positions and U vectors of columns, B being `num` matrices (r, out) one below the other, whose rows are
// `apart`.
template <typename T, typename TB, int N, int U>
inline void up(const float* h, int64_t stride, const TB* const* Bs, int num, int64_t r, int64_t apart, T* y,
               int64_t out) {
    Floats sums[N][U];
    for (int p = 0; p < N; p++)
        for (int u = 0; u < U; u++) __builtin_prefetch(y + (N + p) * out + u * WIDTH, 1, 3);
    for (int p = 0; p < N; p++)
        for (int u = 0; u < U; u++) sums[p][u] = load(y + p * out + u * WIDTH);
    for (int k = 0; k < num; k++)
        for (int64_t j = 0; j < r; j++)
            for (int u = 0; u < U; u++) {
                const Floats b = load(Bs[k] + j * apart + u * WIDTH);
                for (int p = 0; p < N; p++) sums[p][u] += h[p * stride + k * r + j] * b;
            }
    for (int p = 0; p < N; p++)
        for (int u = 0; u < U; u++) store(y + p * out + u * WIDTH, sums[p][u]);
}

}  // namespace
