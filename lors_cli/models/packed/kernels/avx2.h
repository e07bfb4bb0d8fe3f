/* AVX2 and FMA: a byte of the mask picks a shuffle from a table; bfloat16 is widened in pairs, even and odd columns. */
#include <immintrin.h>

#define ISA "AVX2"
#define MAX_SUMS 4 /* of two registers each; there are 16 */
#define PAIRS 8
#define LANES 8
#define MERGED_ROWS 2 /* at a time, of four registers each */
#include "tables.h"

typedef __m256 lanes;
typedef struct { __m256 part[2]; } sums;
typedef struct { __m256 part[4]; } f32_word;
typedef struct { __m256i part[2]; } bf16_word;
typedef float f32_input, bf16_input;
typedef const float *f32_item, *bf16_item;

static inline sums no_sums(void) { return (sums){{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
static inline lanes multiply_add(float b, lanes a, lanes sum) { return _mm256_fmadd_ps(_mm256_set1_ps(b), a, sum); }
static inline void add_up(float *to, const sums s[4]) {
    __m256 eight[4];
    UNROLL for (int i = 0; i < 4; i++) eight[i] = _mm256_add_ps(s[i].part[0], s[i].part[1]);
    __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(eight[0], eight[1]), _mm256_hadd_ps(eight[2], eight[3]));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
}

static inline f32_word f32_expand(const float *values, uint32_t bits) {
    f32_word w;
    UNROLL for (int i = 0; i < 4; i++) {
        unsigned byte = bits >> 8 * i & 0xFF;
        __m256i places = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)eight_places[byte]));
        __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), places);
        w.part[i] = _mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(places)); /* negative: no value */
        values += __builtin_popcount(byte);
    }
    return w;
}
static inline f32_word f32_load(const float *from) {
    f32_word w;
    UNROLL for (int i = 0; i < 4; i++) w.part[i] = _mm256_loadu_ps(from + 8 * i);
    return w;
}
static inline void f32_store(float *to, f32_word w) {
    UNROLL for (int i = 0; i < 4; i++) _mm256_storeu_ps(to + 8 * i, w.part[i]);
}
static inline f32_item f32_fetch(const f32_input *x) { return x; }
static inline sums f32_dot(sums s, f32_word w, f32_item x) {
    UNROLL for (int i = 0; i < 4; i++)
        s.part[i & 1] = _mm256_fmadd_ps(w.part[i], _mm256_loadu_ps(x + 8 * i), s.part[i & 1]);
    return s;
}

static inline bf16_word bf16_expand(const uint16_t *values, uint32_t bits) {
    __m128i eight[4];
    UNROLL for (int i = 0; i < 4; i++) {
        unsigned byte = bits >> 8 * i & 0xFF;
        __m128i places = _mm_load_si128((const __m128i *)eight_halves[byte]);
        eight[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)values), places);
        values += __builtin_popcount(byte);
    }
    return (bf16_word){{_mm256_set_m128i(eight[1], eight[0]), _mm256_set_m128i(eight[3], eight[2])}};
}
static inline bf16_word bf16_load(const uint16_t *from) {
    const __m256i *parts = (const __m256i *)from;
    return (bf16_word){{_mm256_loadu_si256(parts), _mm256_loadu_si256(parts + 1)}};
}
static inline void bf16_store(uint16_t *to, bf16_word w) {
    UNROLL for (int i = 0; i < 2; i++) _mm256_storeu_si256((__m256i *)to + i, w.part[i]);
}
static inline bf16_item bf16_fetch(const bf16_input *x) { return x; }
static inline sums bf16_dot(sums s, bf16_word w, bf16_item x) {
    const __m256i high = _mm256_set1_epi32((int)0xFFFF0000);
    UNROLL for (int i = 0; i < 2; i++) {
        __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(w.part[i], 16));
        __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(w.part[i], high));
        s.part[0] = _mm256_fmadd_ps(even, _mm256_loadu_ps(x + 16 * i), s.part[0]);
        s.part[1] = _mm256_fmadd_ps(odd, _mm256_loadu_ps(x + 16 * i + 8), s.part[1]);
    }
    return s;
}

/* Codes of 4 bits, in the columns of a byte of the mask; a negative one looks zero up. */
typedef struct { __m256 part[2]; } f32_table;
typedef struct { __m128i low, high; } bf16_table; /* bytes of the values */

static inline __m128i spread_4(const uint8_t *codes, int first, unsigned byte) {
    __m128i two = _mm_cvtsi32_si128((int)eight_codes(codes, first)), places = _mm_loadl_epi64((const __m128i *)eight_places[byte]);
    __m128i each = _mm_and_si128(_mm_unpacklo_epi8(two, _mm_srli_epi16(two, 4)), _mm_set1_epi8(15));
    return _mm_or_si128(_mm_shuffle_epi8(each, places), _mm_cmpgt_epi8(_mm_setzero_si128(), places));
}
static inline f32_table f32_table_of(float scale, int zero) {
    float values[16];
    f32_of_codes(values, scale, zero);
    return (f32_table){{_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)}};
}
static inline f32_word f32_look_up(const uint8_t *codes, uint32_t bits, f32_table t) {
    f32_word w;
    UNROLL for (int i = 0, first = 0; i < 4; i++) {
        unsigned byte = bits >> 8 * i & 0xFF;
        __m256i each = _mm256_cvtepi8_epi32(spread_4(codes, first, byte));
        __m256 low = _mm256_permutevar8x32_ps(t.part[0], each), high = _mm256_permutevar8x32_ps(t.part[1], each);
        __m256 found = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(each, 28)));
        w.part[i] = _mm256_blendv_ps(found, _mm256_setzero_ps(), _mm256_castsi256_ps(each));
        first += __builtin_popcount(byte);
    }
    return w;
}
static inline bf16_table bf16_table_of(float scale, int zero) {
    uint16_t values[16];
    bf16_of_codes(values, scale, zero);
    __m128i a = _mm_loadu_si128((const __m128i *)values), b = _mm_loadu_si128((const __m128i *)(values + 8));
    const __m128i lower = _mm_set1_epi16(255);
    return (bf16_table){_mm_packus_epi16(_mm_and_si128(a, lower), _mm_and_si128(b, lower)),
                        _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8))};
}
static inline bf16_word bf16_look_up(const uint8_t *codes, uint32_t bits, bf16_table t) {
    bf16_word w;
    UNROLL for (int i = 0, first = 0; i < 2; i++) {
        unsigned byte = bits >> 16 * i & 0xFF, next = bits >> (16 * i + 8) & 0xFF;
        __m128i a = spread_4(codes, first, byte), b = spread_4(codes, first + __builtin_popcount(byte), next);
        __m128i each = _mm_unpacklo_epi64(a, b), low = _mm_shuffle_epi8(t.low, each), high = _mm_shuffle_epi8(t.high, each);
        w.part[i] = _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
        first += __builtin_popcount(bits >> 16 * i & 0xFFFF);
    }
    return w;
}
WORD_BY_WORD(f32)
WORD_BY_WORD(bf16)

static inline f32_word f32_expand_8(const uint8_t *codes, uint32_t bits, float scale) {
    f32_word w;
    UNROLL for (int i = 0; i < 4; i++) {
        unsigned byte = bits >> 8 * i & 0xFF;
        __m128i places = _mm_loadl_epi64((const __m128i *)eight_places[byte]);
        __m128i each = _mm_xor_si128(_mm_loadl_epi64((const __m128i *)codes), _mm_set1_epi8((char)0x80)); /* less 128 */
        __m256 spread = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_shuffle_epi8(each, places)));
        w.part[i] = _mm256_mul_ps(spread, _mm256_set1_ps(scale));
        codes += __builtin_popcount(byte);
    }
    return w;
}
static inline bf16_word bf16_expand_8(const uint8_t *codes, uint32_t bits, float scale) {
    f32_word values = f32_expand_8(codes, bits, scale);
    bf16_word w;
    __m256i half[4];
    UNROLL for (int i = 0; i < 4; i++) { /* to the nearest, ties to even */
        __m256i exact = _mm256_castps_si256(values.part[i]), one = _mm256_set1_epi32(1);
        __m256i up = _mm256_add_epi32(_mm256_and_si256(_mm256_srli_epi32(exact, 16), one), _mm256_set1_epi32(0x7FFF));
        half[i] = _mm256_srli_epi32(_mm256_add_epi32(exact, up), 16);
    }
    UNROLL for (int i = 0; i < 2; i++)
        w.part[i] = _mm256_permute4x64_epi64(_mm256_packus_epi32(half[2 * i], half[2 * i + 1]), 0xD8);
    return w;
}
