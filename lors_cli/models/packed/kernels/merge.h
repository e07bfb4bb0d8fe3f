/* Merged weights of one data type, included once for each: W_t = W + B A where W is not zero, and 0 elsewhere.
 *
 * Every sum is ((B[0] A[0] + B[1] A[1]) + …) + W, no product rounded before it is added: its bits depend neither on
 * the number of threads nor on the shape, and are those of MKL's product in float32 where it adds so.
 * To bfloat16 it is rounded by the thresholds of `tuning/kernels/rounding.py`, to a grid of few bits by `on_grid`.
 */

/* A in words too: [word][rank][32], columns past the last one zero. */
static void T(lay_out_A)(const struct merge *m, float *to, const float *A) {
    for (int64_t c = 0; c < m->words; c++)
        for (int64_t k = 0; k < m->rank; k++, to += 32) {
            int64_t count = MIN(m->columns - c * 32, 32);
            memset(to, 0, 32 * sizeof *to);
            memcpy(to, A + k * m->columns + c * 32, (size_t)count * sizeof *to);
        }
}

/* The step of the grid in a row's word. */
ALWAYS_INLINE struct step T(step_of)(const struct linear *grid, int64_t row, int64_t word) {
    int64_t place = row * grid->groups + (word >> grid->group_shift), top = (1 << grid->bits) - 1;
    float zero = grid->has_zeros ? grid->zeros[place] : 1 << (grid->bits - 1);
    return (struct step){(lanes){0} + T(to_float)(((const VALUE *)grid->scales)[place]), (lanes){0} - zero,
                         (lanes){0} + ((float)top - zero)};
}

/* `to` = the words of a row from `word` to `end`, of its codes. */
ALWAYS_INLINE void T(look_up_as)(const struct linear *l, const enum rows_are are, int64_t row, int64_t word,
                                 int64_t end, VALUE *to) {
    const uint32_t *mask = l->mask + row * l->mask_words;
    T(reader) from = {.next = l->values + l->offsets[row]};
    for (int64_t c = 0; c < word; c++)
        from.next += are == CODES_4 ? (__builtin_popcount(mask[c]) + 1) / 2 : __builtin_popcount(mask[c]);
    const int step = are == CODES_4 ? T(STEP) : 1;
    for (int64_t c = word; c < end; c += step) {
        T(word) w[2];
        if ((c & ((1 << l->group_shift) - 1)) == 0) T(begin_group)(l, are, row, c, &from);
        T(read)(are, mask + c, l->mask_words - c, 1, &from, w);
        if (step == 2) T(put_in_order)(w);
        for (int i = 0; i < step && c + i < end; i++, to += 32) T(store)(to, w[i]);
    }
}

static void T(look_up_words)(const struct linear *l, int64_t row, int64_t word, int64_t end, VALUE *to) {
    if (l->bits == 4) T(look_up_as)(l, CODES_4, row, word, end, to);
    else T(look_up_as)(l, CODES_8, row, word, end, to);
}

/* `to` = a word of `weight` and its sums, masked and rounded, to the grid where there is a step of it. */
ALWAYS_INLINE void T(finish)(VALUE *to, const VALUE *weight, const lanes *sum, const int32_t *thresholds,
                             const struct step *step) {
    UNROLL for (int i = 0; i < PARTS; i++) {
        bits_of_lanes bits = T(bits)(weight + i * LANES), total, threshold = {0};
        lanes w, merged;
        memcpy(&w, &bits, sizeof w);
        merged = w + sum[i];
        if (step) merged = on_grid(w, merged, step, thresholds ? thresholds + i * LANES : NULL);
        memcpy(&total, &merged, sizeof total);
        if (step) total = T(rounded)(total);
        else if (sizeof(VALUE) == 2) memcpy(&threshold, thresholds + i * LANES, sizeof threshold);
        T(put)(to + i * LANES, (total + threshold) & (bits_of_lanes)(bits << 1 != 0)); /* zeros have a sign */
    }
}

/* A word of which only `count` columns are there. */
static void T(finish_last)(VALUE *to, const VALUE *weight, const lanes *sum, const int32_t *thresholds,
                           const struct step *step, int64_t count) {
    VALUE result[32], padded[32] = {0};
    int32_t some[32] = {0};
    memcpy(padded, weight, (size_t)count * sizeof *padded);
    if (thresholds) memcpy(some, thresholds, (size_t)count * sizeof *some);
    T(finish)(result, padded, sum, thresholds ? some : NULL, step);
    memcpy(to, result, (size_t)count * sizeof *to);
}

/* A word of a row whose sums are made; `next` is where its weights are, and goes on to those that follow. */
ALWAYS_INLINE void T(put_word)(const struct merge *m, const int packed, const int grid, int64_t row, int64_t c,
                               const VALUE **next, const lanes *sum, const int32_t *thresholds, VALUE *out) {
    const VALUE *weight = *next;
    VALUE expanded[32];
    struct step step;
    if (packed) {
        uint32_t bits = m->mask[row * m->words + c];
        T(store)(expanded, T(expand)(weight, bits));
        *next += __builtin_popcount(bits);
        weight = expanded;
    } else *next += 32;
    if (grid) step = T(step_of)(m->grid, row, c);
    if (c * 32 + 32 <= m->columns) T(finish)(out, weight, sum, thresholds, grid ? &step : NULL);
    else {
        lanes last[PARTS]; /* those of `sum` would not stay in registers */
        UNROLL for (int i = 0; i < PARTS; i++) last[i] = sum[i];
        T(finish_last)(out, weight, last, thresholds, grid ? &step : NULL, m->columns - c * 32);
    }
}

/* Words from `word` to `end` of `height` rows, whose sums stay in registers; rows that are not packed begin at `plain`
 * and every `stride` after it. */
ALWAYS_INLINE void T(merge_block)(const struct merge *m, const int packed, const int grid, int64_t row,
                                  const int height, int64_t word, int64_t end, const VALUE *plain, int64_t stride) {
    const int64_t rank = m->rank, columns = m->columns, words = m->words, out_stride = m->out_stride;
    const uint32_t *mask = packed ? m->mask + row * words : NULL;
    const int32_t *thresholds = m->thresholds ? m->thresholds + row % PERIOD * columns : NULL;
    const float *a = m->A + word * rank * 32, *b = m->B + row * rank;
    VALUE *out = (VALUE *)m->out + row * out_stride;
    const VALUE *next[MERGED_ROWS];
    UNROLL for (int r = 0; r < height; r++) {
        next[r] = packed ? (const VALUE *)m->weight + m->offsets[row + r] : plain + r * stride;
        for (int64_t c = 0; packed && c < word; c++) next[r] += __builtin_popcount(mask[r * words + c]);
    }
    /* the rows after these are fetched into the second cache meanwhile, and the room for what becomes of them */
    const int64_t later = MIN(height, m->rows - height - row);
    const int64_t ahead = packed && later ? m->offsets[row + later] - m->offsets[row] : later * stride;
    for (int64_t c = word; c < end; c++) {
        lanes sum[MERGED_ROWS][PARTS];
        UNROLL for (int r = 0; r < height; r++) UNROLL for (int i = 0; i < PARTS; i++) sum[r][i] = (lanes){0};
        for (int64_t k = 0; k < rank; k++, a += 32) {
            lanes part[PARTS];
            UNROLL for (int i = 0; i < PARTS; i++) memcpy(&part[i], a + i * LANES, sizeof part[i]);
            UNROLL for (int r = 0; r < height; r++) UNROLL for (int i = 0; i < PARTS; i++)
                sum[r][i] = multiply_add(b[r * rank + k], part[i], sum[r][i]);
        }
#define PUT(r, sums)                                                                                                 \
    do {                                                                                                             \
        __builtin_prefetch(next[r] + ahead, 0, 2);                                                                   \
        __builtin_prefetch(out + ((r) + later) * out_stride + c * 32, 1, 2);                                         \
        T(put_word)(m, packed, grid, row + (r), c, &next[r], sums,                                                   \
                    thresholds ? thresholds + (r) * columns + c * 32 : NULL, out + (r) * out_stride + c * 32);       \
    } while (0)
        if (grid) { /* a loop, since what is done for each is long */
            lanes made[MERGED_ROWS][PARTS];
            UNROLL for (int r = 0; r < height; r++) UNROLL for (int i = 0; i < PARTS; i++) made[r][i] = sum[r][i];
            _Pragma("GCC unroll 1") for (int r = 0; r < height; r++) PUT(r, made[r]);
        } else UNROLL for (int r = 0; r < height; r++) PUT(r, sum[r]);
#undef PUT
    }
}

/* One thread's rows, in strips whose part of A and whose thresholds stay in the cache. */
ALWAYS_INLINE void T(merge_rows)(const struct merge *m, const int packed, const int grid, int64_t first, int64_t end) {
    const int codes = !packed && m->has_codes;
    int64_t width = MAX(STRIP / (32 * 4 * (m->rank + (m->thresholds ? PERIOD : 0))), 1);
    VALUE held[MERGED_ROWS * CODES_WORDS * 32];
    if (codes) width = MIN(MAX(width & ~3, 4), CODES_WORDS); /* whole groups */
    for (int64_t word = 0; word < m->words; word += width) {
        int64_t stop = MIN(word + width, m->words);
        for (int64_t row = first, height; row < end; row += height) { /* none of several rows goes past the period */
            const VALUE *plain = codes ? held : (const VALUE *)m->weight + row * m->weight_stride + word * 32;
            int64_t stride = codes ? CODES_WORDS * 32 : m->weight_stride;
            height = row % MERGED_ROWS == 0 && row + MERGED_ROWS <= end ? MERGED_ROWS : 1;
            for (int64_t r = 0; codes && r < height; r++)
                T(look_up_words)(m->grid, row + r, word, stop, held + r * CODES_WORDS * 32);
            if (height > 1) T(merge_block)(m, packed, grid, row, MERGED_ROWS, word, stop, plain, stride);
            else T(merge_block)(m, packed, grid, row, 1, word, stop, plain, stride);
        }
    }
}

static void T(merge_share)(int64_t first, int64_t end, void *context) {
    const struct merge *m = context;
    const int packed = m->mask && !m->has_codes;
    if (packed && m->to_grid) T(merge_rows)(m, 1, 1, first, end);
    else if (packed) T(merge_rows)(m, 1, 0, first, end);
    else if (m->to_grid) T(merge_rows)(m, 0, 1, first, end);
    else T(merge_rows)(m, 0, 0, first, end);
}

/* out[rows, columns] of a weight, plain or with a mask and offsets packed, as values or as codes; strides are of rows.
 * Thresholds [PERIOD, columns] for bfloat16, A [rank, columns], scaled, and B [rows, rank] are float32. Where weights
 * are codes, or merged ones go `to_grid`, there is a grid of `bits`, whose groups are a power of two of 32 columns: its
 * scales, and zero points or NULL. Thresholds then serve for any type, and NULL rounds to its nearest value. 0, or 1
 * without memory. */
int T(merge)(const void *weight, const uint32_t *mask, const int64_t *offsets, const float *A, const float *B,
             const int32_t *thresholds, VALUE *out, int64_t rows, int64_t columns, int64_t rank, int64_t weight_stride,
             int64_t out_stride, const VALUE *scales, const uint8_t *zeros, int64_t bits, int64_t group_size,
             int64_t has_codes, int64_t to_grid) {
    struct linear grid = T(packed)(weight, mask, offsets, rows, columns, scales, zeros, bits, group_size, 0);
    struct merge m = {weight, mask, offsets, NULL, B, thresholds, out, rows, columns, (columns + 31) / 32, rank,
                      weight_stride, out_stride, &grid, (int)has_codes, (int)to_grid};
    float *words = malloc((size_t)(m.words * rank * 32) * sizeof *words);
    if (!words) return 1;
    T(lay_out_A)(&m, words, A);
    m.A = words;
    in_parallel(T(merge_share), rows, columns * (rank + 8), &m);
    free(words);
    return 0;
}
