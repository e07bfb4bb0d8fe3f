/* AVX-512 with BF16 and VBMI2: vpexpandw / vpexpandd spread the kept values, vdpbf16ps multiplies pairs of bfloat16. */
#include <immintrin.h>

#define ISA "AVX-512 with BF16"
#define MAX_SUMS 24 /* of 32 registers */
#define PAIRS 0     /* bfloat16 is multiplied as it is */
#define LANES 16
#define MERGED_ROWS 8 /* at a time, of two registers each */

typedef __m512 sums, lanes;
typedef struct { __m512 part[2]; } f32_word;
typedef __m512i bf16_word;
typedef float f32_input;
typedef uint16_t bf16_input;
typedef const float *f32_item; /* an operand from memory costs nothing here */
typedef __m512i bf16_item;

static inline sums no_sums(void) { return _mm512_setzero_ps(); }
static inline lanes multiply_add(float b, lanes a, lanes sum) { return _mm512_fmadd_ps(_mm512_set1_ps(b), a, sum); }
static inline void add_up(float *to, const sums s[4]) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(s[0], s[1]), _mm512_unpackhi_ps(s[0], s[1]));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(s[2], s[3]), _mm512_unpackhi_ps(s[2], s[3]));
    __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512 four = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high)); /* of a, b, c, d, in each quarter */
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

/* vpexpand as the compiler writes it is slow on Zen 4: from memory, and from a register too, since each one waits for
 * whatever its result register held before; so that is cleared first. */
#define EXPAND(instruction, result, bits, next)                                                        \
    __asm__("vpxord %x0, %x0, %x0\n\t" instruction " %2, %0 %{%1%}%{z%}" : "=&v"(result) : "Yk"((__mmask32)(bits)), "v"(next))

static inline f32_word f32_expand(const float *values, uint32_t bits) {
    __m512 low = _mm512_loadu_ps(values), high = _mm512_loadu_ps(values + __builtin_popcount(bits & 0xFFFF));
    f32_word w;
    EXPAND("vexpandps", w.part[0], bits, low);
    EXPAND("vexpandps", w.part[1], bits >> 16, high);
    return w;
}
static inline f32_word f32_load(const float *from) {
    return (f32_word){{_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)}};
}
static inline void f32_store(float *to, f32_word w) {
    _mm512_storeu_ps(to, w.part[0]);
    _mm512_storeu_ps(to + 16, w.part[1]);
}
static inline f32_item f32_fetch(const f32_input *x) { return x; }
static inline sums f32_dot(sums s, f32_word w, f32_item x) {
    s = _mm512_fmadd_ps(w.part[0], _mm512_loadu_ps(x), s);
    return _mm512_fmadd_ps(w.part[1], _mm512_loadu_ps(x + 16), s);
}

static inline bf16_word bf16_expand(const uint16_t *values, uint32_t bits) {
    bf16_word w;
    EXPAND("vpexpandw", w, bits, _mm512_loadu_si512(values));
    return w;
}
static inline bf16_word bf16_load(const uint16_t *from) { return _mm512_loadu_si512(from); }
static inline void bf16_store(uint16_t *to, bf16_word w) { _mm512_storeu_si512(to, w); }
static inline bf16_item bf16_fetch(const bf16_input *x) {
    bf16_item item = _mm512_loadu_si512(x);
    __asm__("" : "+v"(item)); /* stays in a register for all rows, where the compiler would load it anew for each */
    return item;
}
static inline sums bf16_dot(sums s, bf16_word w, bf16_item x) {
    return _mm512_dpbf16_ps(s, (__m512bh)w, (__m512bh)x);
}
