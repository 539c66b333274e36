// The two loops over the entries of ΔW, fused, for float32 and bfloat16 on a CPU. See cpu.py for how they are called.
//
// Nothing here needs the C++ runtime at link time: a compiler driver that leaves it out (CXX=gcc) will do.
//
// A table of ψ or ψ' is read as lines of 4 floats, one per cell: the coefficients of a cubic in t. Sums of moments are
// laid out like it, so that both are indexed alike. Rows are dealt to threads in contiguous shares: results do not depend
// on timing.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LINE = 4;                      // floats: the coefficients of a cell's cubic, or the moments of a bin
constexpr int CELLS_PER_BIN = 4;             // as in table.py
constexpr int BANKS = 2;                     // of sums: neighbours often share a cell, and would wait for each other
constexpr int64_t CHUNK = 256;               // entries of a row handled at a time, in the first-level cache
constexpr int64_t FLUSH_ENTRIES = 1 << 18;   // float32 sums of at most so many terms are added up in float64

// Vectors that any float array can be read as. A CPU with wider or narrower ones splits or joins them.
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t Places __attribute__((vector_size(16), aligned(4), may_alias));
typedef float Sixteen __attribute__((vector_size(64), aligned(4), may_alias));

#if defined(__clang__)
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t Order __attribute__((vector_size(16)));
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, Order{i, j, k, l})
#endif

inline Four& four(float* place) { return *reinterpret_cast<Four*>(place); }
inline const Four& four(const float* place) { return *reinterpret_cast<const Four*>(place); }
inline const Places& places(const int32_t* place) { return *reinterpret_cast<const Places*>(place); }
inline const Sixteen& sixteen(const float* place) { return *reinterpret_cast<const Sixteen*>(place); }

inline void transpose(Four& a, Four& b, Four& c, Four& d) {
    const Four ab01 = SHUFFLE(a, b, 0, 4, 1, 5), ab23 = SHUFFLE(a, b, 2, 6, 3, 7);
    const Four cd01 = SHUFFLE(c, d, 0, 4, 1, 5), cd23 = SHUFFLE(c, d, 2, 6, 3, 7);
    a = SHUFFLE(ab01, cd01, 0, 1, 4, 5);
    b = SHUFFLE(ab01, cd01, 2, 3, 6, 7);
    c = SHUFFLE(ab23, cd23, 0, 1, 4, 5);
    d = SHUFFLE(ab23, cd23, 2, 3, 6, 7);
}

// std::fma is a slow library call where the CPU has no such instruction; the compiler contracts this where it has.
inline float multiply_add(float a, float b, float c) { return a * b + c; }

struct Phi {
    const float* table;      // (2 * side, LINE): of ψ for the weight, of ψ' for the gradient
    int32_t side;            // cells on each side of 0
    float cells_per_unit;
    float backbone;          // φ(z) = backbone * z + ψ(z)
    float clip;              // where |z| is larger, ψ' is 0; infinite unless ψ is clipped
    float gain;              // z = gain * (BA)
    float scaling;           // s
};

// z[j] = gain * sum_k b[k] * A[k][j]
inline void product(float* z, const float* b, const float* A, int64_t r, int64_t stride, int64_t count, float gain) {
    for (int64_t j = 0; j < count; ++j) z[j] = 0;
    for (int64_t k = 0; k < r; ++k) {
        const float factor = b[k];
        const float* a = A + k * stride;
        for (int64_t j = 0; j < count; ++j) z[j] = multiply_add(factor, a[j], z[j]);
    }
    for (int64_t j = 0; j < count; ++j) z[j] *= gain;
}

// bfloat16 is the upper half of a float32. To the nearest, and of two equally near to the even one; NaN stays NaN.
inline void store_bfloat16(uint16_t* out, const float* values, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
        uint32_t bits;
        std::memcpy(&bits, values + j, sizeof bits);
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        out[j] = static_cast<uint16_t>(values[j] != values[j] ? 0x7fc0 : rounded);
    }
}

inline void load_bfloat16(float* out, const uint16_t* values, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
        const uint32_t bits = static_cast<uint32_t>(values[j]) << 16;
        std::memcpy(out + j, &bits, sizeof bits);
    }
}

// The cell of each z and the place t in [0, 1] inside it. A NaN gets a valid cell, and t = NaN.
inline void locate(int32_t* cell, float* t, const float* z, int64_t count, const Phi& phi) {
    const float side = static_cast<float>(phi.side);
    for (int64_t j = 0; j < count; ++j) {
        float u = z[j] * phi.cells_per_unit;
        u = u > side ? side : u;
        u = u < -side ? -side : u;
        float floor = std::floor(u);
        floor = floor > side - 1 ? side - 1 : floor;
        t[j] = u - floor;
        const float index = floor >= -side ? floor : -side;
        cell[j] = (static_cast<int32_t>(index) + phi.side) * LINE;
    }
}

// value[j] = the cubic of cell[j] at t[j]. Four lines are loaded and transposed, which beats gathering their parts.
inline void read_table(float* value, const float* table, const int32_t* cell, const float* t, int64_t count) {
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {
        Four c0 = four(table + cell[j]), c1 = four(table + cell[j + 1]);
        Four c2 = four(table + cell[j + 2]), c3 = four(table + cell[j + 3]);
        transpose(c0, c1, c2, c3);
        four(value + j) = ((c3 * four(t + j) + c2) * four(t + j) + c1) * four(t + j) + c0;
    }
    for (; j < count; ++j) {
        const float* c = table + cell[j];
        value[j] = multiply_add(multiply_add(multiply_add(c[3], t[j], c[2]), t[j], c[1]), t[j], c[0]);
    }
}

// To the sums (LINE) of the bin of cell[j], in one of the banks, adds term * (1, u, u², u³) with term = scale * g[j] and
// u in [-1/2, 1/2] the place inside the bin.
inline void add_moments(float* sums, int64_t bank, const int32_t* cell, const float* t, const float* g, int64_t count,
                        float scale) {
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {
        const Places index = places(cell + j) / LINE;
        const Places bin = index / CELLS_PER_BIN * LINE;
        const Four within = __builtin_convertvector(index % CELLS_PER_BIN, Four);
        const Four u = (within + four(t + j)) * (1.0f / CELLS_PER_BIN) - 0.5f;
        Four m0 = four(g + j) * scale, m1 = m0 * u, m2 = m1 * u, m3 = m2 * u;
        transpose(m0, m1, m2, m3);
        four(sums + bin[0]) += m0;
        four(sums + bank + bin[1]) += m1;
        four(sums + bin[2]) += m2;
        four(sums + bank + bin[3]) += m3;
    }
    for (; j < count; ++j) {
        const uint32_t index = static_cast<uint32_t>(cell[j]) / LINE;
        const float u = (index % CELLS_PER_BIN + t[j]) * (1.0f / CELLS_PER_BIN) - 0.5f, term = scale * g[j];
        four(sums + index / CELLS_PER_BIN * LINE) += Four{term, term * u, term * u * u, term * u * u * u};
    }
}

// sum_j h[j] * a[j]; and out[j] += factor * h[j].
inline float dot_and_add(float* out, const float* h, const float* a, float factor, int64_t count) {
    Sixteen sums{};
    int64_t j = 0;
    for (; j + 16 <= count; j += 16) sums += sixteen(h + j) * sixteen(a + j);
    float sum = 0;
    for (int lane = 0; lane < 16; ++lane) sum += sums[lane];
    for (; j < count; ++j) sum = multiply_add(h[j], a[j], sum);
    for (j = 0; j < count; ++j) out[j] = multiply_add(factor, h[j], out[j]);
    return sum;
}

}  // namespace

extern "C" {

// out (m, n) = weight + (s/g) * φ(g * B A); weight may be null. Rows of A are `n` apart, rows of B `r`. `out` and `weight`
// are float32, or bfloat16.
void lrlora_effective_weight(void* out, const void* weight, const float* A, const float* B, int64_t m, int64_t n,
                             int64_t r, Phi phi, int32_t threads, int32_t is_bfloat16) {
    const float output_scale = phi.scaling / phi.gain;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < m; ++i) {
        float z[CHUNK], t[CHUNK], psi[CHUNK], widened[CHUNK];
        int32_t cell[CHUNK];
        for (int64_t start = 0; start < n; start += CHUNK) {
            const int64_t count = std::min(CHUNK, n - start);
            product(z, B + i * r, A + start, r, n, count, phi.gain);
            locate(cell, t, z, count, phi);
            read_table(psi, phi.table, cell, t, count);
            float* o = is_bfloat16 ? t : static_cast<float*>(out) + i * n + start;
            if (weight) {
                const float* w = is_bfloat16 ? widened : static_cast<const float*>(weight) + i * n + start;
                if (is_bfloat16) load_bfloat16(widened, static_cast<const uint16_t*>(weight) + i * n + start, count);
                for (int64_t j = 0; j < count; ++j)
                    o[j] = multiply_add(output_scale, multiply_add(phi.backbone, z[j], psi[j]), w[j]);
            } else {
                for (int64_t j = 0; j < count; ++j) o[j] = output_scale * multiply_add(phi.backbone, z[j], psi[j]);
            }
            if (is_bfloat16) store_bfloat16(static_cast<uint16_t*>(out) + i * n + start, o, count);
        }
    }
}

// With H = s * φ'(g * B A) ∘ G, G in float32 or bfloat16: grad_B (m, r) = H Aᵀ, and grad_A (threads, r, n), zero before,
// is each thread's share of Bᵀ H. `sums` (threads, BANKS, bins, LINE), zero before, is working memory. Adds to
// moments (threads, bins, LINE), per bin of CELLS_PER_BIN cells, the sums of (s/g) * G * u^p, p = 0 ... 3, where u, in
// [-1/2, 1/2], is the distance from the middle of the bin.
void lrlora_gradient(const void* G, const float* A, const float* B, float* grad_A, float* grad_B, double* moments,
                     float* sums, int64_t m, int64_t n, int64_t r, Phi phi, int32_t threads, int32_t is_bfloat16) {
    const int64_t bins = int64_t{2} * phi.side / CELLS_PER_BIN * LINE;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int32_t thread = 0; thread < threads; ++thread) {
        const int64_t first = m * thread / threads, last = m * (thread + 1) / threads;
        float* own = sums + thread * BANKS * bins;
        double* total = moments + thread * bins;
        int64_t pending = 0;
        // Columns outside, rows inside: A and grad_A of a chunk stay in the first-level cache.
        for (int64_t start = 0; start < n; start += CHUNK) {
            const int64_t count = std::min(CHUNK, n - start);
            const float* a = A + start;
            float* grad_a = grad_A + thread * r * n + start;
            for (int64_t i = first; i < last; ++i) {
                float z[CHUNK], t[CHUNK], h[CHUNK], widened[CHUNK];
                int32_t cell[CHUNK];
                const float* b = B + i * r;
                const float* g = is_bfloat16 ? widened : static_cast<const float*>(G) + i * n + start;
                if (is_bfloat16) load_bfloat16(widened, static_cast<const uint16_t*>(G) + i * n + start, count);
                product(z, b, a, r, n, count, phi.gain);
                locate(cell, t, z, count, phi);
                read_table(h, phi.table, cell, t, count);
                for (int64_t j = 0; j < count; ++j)
                    h[j] = phi.scaling * g[j] * (phi.backbone + (std::fabs(z[j]) > phi.clip ? 0.0f : h[j]));
                add_moments(own, bins, cell, t, g, count, phi.scaling / phi.gain);
                for (int64_t k = 0; k < r; ++k) {
                    const float part = dot_and_add(grad_a + k * n, h, a + k * n, b[k], count);
                    grad_B[i * r + k] = start ? grad_B[i * r + k] + part : part;
                }
                pending += count;
                if (pending >= FLUSH_ENTRIES || (i + 1 == last && start + count == n)) {
                    for (int64_t bank = 0; bank < BANKS; ++bank)
                        for (int64_t k = 0; k < bins; ++k) total[k] += own[bank * bins + k];
                    std::fill(own, own + BANKS * bins, 0.0f);
                    pending = 0;
                }
            }
        }
    }
}

}  // extern "C"
