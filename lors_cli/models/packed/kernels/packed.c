/* Products with packed weights: of every row the values that are kept, and a bit for each column that says where.
 * A value lies there as it is, or as a code of 4 or 8 bits that stands for scale · (code − zero), rounded to the data
 * type; the scale is that of a group of 32, 64 or 128 columns.
 *
 * Built by the system's compiler for the processor at hand, whose instructions choose one of the four headers; each
 * knows, for float32 (f32) and bfloat16 (bf16), a word of 32 columns: how to expand, load and store it, and its
 * product with 32 inputs; and how to add up the sums of four rows. Sums are kept in float32. `values` can be read 64 bytes
 * past its end, codes 32.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

static inline float f32_to_float(float value) { return value; }
static inline float f32_from_float(float value) { return value; }
static inline float bf16_to_float(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}
static inline uint16_t bf16_from_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7FC0;
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16); /* to the nearest, ties to even */
}

/* The values of the codes 0 to 15. */
#define VALUES_OF_CODES(name, value)                                                       \
    static inline void name##_of_codes(value to[16], float scale, int zero) {              \
        for (int i = 0; i < 16; i++) to[i] = name##_from_float(scale * (float)(i - zero)); \
    }
VALUES_OF_CODES(f32, float)
VALUES_OF_CODES(bf16, uint16_t)

/* Eight codes of 4 bits from the one numbered `first` on. */
static inline uint32_t eight_codes(const uint8_t *codes, int first) {
    uint64_t bits;
    memcpy(&bits, codes + first / 2, sizeof bits);
    return (uint32_t)(bits >> first % 2 * 4);
}

/* Codes of 4 bits are read in as many words at once as a data type's STEP says, by default one: `look_up` gives it. */
#define WORD_BY_WORD(name)                                                                              \
    enum { name##_STEP = 1 };                                                                           \
    static inline name##_table name##_two_tables(name##_table first, name##_table second) {             \
        (void)second;                                                                                   \
        return first;                                                                                   \
    }                                                                                                   \
    static inline void name##_expand_4(name##_word *to, const uint8_t **next, uint64_t bits,            \
                                       const int half, name##_table table) {                            \
        (void)half;                                                                                     \
        *to = name##_look_up(*next, (uint32_t)bits, table);                                             \
        *next += (__builtin_popcount((uint32_t)bits) + 1) / 2;                                          \
    }                                                                                                   \
    static inline void name##_put_in_order(name##_word *w) { (void)w; }                                     \
    static inline void name##_load_4(name##_word *to, const uint8_t *codes, name##_table table) {       \
        *to = name##_look_up(codes, ~0u, table);                                                        \
    }

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
#include "avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "avx2.h"
#elif defined(__aarch64__)
#include "neon.h"
#else
#include "scalar.h"
#endif

#define MAX_WIDTH 8  /* inputs at a time with which each row is expanded in registers */
#define MAX_HEIGHT 4 /* rows at a time, whose sums are added up together */
#define HEIGHT(width) (MAX_SUMS / (width) < 1 ? 1 : MIN(MAX_SUMS / (width), MAX_HEIGHT))
#define TILE_WIDTH 6 /* inputs at a time of a larger batch, */
#define GROUP HEIGHT(TILE_WIDTH)
#define PANEL 64 /* and rows that are restored for it, in such groups */
#define FETCH_AHEAD 8192 /* bytes, at least, of values that are kept: memory answers that late */

enum rows_are { PACKED, CODES_4, HALF_4, CODES_8, IN_PANEL, PLAIN, PLAIN_4 };

struct linear {
    const uint8_t *values;
    const uint32_t *mask;
    const int64_t *offsets; /* of rows in `values`: values or, of codes, bytes */
    const void *bias, *x;
    void *out;
    int64_t rows, columns, batch, mask_words, width;
    const void *scales; /* [rows, groups], of the data type, where `bits` is not 0 */
    const uint8_t *zeros;
    int64_t has_zeros; /* -1, or 0 where one is all groups' */
    int64_t bits, groups, group_shift; /* a group is 1 << group_shift words */
    int half;                          /* each whole word keeps 16 columns, as of 2:4 */
    int in_pairs;                      /* words are read two at a time, and multiplied in an order of their own */
    int64_t words;                     /* of a row as they are multiplied: in pairs an even number */
    const void *input;
    int failed;
};

static const uint8_t middle = 8; /* the zero point of symmetric codes of 4 bits */

typedef void share_of_rows(int64_t row, int64_t end, void *context);
typedef int parallel_for(int64_t begin, int64_t end, int64_t grain, share_of_rows *share, void *context);
static parallel_for *torch_parallel_for;

/* Torch's own threads; without them all is done by the one that calls. */
void use_threads_of(parallel_for *found) { torch_parallel_for = found; }

const char *instructions(void) { return ISA; }

#define WORTH_A_THREAD (1 << 18) /* products, about ten microseconds */

static void in_parallel(share_of_rows *share, int64_t rows, int64_t work_a_row, void *context) {
    int64_t grain = WORTH_A_THREAD / MAX(work_a_row, 1) + 1;
    if (!torch_parallel_for || rows <= grain || torch_parallel_for(0, rows, grain, share, context))
        share(0, rows, context);
}

/* 32 inputs of which `count` are there, as `dot` wants them: as they are, or of each 2 · PAIRS first the even ones. */
static inline void f32_prepare(f32_input *to, const float *from, int count) {
    memset(to + count, 0, (size_t)(32 - count) * sizeof *to);
    memcpy(to, from, (size_t)count * sizeof *to);
}
static inline void bf16_prepare(bf16_input *to, const uint16_t *from, int count) {
    memset(to, 0, 32 * sizeof *to);
#if PAIRS
    for (int i = 0; i < count; i++)
        to[i / (2 * PAIRS) * (2 * PAIRS) + i % 2 * PAIRS + i % (2 * PAIRS) / 2] = bf16_to_float(from[i]);
#else
    memcpy(to, from, (size_t)count * sizeof *to);
#endif
}

/* Two words of inputs, `apart` from each other: of 64 columns, of which `count` are there, the even ones and the odd. */
#define PREPARE_PAIR(name, value)                                                                               \
    static inline void name##_prepare_pair(name##_input *to, int64_t apart, const value *from, int count) {     \
        for (int i = 0; i < 64; i++) to[i % 2 * apart + i / 2] = i < count ? (name##_input)from[i] : 0;          \
    }
PREPARE_PAIR(f32, float)
PREPARE_PAIR(bf16, uint16_t)

#define PERIOD 64            /* rows after which the thresholds repeat */
#define PARTS (32 / LANES)   /* registers a word of float32 */
#define STRIP (256 << 10)    /* bytes of the second cache for a part of A and of the thresholds */
#define CODES_WORDS 32       /* of a row at most, a multiple of any group's, whose codes are looked up together */

struct merge {
    const void *weight;
    const uint32_t *mask;
    const int64_t *offsets;
    const float *A, *B;
    const int32_t *thresholds;
    void *out;
    int64_t rows, columns, words, rank, weight_stride, out_stride;
    const struct linear *grid; /* where weights are held as codes or merged ones are rounded to its values */
    int has_codes, to_grid;
};
typedef uint32_t bits_of_lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t threshold_lanes __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

/* The bits, as of float32, of values from memory, and such bits back to it; bfloat16 is the upper half of them. */
static inline bits_of_lanes f32_bits(const float *from) {
    bits_of_lanes bits;
    memcpy(&bits, from, sizeof bits);
    return bits;
}
static inline void f32_put(float *to, bits_of_lanes bits) { memcpy(to, &bits, sizeof bits); }
static inline bits_of_lanes bf16_bits(const uint16_t *from) {
    halves upper;
    memcpy(&upper, from, sizeof upper);
    return __builtin_convertvector(upper, bits_of_lanes) << 16;
}
static inline void bf16_put(uint16_t *to, bits_of_lanes bits) {
    halves upper = __builtin_convertvector(bits >> 16, halves);
    memcpy(to, &upper, sizeof upper);
}

/* Bits of float32 that are rounded to those that a type has room for, to the nearest and ties to even. */
static inline bits_of_lanes f32_rounded(bits_of_lanes bits) { return bits; }
static inline bits_of_lanes bf16_rounded(bits_of_lanes bits) { return bits + 0x7FFF + (bits >> 16 & 1); }

struct step { /* of a group: its scale, and its least and largest value in steps of it */
    lanes scale, least, most;
};

static inline lanes pick(bits_of_lanes where, lanes one, lanes other) {
    return (lanes)((where & (bits_of_lanes)one) | (~where & (bits_of_lanes)other));
}
static inline lanes between(lanes x, lanes least, lanes most) { /* what is no number stays so */
    x = pick((bits_of_lanes)(x < least), least, x);
    return pick((bits_of_lanes)(x > most), most, x);
}
static inline lanes whole(lanes x) { return (x + 0x1.8p23f) - 0x1.8p23f; } /* up to 2^22, ties to even */

/* Merged weights as `tuning/kernels/on_grid.py` rounds them to the grid of the weights that they were. */
static inline lanes on_grid(lanes w, lanes merged, const struct step *s, const int32_t *thresholds) {
    if (!thresholds) return whole(between(merged / s->scale, s->least, s->most)) * s->scale;
    threshold_lanes threshold;
    memcpy(&threshold, thresholds, sizeof threshold);
    lanes share = (__builtin_convertvector(threshold, lanes) + 0.5f) * 0x1p-16f;
    lanes most = (lanes){0} + 512.0f, up = between((merged - w) / s->scale + share, -most, most), down = whole(up);
    down -= pick((bits_of_lanes)(down > up), (lanes){0} + 1.0f, (lanes){0});
    return between(whole(w / s->scale) + down, s->least, s->most) * s->scale;
}

#define T(name) f32_##name
#define VALUE float
#include "linear.h"
#include "merge.h"
#undef T
#undef VALUE

#define T(name) bf16_##name
#define VALUE uint16_t
#include "linear.h"
#include "merge.h"
