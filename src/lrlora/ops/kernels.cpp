// The two loops over the entries of ΔW, fused, for float32 on a CPU. See native.py for how they are called.
//
// A table of ψ or ψ' is read as lines of 4 floats, one per cell: the coefficients of a cubic in t. Rows are dealt to
// threads in contiguous shares: results do not depend on timing.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LINE = 4;
constexpr int MOMENTS = 4;                   // 3 and one unused
constexpr int64_t CHUNK = 256;               // entries of a row handled at a time, in the first-level cache
constexpr int64_t FLUSH_ENTRIES = 1 << 17;   // float32 sums of at most so many terms are added up in float64

typedef float Moments __attribute__((vector_size(MOMENTS * sizeof(float))));

// std::fma is a slow library call where the CPU has no such instruction; the compiler contracts this where it has.
inline float multiply_add(float a, float b, float c) { return a * b + c; }

enum Form { RESIDUAL = 0, SATURATING = 1 };

struct Phi {
    const float* table;      // (2 * side, LINE): of ψ for the weight, of ψ' for the gradient
    int32_t side;            // cells on each side of 0
    float cells_per_unit;
    int32_t form;
    float gain;              // z = gain * (BA)
    float scaling;           // s
};

// exp(x) for -80 <= x <= 0, to 2 units in the last place.
inline float exponential(float x) {
    const float k = std::nearbyint(x * 1.44269504f);
    const float f = multiply_add(k, -1.42860677e-6f, multiply_add(k, -0.693145752f, x));
    float p = 1.0f / 5040;
    p = multiply_add(p, f, 1.0f / 720);
    p = multiply_add(p, f, 1.0f / 120);
    p = multiply_add(p, f, 1.0f / 24);
    p = multiply_add(p, f, 1.0f / 6);
    p = multiply_add(p, f, 0.5f);
    p = multiply_add(p, f, 1.0f);
    p = multiply_add(p, f, 1.0f);
    const int32_t bits = (static_cast<int32_t>(k) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

// Near 0, (1 - e) / (1 + e) would lose its relative precision: there, the Taylor series to z^13.
inline float hyperbolic_tangent(float z) {
    const float a = std::fabs(z), q = z * z;
    const float e = exponential(-2 * (a > 20.0f ? 20.0f : a));
    const float far = std::copysign((1 - e) / (1 + e), z);
    float p = 21844.0f / 6081075;
    p = multiply_add(p, q, -1382.0f / 155925);
    p = multiply_add(p, q, 62.0f / 2835);
    p = multiply_add(p, q, -17.0f / 315);
    p = multiply_add(p, q, 2.0f / 15);
    p = multiply_add(p, q, -1.0f / 3);
    const float near = multiply_add(p * q, z, z);
    return a < 0.35f ? near : far;
}

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

inline float cubic(const float* c, float t) {
    return multiply_add(multiply_add(multiply_add(c[3], t, c[2]), t, c[1]), t, c[0]);
}

}  // namespace

extern "C" {

// out (m, n) = weight + (s/g) * φ(g * B A); weight may be null. Rows of A are `n` apart, rows of B `r`.
void lrlora_effective_weight(float* out, const float* weight, const float* A, const float* B, int64_t m, int64_t n,
                             int64_t r, Phi phi, int32_t threads) {
    const float output_scale = phi.scaling / phi.gain;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < m; ++i) {
        float z[CHUNK], t[CHUNK], psi[CHUNK];
        int32_t cell[CHUNK];
        for (int64_t start = 0; start < n; start += CHUNK) {
            const int64_t count = std::min(CHUNK, n - start);
            product(z, B + i * r, A + start, r, n, count, phi.gain);
            locate(cell, t, z, count, phi);
            for (int64_t j = 0; j < count; ++j) psi[j] = cubic(phi.table + cell[j], t[j]);
            if (phi.form == SATURATING)
                for (int64_t j = 0; j < count; ++j) z[j] = hyperbolic_tangent(z[j]);
            float* o = out + i * n + start;
            if (weight) {
                const float* w = weight + i * n + start;
                for (int64_t j = 0; j < count; ++j) o[j] = multiply_add(output_scale, z[j] + psi[j], w[j]);
            } else {
                for (int64_t j = 0; j < count; ++j) o[j] = output_scale * (z[j] + psi[j]);
            }
        }
    }
}

// H (m, n) = s * φ'(g * B A) ∘ G, in place of G if H == G. Adds to moments (threads, 2 * side, MOMENTS), per cell, the
// sums of (s/g) * G * u^p, p = 0, 1, 2, where u = t - 1/2 is the distance from the middle of the cell.
void lrlora_gradient(float* H, const float* G, const float* A, const float* B, int64_t m, int64_t n, int64_t r, Phi phi,
                     double* moments, int32_t threads) {
    const float output_scale = phi.scaling / phi.gain;
    const int64_t cells = int64_t{2} * phi.side;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int32_t thread = 0; thread < threads; ++thread) {
        const int64_t first = m * thread / threads, last = m * (thread + 1) / threads;
        std::vector<Moments> sums(cells, Moments{});
        double* total = moments + thread * cells * MOMENTS;
        int64_t pending = 0;
        for (int64_t i = first; i < last; ++i) {
            float z[CHUNK], t[CHUNK], h[CHUNK];
            int32_t cell[CHUNK];
            for (int64_t start = 0; start < n; start += CHUNK) {
                const int64_t count = std::min(CHUNK, n - start);
                product(z, B + i * r, A + start, r, n, count, phi.gain);
                locate(cell, t, z, count, phi);
                const float side = static_cast<float>(phi.side);
                const float* g = G + i * n + start;
                for (int64_t j = 0; j < count; ++j) {
                    const float inside = std::fabs(z[j]) * phi.cells_per_unit <= side ? 1.0f : 0.0f;
                    h[j] = inside * cubic(phi.table + cell[j], t[j]);
                }
                if (phi.form == SATURATING) {
                    for (int64_t j = 0; j < count; ++j) {
                        const float tangent = hyperbolic_tangent(z[j]);
                        h[j] += multiply_add(-tangent, tangent, 1.0f);
                    }
                } else {
                    for (int64_t j = 0; j < count; ++j) h[j] += 1.0f;
                }
                for (int64_t j = 0; j < count; ++j) {
                    const float u = t[j] - 0.5f, term = output_scale * g[j];
                    sums[cell[j] / LINE] += Moments{term, term * u, term * u * u, 0.0f};
                }
                float* out = H + i * n + start;
                for (int64_t j = 0; j < count; ++j) out[j] = phi.scaling * h[j] * g[j];
            }
            pending += n;
            if (pending >= FLUSH_ENTRIES || i + 1 == last) {
                for (int64_t k = 0; k < cells * MOMENTS; ++k) total[k] += sums[k / MOMENTS][k % MOMENTS];
                std::fill(sums.begin(), sums.end(), Moments{});
                pending = 0;
            }
        }
    }
}

}  // extern "C"
