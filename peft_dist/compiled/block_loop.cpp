// Products with square blocks that stand side by side in the columns of a matrix, as `peft_dist/fused/turned.py` says.
//
// So small a product reads its numbers about as often as it multiplies them; a library's batched one is twice as slow.

#include "vectors.h"

namespace {

constexpr int ROWS = 8;       // rows at a time, which share what is read of a block
constexpr int AT_ONCE = 16;   // rows of a sum over rows that are brought together first
constexpr int WIDEST = 256;   // rows of a block; the caller sees to it

// For N rows, U vectors of columns: to = row R, or added to it.
template <int N, int U>
inline void turn(const float* rows, const float* R, float* to, int64_t columns, int64_t b, bool adds) {
    Floats sums[N][U] = {};
    if (adds)
        for (int p = 0; p < N; p++)
            for (int u = 0; u < U; u++) sums[p][u] = load(to + p * columns + u * WIDTH);
    for (int64_t i = 0; i < b; i++) {
        Floats r[U];
        for (int u = 0; u < U; u++) r[u] = load(R + i * b + u * WIDTH);
        for (int p = 0; p < N; p++)
            for (int u = 0; u < U; u++) sums[p][u] += rows[p * columns + i] * r[u];
    }
    for (int p = 0; p < N; p++)
        for (int u = 0; u < U; u++) store(to + p * columns + u * WIDTH, sums[p][u]);
}

template <int N>
void turn_rows(const float* rows, const float* R, float* to, int64_t num_blocks, int64_t b, bool adds) {
    const int64_t columns = num_blocks * b;
    for (int64_t k = 0; k < columns; k += b, R += b * b) {
        for (int p = N; p < 2 * N; p++) {
            fetch(rows + p * columns + k, b);
            fetch(to + p * columns + k, b);
        }
        int64_t j = 0;
        for (; j + 2 * WIDTH <= b; j += 2 * WIDTH) turn<N, 2>(rows + k, R + j, to + k + j, columns, b, adds);
        if (j < b) turn<N, 1>(rows + k, R + j, to + k + j, columns, b, adds);
    }
}

// to += x^T g for ROWS columns of x and U vectors of columns of g.
template <int U> inline void cross(const float* x, const float* g, float* to, int64_t num, int64_t b) {
    Floats sums[ROWS][U];
    for (int i = 0; i < ROWS; i++)
        for (int u = 0; u < U; u++) sums[i][u] = load(to + i * b + u * WIDTH);
    for (int64_t p = 0; p < num; p++) {
        Floats v[U];
        for (int u = 0; u < U; u++) v[u] = load(g + p * b + u * WIDTH);
        for (int i = 0; i < ROWS; i++)
            for (int u = 0; u < U; u++) sums[i][u] += x[p * b + i] * v[u];
    }
    for (int i = 0; i < ROWS; i++)
        for (int u = 0; u < U; u++) store(to + i * b + u * WIDTH, sums[i][u]);
}

// A block's columns of some rows, next to one another.
inline void bring(const float* from, float* to, int64_t num, int64_t columns, int64_t b) {
    for (int64_t p = num; p < 2 * num; p++) fetch(from + p * columns, b);
    for (int64_t p = 0; p < num; p++)
        for (int64_t i = 0; i < b; i += WIDTH) store(to + p * b + i, load(from + p * columns + i));
}

}  // namespace

// rows and to (num_rows, num_blocks * b), R (num_blocks, b, b): each row's blocks times those of R.
extern "C" void turn_float32(const float* rows, const float* R, float* to, int64_t num_rows, int64_t num_blocks,
                             int64_t b, int64_t adds) {
    const int64_t columns = num_blocks * b;
    int64_t p = 0;
    for (; p + ROWS <= num_rows; p += ROWS)
        turn_rows<ROWS>(rows + p * columns, R, to + p * columns, num_blocks, b, adds);
    for (; p < num_rows; p++) turn_rows<1>(rows + p * columns, R, to + p * columns, num_blocks, b, adds);
}

// x and g (num_rows, num_blocks * b), to (num_blocks, b, b): the sum over rows of the outer products of their blocks.
extern "C" void cross_float32(const float* x, const float* g, float* to, int64_t num_rows, int64_t num_blocks,
                              int64_t b) {
    const int64_t columns = num_blocks * b;
    float xs[AT_ONCE * WIDEST], gs[AT_ONCE * WIDEST];
    std::memset(to, 0, columns * b * sizeof(float));
    for (int64_t p = 0; p < num_rows; p += AT_ONCE) {
        const int64_t num = num_rows - p < AT_ONCE ? num_rows - p : AT_ONCE;
        for (int64_t k = 0; k < columns; k += b) {
            bring(x + p * columns + k, xs, num, columns, b);
            bring(g + p * columns + k, gs, num, columns, b);
            for (int64_t i = 0; i < b; i += ROWS) {
                float* out = to + (k + i) * b;
                int64_t j = 0;
                for (; j + 2 * WIDTH <= b; j += 2 * WIDTH) cross<2>(xs + i, gs + j, out + j, num, b);
                if (j < b) cross<1>(xs + i, gs + j, out + j, num, b);
            }
        }
    }
}
