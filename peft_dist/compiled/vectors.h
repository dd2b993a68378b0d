// Numbers side by side, as the loops of this folder read and write them.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int WIDTH = 16;  // numbers of a vector

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

// Asks for what is read next, where rows are too short for a processor to foresee.
template <typename T> inline void fetch(const T* from, int64_t num) {
    for (int64_t i = 0; i < num; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(from + i, 0, 2);
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

inline Floats picked(Floats a, Floats b, Signs places) {
#ifdef __clang__
    Floats v;
    for (int i = 0; i < WIDTH; i++) v[i] = places[i] < WIDTH ? a[places[i]] : b[places[i] - WIDTH];
    return v;
#else
    return __builtin_shuffle(a, b, places);
#endif
}

// Of two vectors the pieces of SIZE numbers that stand at even places, and those at odd ones.
template <int SIZE> inline Signs even() {
    Signs places;
    for (int i = 0; i < WIDTH; i++) places[i] = i / SIZE * 2 * SIZE + i % SIZE;
    return places;
}

template <int SIZE> inline void add_neighbours(const Floats* from, Floats* to, int num) {
    const Signs first = even<SIZE>(), second = first + SIZE;
    for (int i = 0; i < num; i++)
        to[i] = picked(from[2 * i], from[2 * i + 1], first) + picked(from[2 * i], from[2 * i + 1], second);
}

// `sum` of each of 16 vectors, to the bit.
inline Floats sums_of(const Floats* v) {
    Floats eight[8], four[4], two[2], one;
    add_neighbours<8>(v, eight, 8);
    add_neighbours<4>(eight, four, 4);
    add_neighbours<2>(four, two, 2);
    add_neighbours<1>(two, &one, 1);
    return one;
}

template <int SIZE> inline void exchange(Floats* v) {
    Signs upper, lower;
    for (int i = 0; i < WIDTH; i++) {
        upper[i] = i / SIZE % 2 ? WIDTH + i - SIZE : i;
        lower[i] = i / SIZE % 2 ? WIDTH + i : i + SIZE;
    }
    for (int i = 0; i < WIDTH; i++)
        if (i / SIZE % 2 == 0) {
            const Floats a = v[i], b = v[i + SIZE];
            v[i] = picked(a, b, upper);
            v[i + SIZE] = picked(a, b, lower);
        }
}

// The transpose of 16 vectors, in place.
inline void transpose(Floats* v) {
    exchange<8>(v);
    exchange<4>(v);
    exchange<2>(v);
    exchange<1>(v);
}

}  // namespace
