// The update y += weight * B A x for many tokens of one adapter, by the processor's matrix tiles (AMX, bf16).
//
// A block of 16 tokens goes through A and B while it is in the nearest cache; A and B are laid out in pairs for
// the tiles once a call. As torch's products do, A x is rounded to bf16 before B.

#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

#define HAS_TILES 1

namespace tiles {

constexpr int64_t SIDE = 16;  // rows of a tile, and its columns in float
constexpr int64_t DEEP = 32;  // numbers that one product sums up

// Ask the system for the tiles' registers; a process has to.
inline bool allowed() {
    constexpr int request = 0x1023, data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, request, data) == 0;
    return granted;
}

struct alignas(64) Shape {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
    void set(int tile, int64_t height, int64_t width) { rows[tile] = height, bytes[tile] = width; }
};

// Tiles 0 to 3 sum up; 4 x 5 is a part of A x, 6 x 7 one of B h.
inline void configure(int64_t rank) {
    const int64_t deep = rank < DEEP ? rank : DEEP;
    Shape shape;
    for (int tile = 0; tile < 6; tile++) shape.set(tile, SIDE, 64);
    shape.set(6, SIDE, 2 * deep);
    shape.set(7, deep / 2, 64);
    _tile_loadconfig(&shape);
}

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline bool fit(const Site &site) {
    bool good = allowed() && site.in % DEEP == 0 && site.rank % 2 == 0 && (site.rank <= DEEP || site.rank % DEEP == 0);
    for (int64_t m = 0; m < site.members; m++) good = good && site.outs[m] % SIDE == 0;
    return good;
}

// A (wide, in) -> pairs [in / 2][padded], 32 bits each: what stands side by side is summed up by one product.
inline void pair_a(const uint16_t *a, int64_t wide, int64_t padded, int64_t in, uint32_t *to, int64_t from, int64_t end) {
    for (int64_t k = from; k < end; k++) {
        for (int64_t n = 0; n < wide; n++) std::memcpy(to + k * padded + n, a + n * in + 2 * k, 4);
        for (int64_t n = wide; n < padded; n++) to[k * padded + n] = 0;
    }
}

// B (rank, out) -> pairs [rank / 2][out].
inline void pair_b(const uint16_t *b, int64_t rank, int64_t out, uint32_t *to) {
    for (int64_t r = 0; r < rank; r += 2)
        for (int64_t n = 0; n < out; n++)
            to[r / 2 * out + n] = b[r * out + n] | static_cast<uint32_t>(b[(r + 1) * out + n]) << 16;
}

// h (16, padded) = weight * x A for 16 tokens; x's rows are `stride` numbers apart.
inline void shrink(const uint16_t *x, int64_t stride, const uint32_t *a, int64_t in, int64_t padded, const float *weights,
                   int64_t count, uint16_t *h) {
    alignas(64) float sums[SIDE * SIDE];
    for (int64_t n = 0; n < padded; n += 2 * SIDE) {
        const bool two = n + SIDE < padded;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t k = 0; k < in; k += DEEP) {
            _tile_loadd(4, x + k, 2 * stride);
            _tile_loadd(5, a + k / 2 * padded + n, 4 * padded);
            _tile_dpbf16ps(0, 4, 5);
            if (two) {
                _tile_loadd(5, a + k / 2 * padded + n + SIDE, 4 * padded);
                _tile_dpbf16ps(1, 4, 5);
            }
        }
        for (int part = 0; part < (two ? 2 : 1); part++) {
            if (part == 0) { _tile_stored(0, sums, 64); } else { _tile_stored(1, sums, 64); }
            for (int64_t t = 0; t < count; t++) {
                const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(sums + t * SIDE), _mm512_set1_ps(weights[t]));
                _mm256_storeu_si256((__m256i *)(h + t * padded + n + part * SIDE), (__m256i)_mm512_cvtneps_pbh(scaled));
            }
        }
    }
}

inline __m512 wide(const uint16_t *at) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16);
}

// y[t][0 : 16 * parts] += h B for 16 tokens and at most four tiles of columns.
inline void expand(const uint16_t *h, int64_t padded, const uint32_t *b, int64_t rank, int64_t out, int64_t parts,
                   uint16_t *const *y, int64_t from, int64_t count) {
    alignas(64) float sums[4][SIDE * SIDE];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t r = 0; r < rank; r += DEEP) {
        const uint32_t *own = b + r / 2 * out + from;
        _tile_loadd(6, h + r, 2 * padded);
        _tile_loadd(7, own, 4 * out);
        _tile_dpbf16ps(0, 6, 7);
        if (parts > 1) {
            _tile_loadd(7, own + SIDE, 4 * out);
            _tile_dpbf16ps(1, 6, 7);
        }
        if (parts > 2) {
            _tile_loadd(7, own + 2 * SIDE, 4 * out);
            _tile_dpbf16ps(2, 6, 7);
        }
        if (parts > 3) {
            _tile_loadd(7, own + 3 * SIDE, 4 * out);
            _tile_dpbf16ps(3, 6, 7);
        }
    }
    _tile_stored(0, sums[0], 64);
    if (parts > 1) { _tile_stored(1, sums[1], 64); }
    if (parts > 2) { _tile_stored(2, sums[2], 64); }
    if (parts > 3) { _tile_stored(3, sums[3], 64); }
    for (int64_t t = 0; t < count; t++)
        for (int64_t part = 0; part < parts; part++) {
            uint16_t *at = y[t] + from + part * SIDE;
            const __m512 sum = _mm512_add_ps(wide(at), _mm512_load_ps(sums[part] + t * SIDE));
            _mm256_storeu_si256((__m256i *)at, (__m256i)_mm512_cvtneps_pbh(sum));
        }
}

// One group's factors as pairs: A's, then each member's B.
struct Pairs {
    int64_t padded, a_size, size;
    explicit Pairs(const Site &site) : padded(up(site.members * site.rank, SIDE)) {
        a_size = site.in / 2 * padded;
        size = a_size + site.rank / 2 * site.out;
    }
};

// y[row] += weight * B A x[row] for every entry; rows that mix several slots take them one after another.
inline void lora(const Site &site, const Entries &entries, const uint16_t *x, uint16_t *y) {
    const Pairs shape(site);
    const int64_t wide = site.members * site.rank;
    thread_local std::vector<uint32_t> kept;
    if (static_cast<int64_t>(kept.size()) < entries.groups * shape.size) kept.resize(entries.groups * shape.size);
    uint32_t *pairs = kept.data();
#pragma omp parallel
    {
        configure(site.rank);
        std::vector<uint16_t> h(SIDE * shape.padded), copy(SIDE * site.in);
        constexpr int64_t pieces = 4;  // of a group's A
#pragma omp for schedule(static)
        for (int64_t task = 0; task < entries.groups * (pieces + site.members); task++) {
            const int64_t g = task / (pieces + site.members), part = task % (pieces + site.members);
            const uint16_t *slot = static_cast<const uint16_t *>(entries.slots[g]);
            uint32_t *own = pairs + g * shape.size;
            if (part < pieces) {
                const int64_t half = site.in / 2;
                pair_a(slot + site.a_at, wide, shape.padded, site.in, own, half * part / pieces, half * (part + 1) / pieces);
                continue;
            }
            own += shape.a_size;
            for (int64_t m = 0; m < part - pieces; m++) own += site.rank / 2 * site.outs[m];
            pair_b(slot + site.b_at[part - pieces], site.rank, site.outs[part - pieces], own);
        }
        for (int64_t g = 0; g < entries.groups; g++) {
            const int64_t first = entries.starts[g], last = entries.starts[g + 1];
            const uint32_t *own = pairs + g * shape.size;
#pragma omp for schedule(static)
            for (int64_t e = first; e < last; e += SIDE) {
                const int64_t count = last - e < SIDE ? last - e : SIDE, *rows = entries.rows + e;
                const uint16_t *tokens = x + rows[0] * site.in;
                if (count < SIDE || rows[SIDE - 1] - rows[0] != SIDE - 1) {  // ascending: these are not in a row
                    for (int64_t t = 0; t < count; t++)
                        std::memcpy(copy.data() + t * site.in, x + rows[t] * site.in, 2 * site.in);
                    tokens = copy.data();
                }
                shrink(tokens, site.in, own, site.in, shape.padded, entries.weights + e, count, h.data());
                const uint32_t *b = own + shape.a_size;
                uint16_t *to[SIDE];
                for (int64_t t = 0; t < count; t++) to[t] = y + rows[t] * site.out;
                for (int64_t m = 0; m < site.members; m++) {
                    const int64_t out = site.outs[m], tiles = out / SIDE;
                    for (int64_t n = 0; n < tiles; n += 4)
                        expand(h.data() + m * site.rank, shape.padded, b, site.rank, out, tiles - n < 4 ? tiles - n : 4, to,
                               n * SIDE, count);
                    b += site.rank / 2 * out;
                    for (int64_t t = 0; t < count; t++) to[t] += out;
                }
            }
        }
        _tile_release();
    }
}

}  // namespace tiles
#endif
