// y += w (x A^T) B for neighbouring positions that the same adapters serve, as `peft_dist/lane_products.py` says.
//
// The products of a decoding step are so small that a library's fixed price for each of them is most of their cost.
// Sums are in single precision, in an order that does not depend on the other positions of the call.

#include <cstdint>
#include <cstring>

namespace {

constexpr int WIDTH = 16;     // numbers of a vector
constexpr int POSITIONS = 4;  // positions at a time, which share what is read of A and B
constexpr int RANKS = 4;      // rows of A at a time
constexpr int MOST = 256;     // ranks of all adapters of a position together; the caller sees to it

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Signs __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef float Half __attribute__((vector_size(2 * WIDTH)));
typedef float Quarter __attribute__((vector_size(WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

struct bfloat16 { uint16_t bits; };

inline Floats load(const float* from) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline Floats load(const bfloat16* from) {
    Halves half;
    std::memcpy(&half, from, sizeof half);
    return (Floats)(__builtin_convertvector(half, Words) << 16);
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

// To the nearest, ties to even; what is not a number stays so.
inline void store(bfloat16* to, Floats v) {
    const Words bits = (Words)v, is_nan = (Words)(Signs)(v != v);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Halves half = __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), Halves);
    std::memcpy(to, &half, sizeof half);
}

// What is left of a row behind its last whole vector.
template <typename T> inline Floats load_some(const T* from, int64_t num) {
    T whole[WIDTH] = {};
    std::memcpy(whole, from, num * sizeof(T));
    return load(whole);
}

template <typename T> inline void store_some(T* to, Floats v, int64_t num) {
    T whole[WIDTH];
    store(whole, v);
    std::memcpy(to, whole, num * sizeof(T));
}

inline float sum(Floats v) {
    Half halves[2];
    std::memcpy(halves, &v, sizeof v);
    const Half half = halves[0] + halves[1];
    Quarter quarters[2];
    std::memcpy(quarters, &half, sizeof half);
    const Quarter q = quarters[0] + quarters[1];
    return (q[0] + q[2]) + (q[1] + q[3]);
}

// h[p][j] = w x[p] . A[j], for N positions and the r rows of one adapter's A.
template <typename T, int N>
void down(const T* x, const T* A, float w, int64_t in, int64_t r, float (*h)[MOST]) {
    const int64_t whole = in - in % WIDTH;
    for (int64_t j = 0; j < r; j += RANKS) {
        Floats sums[N][RANKS] = {};
        for (int64_t i = 0; i < whole; i += WIDTH) {
            Floats a[RANKS];
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
        for (int p = 0; p < N; p++)
            for (int q = 0; q < RANKS; q++) h[p][j + q] = w * sum(sums[p][q]);
    }
}

template <typename T> struct Call {
    const T *x, *A, *B;
    T* y;
    int64_t in, out, r;
};

// y += h B for N positions and U vectors of columns from i on.
template <typename T, int N, int U>
inline void up(const Call<T>& c, T* y, int64_t i, const int32_t* lanes, int num, const float (*h)[MOST]) {
    Floats sums[N][U];
    for (int p = 0; p < N; p++)
        for (int u = 0; u < U; u++) sums[p][u] = load(y + p * c.out + i + u * WIDTH);
    for (int k = 0; k < num; k++) {
        const T* B = c.B + lanes[k] * c.r * c.out + i;
        for (int64_t j = 0; j < c.r; j++)
            for (int u = 0; u < U; u++) {
                const Floats b = load(B + j * c.out + u * WIDTH);
                for (int p = 0; p < N; p++) sums[p][u] += h[p][k * c.r + j] * b;
            }
    }
    for (int p = 0; p < N; p++)
        for (int u = 0; u < U; u++) store(y + p * c.out + i + u * WIDTH, sums[p][u]);
}

// N positions from `at` on, which `num` lanes serve.
template <typename T, int N>
void block(const Call<T>& c, int64_t at, const int32_t* lanes, const float* weights, int num) {
    constexpr int AT_ONCE = 8 / N;  // so many sums are under way that none waits for itself
    float h[N][MOST];
    for (int k = 0; k < num; k++)
        down<T, N>(c.x + at * c.in, c.A + lanes[k] * c.r * c.in, weights[k], c.in, c.r,
                   (float (*)[MOST])(&h[0][k * c.r]));
    T* y = c.y + at * c.out;
    int64_t i = 0;
    for (; i + AT_ONCE * WIDTH <= c.out; i += AT_ONCE * WIDTH) up<T, N, AT_ONCE>(c, y, i, lanes, num, h);
    for (; i + WIDTH <= c.out; i += WIDTH) up<T, N, 1>(c, y, i, lanes, num, h);
    if (i == c.out) return;
    for (int p = 0; p < N; p++) {
        Floats sums = load_some(y + p * c.out + i, c.out - i);
        for (int k = 0; k < num; k++)
            for (int64_t j = 0; j < c.r; j++)
                sums += h[p][k * c.r + j] * load_some(c.B + (lanes[k] * c.r + j) * c.out + i, c.out - i);
        store_some(y + p * c.out + i, sums, c.out - i);
    }
}

// Asks for what is read next: rows of A and B are too short for a processor to foresee.
template <typename T> inline void fetch(const T* from, int64_t num) {
    for (int64_t i = 0; i < num; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(from + i, 0, 2);
}

// A stretch is (its first position, the one behind its last, its first place in `lanes`, the one behind its last).
template <typename T>
void add(const Call<T>& c, const int32_t* stretches, int64_t num_stretches, const int32_t* lanes, const float* weights) {
    for (int64_t s = 0; s < num_stretches; s++) {
        const int32_t *stretch = stretches + 4 * s, *own = lanes + stretch[2];
        const float* w = weights + stretch[2];
        const int num = stretch[3] - stretch[2];
        for (int k = 0; k < num; k++) fetch(c.B + own[k] * c.r * c.out, c.r * c.out);
        if (s + 1 < num_stretches)
            for (int k = stretch[6]; k < stretch[7]; k++) fetch(c.A + lanes[k] * c.r * c.in, c.r * c.in);
        int64_t at = stretch[0];
        for (; at + POSITIONS <= stretch[1]; at += POSITIONS) block<T, POSITIONS>(c, at, own, w, num);
        if (at + 2 <= stretch[1]) { block<T, 2>(c, at, own, w, num); at += 2; }
        if (at < stretch[1]) block<T, 1>(c, at, own, w, num);
    }
}

}  // namespace

extern "C" void add_float32(const float* x, const float* A, const float* B, float* y, int64_t in, int64_t out, int64_t r,
                            const int32_t* stretches, int64_t num, const int32_t* lanes, const float* weights) {
    add<float>({x, A, B, y, in, out, r}, stretches, num, lanes, weights);
}

extern "C" void add_bfloat16(const bfloat16* x, const bfloat16* A, const bfloat16* B, bfloat16* y, int64_t in,
                             int64_t out, int64_t r, const int32_t* stretches, int64_t num, const int32_t* lanes,
                             const float* weights) {
    add<bfloat16>({x, A, B, y, in, out, r}, stretches, num, lanes, weights);
}
