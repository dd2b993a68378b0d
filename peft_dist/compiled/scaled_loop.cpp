// What the gradient through a scale is made of, in one pass over the large matrices.

#include "vectors.h"

namespace {

constexpr int ROWS = 8;  // rows at a time, which share what is read of the scale and of the sums

template <int N>
void scale_rows(const float* g, const float* y, const float* scale, float* given, float* sums, int64_t columns) {
    int64_t i = 0;
    for (; i + WIDTH <= columns; i += WIDTH) {
        const Floats s = load(scale + i);
        Floats sum = load(sums + i);
        for (int p = 0; p < N; p++) {
            const Floats v = load(g + p * columns + i);
            sum += v * load(y + p * columns + i);
            store(given + p * columns + i, v * s);
        }
        store(sums + i, sum);
    }
    if (i == columns) return;
    const int64_t rest = columns - i;
    const Floats s = load_some(scale + i, rest);
    Floats sum = load_some(sums + i, rest);
    for (int p = 0; p < N; p++) {
        const Floats v = load_some(g + p * columns + i, rest);
        sum += v * load_some(y + p * columns + i, rest);
        store_some(given + p * columns + i, v * s, rest);
    }
    store_some(sums + i, sum, rest);
}

}  // namespace

// given = g * scale, and sums = the sum over rows of g * y; `given` may be g itself.
extern "C" void scale_float32(const float* g, const float* y, const float* scale, float* given, float* sums,
                              int64_t num_rows, int64_t columns) {
    std::memset(sums, 0, columns * sizeof(float));
    int64_t p = 0;
    for (; p + ROWS <= num_rows; p += ROWS)
        scale_rows<ROWS>(g + p * columns, y + p * columns, scale, given + p * columns, sums, columns);
    for (; p < num_rows; p++)
        scale_rows<1>(g + p * columns, y + p * columns, scale, given + p * columns, sums, columns);
}
