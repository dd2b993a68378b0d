// y += w (x A^T) B for neighbouring positions that the same adapters serve, as `peft_dist/lane_products.py` says.
//
// The products of a decoding step are so small that a library's fixed price for each of them is most of their cost.
// Sums are in single precision, in an order that does not depend on the other positions of the call.

#include "vectors.h"

namespace {

constexpr int POSITIONS = 4;  // positions at a time, which share what is read of A and B
constexpr int RANKS = 4;      // rows of A at a time; ranks are multiples of it
constexpr int MOST = 256;     // ranks of all adapters of a position together, and so adapters; the caller sees to it

// h[p][j] = w x[p] . A[j], for N positions and the r rows of A.
// The order of a sum does not depend on N.
template <typename T, int N>
void down(const T* x, const T* A, float w, int64_t in, int64_t r, float* h) {
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
                std::memcpy(h + p * MOST + j, (const float*)&all + p * RANKS, RANKS * sizeof(float));
        } else {
            for (int p = 0; p < N; p++)
                for (int q = 0; q < RANKS; q++) h[p * MOST + j + q] = w * sum(sums[p][q]);
        }
    }
}

// y += h B for N positions and U vectors of columns, B being `num` matrices (r, out) one below the other, whose rows are
// `apart`.
template <typename T, typename TB, int N, int U>
inline void up(const float* h, const TB* const* Bs, int num, int64_t r, int64_t apart, T* y, int64_t out) {
    Floats sums[N][U];
    for (int p = 0; p < N; p++)
        for (int u = 0; u < U; u++) __builtin_prefetch(y + (N + p) * out + u * WIDTH, 1, 3);
    for (int p = 0; p < N; p++)
        for (int u = 0; u < U; u++) sums[p][u] = load(y + p * out + u * WIDTH);
    for (int k = 0; k < num; k++)
        for (int64_t j = 0; j < r; j++)
            for (int u = 0; u < U; u++) {
                const Floats b = load(Bs[k] + j * apart + u * WIDTH);
                for (int p = 0; p < N; p++) sums[p][u] += h[p * MOST + k * r + j] * b;
            }
    for (int p = 0; p < N; p++)
        for (int u = 0; u < U; u++) store(y + p * out + u * WIDTH, sums[p][u]);
}

template <typename T> struct Call {
    const T *x, *A, *B;
    T* y;
    int64_t in, out, r;
};

// N positions from `at` on, which `num` lanes serve, with their Bs (r, out), whose rows are `apart`.
template <typename T, typename TB, int N>
void block(const Call<T>& c, int64_t at, const int32_t* lanes, const float* weights, const TB* const* all, int num,
           int64_t apart) {
    constexpr int AT_ONCE = N < POSITIONS ? 8 / N : 4;  // so many sums are under way that none waits for itself
    float h[N * MOST];
    const TB* Bs[MOST];
    for (int k = 0; k < num; k++) {
        down<T, N>(c.x + at * c.in, c.A + lanes[k] * c.r * c.in, weights[k], c.in, c.r, h + k * c.r);
        Bs[k] = all[k];
    }
    T* y = c.y + at * c.out;
    const auto on = [&](int vectors) { for (int k = 0; k < num; k++) Bs[k] += vectors * WIDTH; };
    int64_t i = 0;
    for (; i + AT_ONCE * WIDTH <= c.out; i += AT_ONCE * WIDTH, on(AT_ONCE))
        up<T, TB, N, AT_ONCE>(h, Bs, num, c.r, apart, y + i, c.out);
    for (; i + WIDTH <= c.out; i += WIDTH, on(1)) up<T, TB, N, 1>(h, Bs, num, c.r, apart, y + i, c.out);
    if (i == c.out) return;
    for (int p = 0; p < N; p++) {
        Floats sums = load_some(y + p * c.out + i, c.out - i);
        for (int k = 0; k < num; k++)
            for (int64_t j = 0; j < c.r; j++)
                sums += h[p * MOST + k * c.r + j] * load_some(Bs[k] + j * apart, c.out - i);
        store_some(y + p * c.out + i, sums, c.out - i);
    }
}

template <typename T, typename TB>
void stretch(const Call<T>& c, const int32_t* from, const int32_t* lanes, const float* weights, const TB* const* Bs,
             int64_t apart) {
    const int num = from[3] - from[2];
    int64_t at = from[0];
    for (; at + POSITIONS <= from[1]; at += POSITIONS) block<T, TB, POSITIONS>(c, at, lanes, weights, Bs, num, apart);
    if (at + 2 <= from[1]) { block<T, TB, 2>(c, at, lanes, weights, Bs, num, apart); at += 2; }
    if (at < from[1]) block<T, TB, 1>(c, at, lanes, weights, Bs, num, apart);
}

// A tile of at most 16 rows and columns of a matrix, transposed.
template <typename T>
void transpose_tile(const T* from, float* to, int64_t columns, int64_t apart, int64_t high, int64_t wide) {
    Floats v[WIDTH] = {};
    for (int64_t k = 0; k < high; k++) v[k] = load_some(from + k * columns, wide);
    transpose(v);
    for (int64_t k = 0; k < wide; k++) store_some(to + k * apart, v[k], high);
}

// One of 16 rows and WIDE columns.
template <int WIDE, typename T> void transpose_tile(const T* from, float* to, int64_t columns, int64_t apart) {
    Floats v[WIDTH];
    for (int k = 0; k < WIDTH; k++) v[k] = WIDE == WIDTH ? load(from + k * columns) : load_some(from + k * columns, WIDE);
    transpose(v);
    for (int k = 0; k < WIDE; k++) store(to + k * apart, v[k]);
}

// to (columns, rows), whose rows are `apart`, = the transpose of from (rows, columns).
template <typename T> void transpose(const T* from, float* to, int64_t rows, int64_t columns, int64_t apart) {
    for (int64_t i = 0; i < rows; i += WIDTH)
        for (int64_t j = 0; j < columns; j += WIDTH) {
            const int64_t high = rows - i < WIDTH ? rows - i : WIDTH, wide = columns - j < WIDTH ? columns - j : WIDTH;
            const T* source = from + i * columns + j;
            float* goal = to + j * apart + i;
            if (high == WIDTH && wide == WIDTH) transpose_tile<WIDTH>(source, goal, columns, apart);
            else if (high == WIDTH && wide == WIDTH / 2) transpose_tile<WIDTH / 2>(source, goal, columns, apart);
            else transpose_tile(source, goal, columns, apart, high, wide);
        }
}

// A stretch is (its first position, the one behind its last, its first place in `lanes`, the one behind its last).
template <typename T>
void add(const Call<T>& c, const int32_t* stretches, int64_t num_stretches, const int32_t* lanes, const float* weights) {
    const T* Bs[MOST];
    for (int64_t s = 0; s < num_stretches; s++) {
        const int32_t* from = stretches + 4 * s;
        const int32_t* own = lanes + from[2];
        for (int k = 0; k < from[3] - from[2]; k++) {
            Bs[k] = c.B + own[k] * c.r * c.out;
            fetch(Bs[k], c.r * c.out);
        }
        if (s + 1 < num_stretches)
            for (int k = from[6]; k < from[7]; k++) fetch(c.A + lanes[k] * c.r * c.in, c.r * c.in);
        stretch<T, T>(c, from, own, weights + from[2], Bs, c.out);
    }
}

// As above for B (lanes, out, r), where one lane serves a stretch: it is transposed into `turned`, for all neighbouring
// stretches of the lane. A row there is longer by a vector: those a power of two apart would share a processor's cache.
template <typename T>
void add_across(const Call<T>& c, const int32_t* stretches, int64_t num_stretches, const int32_t* lanes,
                const float* weights, float* turned) {
    const int64_t apart = c.out + WIDTH;
    const float* B = turned;
    int32_t last = -1;
    for (int64_t s = 0; s < num_stretches; s++) {
        const int32_t* from = stretches + 4 * s;
        const int32_t lane = lanes[from[2]];
        if (lane != last) transpose(c.B + lane * c.r * c.out, turned, c.out, c.r, apart);
        last = lane;
        stretch<T, float>(c, from, lanes + from[2], weights + from[2], &B, apart);
    }
}

template <typename T>
void add_any(const Call<T>& c, const int32_t* stretches, int64_t num, const int32_t* lanes, const float* weights,
             float* turned) {
    if (turned) add_across(c, stretches, num, lanes, weights, turned);
    else add(c, stretches, num, lanes, weights);
}

}  // namespace

extern "C" void add_float32(const float* x, const float* A, const float* B, float* y, int64_t in, int64_t out, int64_t r,
                            const int32_t* stretches, int64_t num, const int32_t* lanes, const float* weights,
                            float* turned) {
    add_any<float>({x, A, B, y, in, out, r}, stretches, num, lanes, weights, turned);
}

extern "C" void add_bfloat16(const bfloat16* x, const bfloat16* A, const bfloat16* B, bfloat16* y, int64_t in,
                             int64_t out, int64_t r, const int32_t* stretches, int64_t num, const int32_t* lanes,
                             const float* weights, float* turned) {
    add_any<bfloat16>({x, A, B, y, in, out, r}, stretches, num, lanes, weights, turned);
}
