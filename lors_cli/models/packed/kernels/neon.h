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
