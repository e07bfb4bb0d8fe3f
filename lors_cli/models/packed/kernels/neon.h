/* NEON: part of the mask picks a shuffle from a table; bfloat16 is widened in pairs, even and odd columns. */
#include <arm_neon.h>

#define ISA "NEON"
#define MAX_SUMS 8 /* of two registers each; there are 32 */
#define PAIRS 4
#define LANES 4
#define MERGED_ROWS 2 /* at a time, of eight registers each */
#include "tables.h"

typedef float32x4_t lanes;
typedef struct { float32x4_t part[2]; } sums;
typedef struct { float32x4_t part[8]; } f32_word;
typedef struct { uint16x8_t part[4]; } bf16_word;
typedef float f32_input, bf16_input;
typedef const float *f32_item, *bf16_item;

static inline sums no_sums(void) { return (sums){{vdupq_n_f32(0), vdupq_n_f32(0)}}; }
static inline lanes multiply_add(float b, lanes a, lanes sum) { return vfmaq_n_f32(sum, a, b); }
static inline void add_up(float *to, const sums s[4]) {
    float32x4_t four[4];
    UNROLL for (int i = 0; i < 4; i++) four[i] = vaddq_f32(s[i].part[0], s[i].part[1]);
    vst1q_f32(to, vpaddq_f32(vpaddq_f32(four[0], four[1]), vpaddq_f32(four[2], four[3])));
}

static inline f32_word f32_expand(const float *values, uint32_t bits) {
    f32_word w;
    UNROLL for (int i = 0; i < 8; i++) {
        unsigned nibble = bits >> 4 * i & 0xF;
        uint8x16_t next = vreinterpretq_u8_f32(vld1q_f32(values));
        w.part[i] = vreinterpretq_f32_u8(vqtbl1q_u8(next, vld1q_u8(four_words[nibble])));
        values += __builtin_popcount(nibble);
    }
    return w;
}
static inline f32_word f32_load(const float *from) {
    f32_word w;
    UNROLL for (int i = 0; i < 8; i++) w.part[i] = vld1q_f32(from + 4 * i);
    return w;
}
static inline void f32_store(float *to, f32_word w) {
    UNROLL for (int i = 0; i < 8; i++) vst1q_f32(to + 4 * i, w.part[i]);
}
static inline f32_item f32_fetch(const f32_input *x) { return x; }
static inline sums f32_dot(sums s, f32_word w, f32_item x) {
    UNROLL for (int i = 0; i < 8; i++) s.part[i & 1] = vfmaq_f32(s.part[i & 1], w.part[i], vld1q_f32(x + 4 * i));
    return s;
}

static inline bf16_word bf16_expand(const uint16_t *values, uint32_t bits) {
    bf16_word w;
    UNROLL for (int i = 0; i < 4; i++) {
        unsigned byte = bits >> 8 * i & 0xFF;
        uint8x16_t next = vreinterpretq_u8_u16(vld1q_u16(values));
        w.part[i] = vreinterpretq_u16_u8(vqtbl1q_u8(next, vld1q_u8(eight_halves[byte])));
        values += __builtin_popcount(byte);
    }
    return w;
}
static inline bf16_word bf16_load(const uint16_t *from) {
    bf16_word w;
    UNROLL for (int i = 0; i < 4; i++) w.part[i] = vld1q_u16(from + 8 * i);
    return w;
}
static inline void bf16_store(uint16_t *to, bf16_word w) {
    UNROLL for (int i = 0; i < 4; i++) vst1q_u16(to + 8 * i, w.part[i]);
}
static inline bf16_item bf16_fetch(const bf16_input *x) { return x; }
static inline sums bf16_dot(sums s, bf16_word w, bf16_item x) {
    const uint32x4_t high = vdupq_n_u32(0xFFFF0000);
    UNROLL for (int i = 0; i < 4; i++) {
        uint32x4_t pairs = vreinterpretq_u32_u16(w.part[i]);
        float32x4_t even = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
        float32x4_t odd = vreinterpretq_f32_u32(vandq_u32(pairs, high));
        s.part[0] = vfmaq_f32(s.part[0], even, vld1q_f32(x + 8 * i));
        s.part[1] = vfmaq_f32(s.part[1], odd, vld1q_f32(x + 8 * i + 4));
    }
    return s;
}

/* Codes of 4 bits, in the columns of a byte of the mask; one of 255 looks zero up. */
typedef struct { uint8x16x4_t bytes; } f32_table;
typedef struct { uint8x16_t low, high; } bf16_table;

static inline uint8x8_t spread_4(const uint8_t *codes, int first, unsigned byte) {
    uint8x8_t two = vcreate_u8(eight_codes(codes, first)), places = vreinterpret_u8_s8(vld1_s8(eight_places[byte]));
    uint8x8_t each = vzip1_u8(vand_u8(two, vdup_n_u8(15)), vshr_n_u8(two, 4));
    return vorr_u8(vtbl1_u8(each, places), vcltz_s8(vreinterpret_s8_u8(places)));
}
static inline f32_table f32_table_of(float scale, int zero) {
    float values[16];
    f32_of_codes(values, scale, zero);
    f32_table t;
    UNROLL for (int i = 0; i < 4; i++) t.bytes.val[i] = vreinterpretq_u8_f32(vld1q_f32(values + 4 * i));
    return t;
}
static inline f32_word f32_look_up(const uint8_t *codes, uint32_t bits, f32_table t) {
    f32_word w;
    UNROLL for (int i = 0, first = 0; i < 4; i++) {
        unsigned byte = bits >> 8 * i & 0xFF;
        uint16x8_t each = vmovl_u8(vand_u8(spread_4(codes, first, byte), vdup_n_u8(31))); /* none: behind the table */
        uint32x4_t half[2] = {vmovl_u16(vget_low_u16(each)), vmovl_u16(vget_high_u16(each))};
        UNROLL for (int k = 0; k < 2; k++) {
            uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), half[k], 0x04040404);
            w.part[2 * i + k] = vreinterpretq_f32_u8(vqtbl4q_u8(t.bytes, vreinterpretq_u8_u32(bytes)));
        }
        first += __builtin_popcount(byte);
    }
    return w;
}
static inline bf16_table bf16_table_of(float scale, int zero) {
    uint16_t values[16];
    bf16_of_codes(values, scale, zero);
    uint8x16x2_t bytes = vld2q_u8((const uint8_t *)values);
    return (bf16_table){bytes.val[0], bytes.val[1]};
}
static inline bf16_word bf16_look_up(const uint8_t *codes, uint32_t bits, bf16_table t) {
    bf16_word w;
    UNROLL for (int i = 0, first = 0; i < 4; i++) {
        unsigned byte = bits >> 8 * i & 0xFF;
        uint8x8_t each = spread_4(codes, first, byte), low = vqtbl1_u8(t.low, each), high = vqtbl1_u8(t.high, each);
        w.part[i] = vreinterpretq_u16_u8(vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high)));
        first += __builtin_popcount(byte);
    }
    return w;
}
WORD_BY_WORD(f32)
WORD_BY_WORD(bf16)

static inline f32_word f32_expand_8(const uint8_t *codes, uint32_t bits, float scale) {
    f32_word w;
    UNROLL for (int i = 0; i < 4; i++) {
        unsigned byte = bits >> 8 * i & 0xFF;
        uint8x8_t places = vreinterpret_u8_s8(vld1_s8(eight_places[byte]));
        uint8x8_t each = veor_u8(vld1_u8(codes), vdup_n_u8(0x80)); /* less 128 */
        int16x8_t spread = vmovl_s8(vreinterpret_s8_u8(vtbl1_u8(each, places)));
        w.part[2 * i] = vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(spread))), scale);
        w.part[2 * i + 1] = vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_high_s16(spread))), scale);
        codes += __builtin_popcount(byte);
    }
    return w;
}
static inline bf16_word bf16_expand_8(const uint8_t *codes, uint32_t bits, float scale) {
    f32_word values = f32_expand_8(codes, bits, scale);
    bf16_word w;
    uint16x4_t half[8];
    UNROLL for (int i = 0; i < 8; i++) { /* to the nearest, ties to even */
        uint32x4_t exact = vreinterpretq_u32_f32(values.part[i]), even = vandq_u32(vshrq_n_u32(exact, 16), vdupq_n_u32(1));
        half[i] = vshrn_n_u32(vaddq_u32(exact, vaddq_u32(even, vdupq_n_u32(0x7FFF))), 16);
    }
    UNROLL for (int i = 0; i < 4; i++) w.part[i] = vcombine_u16(half[2 * i], half[2 * i + 1]);
    return w;
}
