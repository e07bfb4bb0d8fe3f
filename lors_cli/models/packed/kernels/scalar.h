/* Plain C: eight sums, so that a compiler may keep them in whatever vectors there are. */
#define ISA "plain C"
#define MAX_SUMS 1
#define PAIRS 1
#define LANES 1
#define MERGED_ROWS 1

typedef float lanes __attribute__((vector_size(4)));
typedef struct { float part[8]; } sums;
typedef struct { float column[32]; } f32_word;
typedef struct { uint16_t column[32]; } bf16_word;
typedef float f32_input, bf16_input;
typedef const float *f32_item, *bf16_item;

static inline sums no_sums(void) { return (sums){{0}}; }
static inline lanes multiply_add(float b, lanes a, lanes sum) { return (lanes){__builtin_fmaf(b, a[0], sum[0])}; }
static inline void add_up(float *to, const sums s[4]) {
    for (int i = 0; i < 4; i++) {
        const float *part = s[i].part;
        to[i] = ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
    }
}

#define PLAIN(name, value)                                                       \
    static inline name##_word name##_expand(const value *values, uint32_t bits) { \
        name##_word w;                                                            \
        for (int i = 0; i < 32; i++) {                                            \
            w.column[i] = bits >> i & 1 ? *values : 0;                            \
            values += bits >> i & 1;                                              \
        }                                                                         \
        return w;                                                                 \
    }                                                                             \
    static inline name##_word name##_load(const value *from) {                    \
        name##_word w;                                                            \
        memcpy(&w, from, sizeof w);                                               \
        return w;                                                                 \
    }                                                                             \
    static inline void name##_store(value *to, name##_word w) { memcpy(to, &w, sizeof w); }
PLAIN(f32, float)
PLAIN(bf16, uint16_t)

static inline f32_item f32_fetch(const f32_input *x) { return x; }
static inline sums f32_dot(sums s, f32_word w, f32_item x) {
    for (int i = 0; i < 32; i++) s.part[i % 8] += w.column[i] * x[i];
    return s;
}
static inline bf16_item bf16_fetch(const bf16_input *x) { return x; }
static inline sums bf16_dot(sums s, bf16_word w, bf16_item x) {
    for (int i = 0; i < 32; i++) s.part[i % 8] += bf16_to_float(w.column[i]) * x[i];
    return s;
}

#define CODES(name, value)                                                                                  \
    typedef struct { value values[16]; } name##_table;                                                      \
    static inline name##_table name##_table_of(float scale, int zero) {                                     \
        name##_table t;                                                                                     \
        name##_of_codes(t.values, scale, zero);                                                             \
        return t;                                                                                           \
    }                                                                                                       \
    static inline name##_word name##_look_up(const uint8_t *codes, uint32_t bits, name##_table t) {         \
        name##_word w;                                                                                      \
        for (int i = 0, first = 0; i < 32; i++) {                                                           \
            w.column[i] = bits >> i & 1 ? t.values[codes[first / 2] >> first % 2 * 4 & 15] : 0;             \
            first += bits >> i & 1;                                                                         \
        }                                                                                                   \
        return w;                                                                                           \
    }                                                                                                       \
    WORD_BY_WORD(name)                                                                                      \
    static inline name##_word name##_expand_8(const uint8_t *codes, uint32_t bits, float scale) {           \
        name##_word w;                                                                                      \
        for (int i = 0; i < 32; i++) {                                                                      \
            w.column[i] = bits >> i & 1 ? name##_from_float(scale * (float)(*codes - 128)) : 0;             \
            codes += bits >> i & 1;                                                                         \
        }                                                                                                   \
        return w;                                                                                           \
    }
CODES(f32, float)
CODES(bf16, uint16_t)
