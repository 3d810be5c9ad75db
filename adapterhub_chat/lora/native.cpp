// Products of a decoding step on a CPU: small ones, for which calls into a general library cost more than
// the work. Every function reads each weight once and sums in float. T is float or bfloat16.
//
// A row's result does not depend on the rows beside it: whatever is decoded together, sums run in one order.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

extern "C" {

// A site's place in a slot: where A (members * rank, in) and each member's B (rank, out) begin, in numbers.
struct Site {
    int64_t members, rank, in, out, a_at;
    const int64_t *b_at, *outs;
};

// Who has which slot: entries (row, weight) in groups of one slot; `low` has room for every entry's A x.
struct Entries {
    int64_t groups;
    const void *const *slots;
    const int64_t *starts, *rows;
    const float *weights;
    float *low;
};

// One decoding step: each row's new token stands at `positions`; cos and sin (rows, width) belong to it.
struct Step {
    int64_t rows, heads, kv_heads, width, capacity;
    float scale;
    const float *cos, *sin;
    const int64_t *positions;
    float *scores;  // (rows, heads, capacity)
};
}

#include "native_tiles.h"

namespace {

struct bf16 {
    uint16_t bits;
};

inline float get(float x) { return x; }
inline float get(bf16 x) {
    uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
    float y;
    std::memcpy(&y, &wide, 4);
    return y;
}
inline void put(float *at, float x) { *at = x; }
inline void put(bf16 *at, float x) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    at->bits = static_cast<uint16_t>((wide & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Wide __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Narrow __attribute__((vector_size(32)));

constexpr int LANES = 16;

inline Lanes get_lanes(const float *at) {
    Lanes lanes;
    std::memcpy(&lanes, at, sizeof lanes);
    return lanes;
}
inline Lanes get_lanes(const bf16 *at) {
    Narrow narrow;
    std::memcpy(&narrow, at, sizeof narrow);
    return (Lanes)(__builtin_convertvector(narrow, Wide) << 16);
}

inline void put_lanes(float *at, Lanes x) { std::memcpy(at, &x, sizeof x); }
inline void put_lanes(bf16 *at, Lanes x) {
    const Wide wide = (Wide)x;
    const Wide rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    const Wide nan = (Wide)((wide & 0x7fffffff) > 0x7f800000);
    const Narrow narrow = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Narrow);
    std::memcpy(at, &narrow, sizeof narrow);
}

// exp by powers of two (Cody and Waite) and a polynomial, good to 2e-7 of the value; as small as at -87 below it.
inline Lanes fast_exp(Lanes x) {
    const Lanes low = x - x - 87.0f, high = x - x + 88.0f;
    x = x < low ? low : (x > high ? high : x);
    const Lanes turns = x * 1.44269504f;
    const Ints whole = __builtin_convertvector(turns < 0 ? turns - 0.5f : turns + 0.5f, Ints);
    const Lanes n = __builtin_convertvector(whole, Lanes);
    const Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (Lanes)((whole + 127) << 23);
}

inline float fast_exp(float x) { return fast_exp(Lanes{} + x)[0]; }

template <typename T>
inline Lanes rounded(Lanes x) {
    T kept[LANES];
    put_lanes(kept, x);
    return get_lanes(kept);
}

inline float dot(const float *a, const float *b, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

inline float dot(const bf16 *a, const bf16 *b, int64_t n) {
    float sum = 0;
    int64_t i = 0;
#ifdef __AVX512BF16__
    __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
    for (; i + 64 <= n; i += 64) {
        first = _mm512_dpbf16_ps(first, (__m512bh)_mm512_loadu_si512(a + i), (__m512bh)_mm512_loadu_si512(b + i));
        second = _mm512_dpbf16_ps(second, (__m512bh)_mm512_loadu_si512(a + i + 32), (__m512bh)_mm512_loadu_si512(b + i + 32));
    }
    sum = _mm512_reduce_add_ps(_mm512_add_ps(first, second));
#endif
#pragma omp simd reduction(+ : sum)
    for (int64_t j = i; j < n; j++) sum += get(a[j]) * get(b[j]);
    return sum;
}

// Put an adapter's factors into a slot: each part is (from, to, rows, columns, turned), from and to as addresses.
// A (rank, in) is copied; B (out, rank) is turned to (rank, out) and scaled, rounded once. By one thread: another
// one hashes the adapter's file meanwhile, takes longer, and must not have to share its core.
template <typename T>
void fill(const int64_t *parts, const float *scales, int64_t count) {
    for (int64_t n = 0; n < count; n++) {
        const int64_t *part = parts + 5 * n, rows = part[2], columns = part[3];
        const T *from = reinterpret_cast<const T *>(part[0]);
        T *to = reinterpret_cast<T *>(part[1]);
        if (!part[4]) {
            std::memcpy(to, from, rows * columns * sizeof(T));
            continue;
        }
        for (int64_t first = 0; first < rows; first += 64)  // what is read stays near while it is turned
            for (int64_t r = 0; r < columns; r++) {
                const int64_t last = first + 64 < rows ? first + 64 : rows;
                for (int64_t o = first; o < last; o++) put(to + r * rows + o, scales[n] * get(from[o * columns + r]));
            }
    }
}

constexpr int TILE = 64;  // columns of an output that are held in registers
constexpr int SIDE = 4;   // rows that share one pass over a tile of B

// y[c][0 : width] += h[c] B for COUNT rows; B (rank, out) begins at the tile's first column.
template <typename T, int COUNT>
inline void expand(const float *const *h, T *const *y, const T *b, int64_t rank, int64_t out, int64_t width) {
    if (width == TILE) {
        Lanes sums[COUNT][TILE / LANES] = {};
        for (int64_t r = 0; r < rank; r++) {
            const T *row = b + r * out;
            __builtin_prefetch(row + 4 * TILE);
            __builtin_prefetch(row + 4 * TILE + TILE / 2);
#pragma GCC unroll 4
            for (int j = 0; j < TILE / LANES; j++) {
                const Lanes own = get_lanes(row + j * LANES);
#pragma GCC unroll 4
                for (int c = 0; c < COUNT; c++) sums[c][j] += h[c][r] * own;
            }
        }
        for (int c = 0; c < COUNT; c++)
            for (int j = 0; j < TILE; j += LANES) put_lanes(y[c] + j, get_lanes(y[c] + j) + sums[c][j / LANES]);
        return;
    }
    for (int c = 0; c < COUNT; c++)
        for (int64_t j = 0; j < width; j++) {
            float sum = 0;
            for (int64_t r = 0; r < rank; r++) sum += h[c][r] * get(b[r * out + j]);
            put(y[c] + j, get(y[c][j]) + sum);
        }
}

// Add to a tile of columns what the entries [first, last) of one slot give.
template <typename T>
inline void columns(T *y, int64_t stride, const T *b, int64_t from, int64_t out, int64_t rank, int64_t first,
                    int64_t last, const int64_t *rows, const float *h, int64_t h_stride) {
    const int64_t width = out - from < TILE ? out - from : TILE;
    for (int64_t e = first; e < last; e += SIDE) {
        const int64_t count = last - e < SIDE ? last - e : SIDE;
        const float *low[SIDE];
        T *to[SIDE];
        for (int64_t c = 0; c < count; c++) {
            low[c] = h + (e + c) * h_stride;
            to[c] = y + rows[e + c] * stride + from;
        }
        if (count == 1) expand<T, 1>(low, to, b + from, rank, out, width);
        if (count == 2) expand<T, 2>(low, to, b + from, rank, out, width);
        if (count == 3) expand<T, 3>(low, to, b + from, rank, out, width);
        if (count == 4) expand<T, 4>(low, to, b + from, rank, out, width);
    }
}

// y[row] += weight * B A x[row] for every entry; y's row holds the members' outputs side by side.
template <typename T>
void lora(const Site &site, const Entries &entries, const T *x, T *y) {
    const int64_t width = site.members * site.rank;
    float *h = entries.low;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < entries.groups * width; task++) {
            const int64_t g = task / width, k = task % width;
            const T *a = static_cast<const T *>(entries.slots[g]) + site.a_at + k * site.in;
            for (int64_t e = entries.starts[g]; e < entries.starts[g + 1]; e++)
                h[e * width + k] = entries.weights[e] * dot(x + entries.rows[e] * site.in, a, site.in);
        }
        // a thread keeps its columns for all entries: a row that mixes several slots is summed without a race
        const int64_t threads = omp_get_num_threads(), mine = omp_get_thread_num();
        for (int64_t g = 0; g < entries.groups; g++)
            for (int64_t m = 0, at = 0; m < site.members; at += site.outs[m++]) {
                const int64_t tiles = (site.outs[m] + TILE - 1) / TILE;
                const T *b = static_cast<const T *>(entries.slots[g]) + site.b_at[m];
                for (int64_t part = tiles * mine / threads; part < tiles * (mine + 1) / threads; part++)
                    columns(y + at, site.out, b, part * TILE, site.outs[m], site.rank, entries.starts[g],
                            entries.starts[g + 1], entries.rows, h + m * site.rank, width);
            }
    }
}

// x += delta (where there is one), then out = weight * (x / rms(x)), rounded where transformers rounds.
template <typename T>
void norm(T *x, const T *delta, const T *weight, T *out, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < rows; n++) {
        T *own = x + n * width;
        if (delta)
            for (int64_t i = 0; i < width; i++) put(own + i, get(own[i]) + get(delta[n * width + i]));
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) sum += get(own[i]) * get(own[i]);
        const float scale = 1.0f / std::sqrt(sum / width + eps);
        for (int64_t i = 0; i < width; i++) {
            T rounded;
            put(&rounded, get(own[i]) * scale);
            put(out + n * width + i, get(weight[i]) * get(rounded));
        }
    }
}

// out = silu(gate) * up, which lie side by side in a row.
template <typename T>
void silu(const T *both, T *out, int64_t rows, int64_t width) {
    const int64_t parts = (width + 255) / 256;
#pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < rows * parts; task++) {
        const int64_t n = task / parts, from = task % parts * 256, end = from + 256 < width ? from + 256 : width;
        const T *gate = both + 2 * n * width, *up = gate + width;
        int64_t i = from;
        for (; i + LANES <= end; i += LANES) {
            const Lanes g = get_lanes(gate + i);
            put_lanes(out + n * width + i, rounded<T>(g / (1.0f + fast_exp(-g))) * get_lanes(up + i));
        }
        for (; i < end; i++) {
            const float g = get(gate[i]);
            T one;
            put(&one, g / (1.0f + fast_exp(-g)));
            put(out + n * width + i, get(one) * get(up[i]));
        }
    }
}

template <typename T>
inline void rotate(const T *x, const float *cos, const float *sin, T *out, int64_t width) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = get(x[i]), b = get(x[i + half]);
        put(out + i, a * cos[i] - b * sin[i]);
        put(out + i + half, b * cos[i + half] + a * sin[i + half]);
    }
}

constexpr int WIDEST = 256;  // of a head; WIDEST_HEAD in native.py

// Turn q and k by their positions, put k and v into the cache, attend to all that is there. `qkv`'s rows
// hold the heads of q, k and v side by side; keys and values are (rows, kv_heads, capacity, width).
template <typename T>
void attend(const Step &step, const T *qkv, T *keys, T *values, T *out) {
    const int64_t width = step.width, group = step.heads / step.kv_heads;
    const int64_t stride = (step.heads + 2 * step.kv_heads) * width;
#pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < step.rows * step.kv_heads; task++) {
        const int64_t n = task / step.kv_heads, j = task % step.kv_heads;
        const int64_t at = step.positions[n], length = at + 1;
        const float *cos = step.cos + n * width, *sin = step.sin + n * width;
        const T *q = qkv + n * stride, *k = q + (step.heads + j) * width, *v = k + step.kv_heads * width;
        T *own_keys = keys + task * step.capacity * width, *own_values = values + task * step.capacity * width;
        rotate(k, cos, sin, own_keys + at * width, width);
        std::memcpy(own_values + at * width, v, width * sizeof(T));
        for (int64_t h = j * group; h < (j + 1) * group; h++) {
            T turned[WIDEST];
            rotate(q + h * width, cos, sin, turned, width);
            float *p = step.scores + (n * step.heads + h) * step.capacity;
            float most = -INFINITY, total = 0, sums[WIDEST] = {};
            for (int64_t t = 0; t < length; t++) {
                p[t] = step.scale * dot(turned, own_keys + t * width, width);
                most = p[t] > most ? p[t] : most;
            }
            int64_t t = 0;
            for (; t + LANES <= length; t += LANES) put_lanes(p + t, fast_exp(get_lanes(p + t) - most));
            for (; t < length; t++) p[t] = fast_exp(p[t] - most);
            for (t = 0; t < length; t++) total += p[t];
            for (t = 0; t < length; t++) {
                const T *value = own_values + t * width;
#pragma omp simd
                for (int64_t i = 0; i < width; i++) sums[i] += p[t] * get(value[i]);
            }
            for (int64_t i = 0; i < width; i++) put(out + (n * step.heads + h) * width + i, sums[i] / total);
        }
    }
}

}  // namespace

#define FACES(T, NAME)                                                                                             \
    extern "C" void lora_##NAME(const Site *site, const Entries *entries, const T *x, T *y) {                      \
        lora(*site, *entries, x, y);                                                                               \
    }                                                                                                              \
    extern "C" void fill_##NAME(const int64_t *parts, const float *scales, int64_t count) {                        \
        fill<T>(parts, scales, count);                                                                             \
    }                                                                                                              \
    extern "C" void norm_##NAME(T *x, const T *delta, const T *weight, T *out, int64_t rows, int64_t width,        \
                                float eps) {                                                                       \
        norm(x, delta, weight, out, rows, width, eps);                                                             \
    }                                                                                                              \
    extern "C" void silu_##NAME(const T *both, T *out, int64_t rows, int64_t width) { silu(both, out, rows, width); } \
    extern "C" void attend_##NAME(const Step *step, const T *qkv, T *keys, T *values, T *out) {                    \
        attend(*step, qkv, keys, values, out);                                                                     \
    }

FACES(float, f32)
FACES(bf16, bf16)

// Whether the processor has matrix tiles, and the system lets this process use them.
extern "C" int has_tiles() {
#ifdef HAS_TILES
    return tiles::allowed();
#else
    return 0;
#endif
}

// lora_bf16 for many tokens of each slot; 0, with nothing done, where the shapes do not allow it.
extern "C" int lora_tiles(const Site *site, const Entries *entries, const void *x, void *y) {
#ifdef HAS_TILES
    if (!tiles::fit(*site)) return 0;
    tiles::lora(*site, *entries, static_cast<const uint16_t *>(x), static_cast<uint16_t *>(y));
    return 1;
#else
    return 0;
#endif
}
