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

/* Codes. The zero point's stands in columns that are not kept: its value is 0, so that a look-up needs no mask. */
typedef struct { __m512 values; __m256i zero; } f32_table;
typedef struct { __m512i values, zero; __m256i zero_of_last; } bf16_table; /* of 64 columns, and of the last 32 */

/* 32 codes of 4 bits, each in the lower half of a byte, the upper of which is anything. */
static inline __m256i next_codes(const uint8_t *codes) {
    const __m128i shifts = _mm_set_epi64x(0x3C3834302C282420, 0x1C1814100C080400);
    __m256i low = _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)codes));
    __m256i high = _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)(codes + 8)));
    return _mm256_multishift_epi64_epi8(_mm256_broadcastsi128_si256(shifts), _mm256_blend_epi32(low, high, 0xF0));
}
static inline int is_subnormal(float scale) {
    uint32_t bits;
    memcpy(&bits, &scale, sizeof bits);
    return __builtin_expect(bits < 0x00800000, 0);
}
static inline __m512 values_of_codes(float scale, int zero) {
    static const float steps[] = {-15, -14, -13, -12, -11, -10, -9, -8, -7, -6, -5, -4, -3, -2, -1, 0,
                                  1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    __asm__("" : "+m"(scale)); /* loads spread it for nothing, the units that shuffle are wanted for all else */
    return _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_loadu_ps(steps + 15 - (zero & 15))); /* of code less zero point */
}

static inline f32_table f32_table_of(float scale, int zero) {
    return (f32_table){values_of_codes(scale, zero), _mm256_set1_epi8((char)zero)};
}
static inline f32_word f32_look_up(const uint8_t *codes, uint32_t bits, f32_table t) {
    __m256i each = _mm256_mask_expand_epi8(t.zero, bits, next_codes(codes));
    __m512i low = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(each));
    __m512i high = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(each, 1));
    return (f32_word){{_mm512_permutexvar_ps(low, t.values), _mm512_permutexvar_ps(high, t.values)}};
}
WORD_BY_WORD(f32)

/* To the nearest as `bf16_from_float` does it; vcvtneps2bf16 makes zeros of subnormal numbers. */
static inline __m256i rounded_with_subnormals(__m512 values) {
    __m512i bits = _mm512_castps_si512(values), even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7FFF)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

enum { bf16_STEP = 2 }; /* words: the even columns of two, and the odd ones */
static inline bf16_table bf16_table_of(float scale, int zero) {
    __m512 values = values_of_codes(scale, zero);
    __m512i twice = (__m512i)_mm512_cvtne2ps_pbh(values, values);
    if (is_subnormal(scale)) twice = _mm512_broadcast_i64x4(rounded_with_subnormals(values));
    uint32_t zeros = (uint32_t)zero * 0x01010101;
    __asm__("" : "+m"(zeros));
    return (bf16_table){twice, _mm512_set1_epi32((int)zeros), _mm256_set1_epi32((int)zeros)};
}
static inline bf16_table bf16_two_tables(bf16_table first, bf16_table second) { /* the first 32 columns', and the last */
    __m512i values = _mm512_inserti64x4(first.values, _mm512_castsi512_si256(second.values), 1);
    return (bf16_table){values, _mm512_inserti64x4(first.zero, second.zero_of_last, 1), second.zero_of_last};
}
static inline void bf16_look_up(bf16_word *to, __m512i codes, bf16_table t) {
    const __m512i lower = _mm512_set1_epi8(15), second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(16), 1);
    codes = _mm512_ternarylogic_epi64(codes, lower, second, 0xEA); /* (codes & lower) | second */
    to[0] = _mm512_permutexvar_epi16(codes, t.values);
    to[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), t.values);
}
static inline void bf16_expand_4(bf16_word *to, const uint8_t **next, uint64_t bits, const int half, bf16_table t) {
    const uint32_t first = (uint32_t)bits, second = (uint32_t)(bits >> 32);
    __m512i codes;
    if (half) {
        codes = _mm512_mask_expand_epi8(t.zero, bits, _mm512_castsi256_si512(next_codes(*next)));
        *next += 16;
    } else {
        __m256i low = _mm256_mask_expand_epi8(_mm512_castsi512_si256(t.zero), first, next_codes(*next));
        *next += (__builtin_popcount(first) + 1) / 2;
        __m256i high = _mm256_mask_expand_epi8(t.zero_of_last, second, next_codes(*next));
        *next += (__builtin_popcount(second) + 1) / 2;
        codes = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    bf16_look_up(to, codes, t);
}
static inline void bf16_load_4(bf16_word *to, const uint8_t *codes, bf16_table t) {
    const __m512i shifts = _mm512_set1_epi64(0x1C1814100C080400);
    __m512i each = _mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i *)codes));
    bf16_look_up(to, _mm512_multishift_epi64_epi8(shifts, each), t);
}
static inline void bf16_put_in_order(bf16_word *w) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_set_epi16(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    __m512i even = w[0], odd = w[1], places = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_or_si512(low, _mm512_set1_epi32(32)), 16));
    w[0] = _mm512_permutex2var_epi16(even, places, odd);
    w[1] = _mm512_permutex2var_epi16(even, _mm512_add_epi16(places, _mm512_set1_epi16(16)), odd);
}

/* A word of codes of 8 bits less 128, and 0 in columns that are not kept. */
static inline __m256i differences_of_word(const uint8_t *codes, uint32_t bits) {
    __m256i each = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)codes), _mm256_set1_epi8((char)0x80)), w;
    EXPAND("vpexpandb", w, bits, each);
    return w;
}
static inline f32_word f32_expand_8(const uint8_t *codes, uint32_t bits, float scale) {
    __m256i each = differences_of_word(codes, bits);
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(each)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(each, 1)));
    return (f32_word){{_mm512_mul_ps(low, _mm512_set1_ps(scale)), _mm512_mul_ps(high, _mm512_set1_ps(scale))}};
}
static inline bf16_word bf16_expand_8(const uint8_t *codes, uint32_t bits, float scale) {
    f32_word w = f32_expand_8(codes, bits, scale);
    if (is_subnormal(scale))
        return _mm512_inserti64x4(_mm512_castsi256_si512(rounded_with_subnormals(w.part[0])), rounded_with_subnormals(w.part[1]), 1);
    return (__m512i)_mm512_cvtne2ps_pbh(w.part[1], w.part[0]);
}
