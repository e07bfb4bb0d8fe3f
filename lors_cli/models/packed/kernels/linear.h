/* Products of one data type, included once for each: T(name) is name with the type's prefix, VALUE the type stored.
 *
 * Every output is the sum of one row times one input, always in the same order: its bits depend neither on the number
 * of threads nor on what else is in the batch.
 */

/* The inputs in tiles of `width`, in each [word][input][32], columns past the last one zero. */
static void T(lay_out)(const struct linear *l, T(input) *to) {
    for (int64_t item = 0; item < l->batch; item += l->width) {
        int64_t width = MIN(l->width, l->batch - item);
        for (int64_t b = 0; b < width; b++) {
            const VALUE *from = (const VALUE *)l->x + (item + b) * l->columns;
            int64_t whole = l->columns / 32;
            for (int64_t c = 0; c < whole; c++) T(prepare)(to + (c * width + b) * 32, from + c * 32, 32);
            if (whole < l->words)
                T(prepare)(to + (whole * width + b) * 32, from + whole * 32, (int)(l->columns % 32));
        }
        to += width * l->words * 32;
    }
}

/* Row `row` as it was before packing: its first `columns`, every 32 of them `step` words after the last. */
static void T(restore)(const struct linear *l, int64_t row, VALUE *to, int64_t step, int64_t columns) {
    const VALUE *next = (const VALUE *)l->values + l->offsets[row];
    for (int64_t c = 0; c * 32 < columns; c++, to += step * 32) {
        uint32_t bits = l->mask[row * l->words + c];
        T(word) w = T(expand)(next, bits);
        next += __builtin_popcount(bits);
        VALUE last[32];
        int whole = columns - c * 32 >= 32;
        T(store)(whole ? to : last, w);
        if (!whole) memcpy(to, last, (size_t)(columns - c * 32) * sizeof(VALUE));
    }
}

/* `height` rows times `width` inputs, which are the batch's from `item` on; all sums stay in registers.
 * The rows are packed, or lie at `dense`: in a panel, [word][row][32], or plain one after the other. */
ALWAYS_INLINE void T(block)(const struct linear *l, const enum rows_are are, const VALUE *dense, int64_t row,
                            const int height, const T(input) *x, int64_t item, const int width) {
    const int64_t words = l->words;
    const uint32_t *mask = are == PACKED ? l->mask + row * words : NULL;
    const VALUE *next[MAX_HEIGHT];
    sums s[MAX_HEIGHT][MAX_WIDTH];
    UNROLL for (int r = 0; r < height; r++) {
        next[r] = are == PACKED ? (const VALUE *)l->values + l->offsets[row + r]
                                : dense + r * (are == IN_PANEL ? 32 : words * 32);
        UNROLL for (int b = 0; b < width; b++) s[r][b] = no_sums();
    }
    /* rows after these are fetched into the second cache meanwhile, their masks too */
    int64_t later = height * (FETCH_AHEAD / (height * words * 16 * (int64_t)sizeof(VALUE)) + 1);
    later = MIN(later, l->rows - 1 - row);
    int64_t ahead = are == PACKED ? l->offsets[row + later] - l->offsets[row] : later * words * 32;
    for (int64_t c = 0; c < words; c++) {
        if (are == PACKED && c % 16 == 0)
            UNROLL for (int r = 0; r < height; r++) __builtin_prefetch(mask + (later + r) * words + c, 0, 2);
        T(item) items[MAX_WIDTH];
        UNROLL for (int b = 0; b < width; b++) items[b] = T(fetch)(x + (c * width + b) * 32);
        UNROLL for (int r = 0; r < height; r++) {
            if (are != IN_PANEL) __builtin_prefetch(next[r] + ahead, 0, 2);
            uint32_t bits = are == PACKED ? mask[r * words + c] : 0;
            T(word) w = are == PACKED ? T(expand)(next[r], bits) : T(load)(next[r]);
            next[r] += are == PACKED ? __builtin_popcount(bits) : are == IN_PANEL ? height * 32 : 32;
            UNROLL for (int b = 0; b < width; b++) s[r][b] = T(dot)(s[r][b], w, items[b]);
        }
    }
    float bias[MAX_HEIGHT] = {0};
    for (int r = 0; r < height && l->bias; r++) bias[r] = T(to_float)(((const VALUE *)l->bias)[row + r]);
    UNROLL for (int b = 0; b < width; b++) {
        sums column[MAX_HEIGHT];
        UNROLL for (int r = 0; r < MAX_HEIGHT; r++) column[r] = r < height ? s[r][b] : no_sums();
        float totals[MAX_HEIGHT];
        add_up(totals, column);
        VALUE *out = (VALUE *)l->out + (item + b) * l->rows + row;
        UNROLL for (int r = 0; r < height; r++) out[r] = T(from_float)(totals[r] + bias[r]);
    }
}

/* Rows from `row` to `end` times the tile of inputs that begins with `item`. */
ALWAYS_INLINE void T(rows)(const struct linear *l, const enum rows_are are, const VALUE *dense, int64_t row,
                           int64_t end, int64_t item) {
    const T(input) *x = (const T(input) *)l->input + item * l->words * 32;
    const int64_t first = row;
#define BLOCK(height, width) \
    T(block)(l, are, are == PACKED ? NULL : dense + (row - first) * l->words * 32, row, height, x, item, width)
#define CASE(width)                                                                                       \
    case width: {                                                                                         \
        const int height = are == IN_PANEL ? GROUP : HEIGHT(width);                                          \
        if (are == IN_PANEL && width > TILE_WIDTH) break;                                                    \
        for (; row + height <= end; row += height) BLOCK(height, width);                                  \
        for (; row < end; row++) BLOCK(1, width);                                                         \
        break;                                                                                            \
    }
    switch (MIN(l->width, l->batch - item)) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
#undef CASE
#undef BLOCK
}

/* Larger batches: some rows are restored into the cache, for all tiles of inputs. */
static void T(many)(const struct linear *l, VALUE *panel, int64_t row, int64_t end) {
    for (int64_t stop; row < end; row = stop) {
        stop = MIN(row + PANEL, end);
        int64_t grouped = (stop - row) / GROUP * GROUP;
        for (int64_t r = 0; r < stop - row; r++) {
            int64_t height = r < grouped ? GROUP : 1; /* rows after the last whole group lie alone */
            VALUE *to = panel + (r / height * height * l->words + r % height) * 32;
            T(restore)(l, row + r, to, height, l->words * 32);
        }
        for (int64_t item = 0; item < l->batch; item += l->width) T(rows)(l, IN_PANEL, panel, row, stop, item);
    }
}

/* One thread's rows. */
static void T(share)(int64_t row, int64_t end, void *context) {
    struct linear *l = context;
    if (l->batch <= MAX_WIDTH) {
        T(rows)(l, PACKED, NULL, row, end, 0); /* each is expanded in registers */
        return;
    }
    VALUE *panel = malloc((size_t)(PANEL * l->words * 32) * sizeof(VALUE));
    if (panel) T(many)(l, panel, row, end);
    else l->failed = 1;
    free(panel);
}

static void T(restore_share)(int64_t row, int64_t end, void *context) {
    const struct linear *l = context;
    for (; row < end; row++) T(restore)(l, row, (VALUE *)l->out + row * l->columns, 1, l->columns);
}

/* All rows with all inputs; 0, or 1 without memory. */
static int T(product)(struct linear *l, share_of_rows *share) {
    int64_t tiles = l->batch <= MAX_WIDTH ? 1 : (l->batch + TILE_WIDTH - 1) / TILE_WIDTH;
    l->width = (l->batch + tiles - 1) / tiles;
    T(input) *input = malloc((size_t)(l->batch * l->words * 32) * sizeof(T(input)));
    if (!input) return 1;
    T(lay_out)(l, input);
    l->input = input;
    in_parallel(share, l->rows, l->columns * l->batch, l);
    free(input);
    return l->failed;
}

/* out[batch, rows] = x[batch, columns] times the packed rows, and the bias where there is one; 0, or 1 without memory. */
int T(linear)(const VALUE *values, const uint32_t *mask, const int64_t *offsets, const VALUE *bias, const VALUE *x,
              VALUE *out, int64_t rows, int64_t columns, int64_t batch) {
    struct linear l = {values, mask, offsets, bias, x, out, rows, columns, batch, .words = (columns + 31) / 32};
    return T(product)(&l, T(share));
}

/* out[rows, columns] = the rows as they were before packing. */
void T(unpack)(const VALUE *values, const uint32_t *mask, const int64_t *offsets, VALUE *out, int64_t rows,
               int64_t columns) {
    struct linear l = {values, mask, offsets, .out = out, .rows = rows, .columns = columns,
                       .words = (columns + 31) / 32};
    in_parallel(T(restore_share), rows, columns, &l);
}

#ifdef DENSE /* for comparison: a plain matrix, its columns a multiple of 32 */
static void T(dense_share)(int64_t row, int64_t end, void *context) {
    const struct linear *l = context;
    const VALUE *dense = (const VALUE *)l->values + row * l->columns;
    for (int64_t item = 0; item < l->batch; item += l->width) T(rows)(l, PLAIN, dense, row, end, item);
}

int T(dense_linear)(const VALUE *values, const VALUE *x, VALUE *out, int64_t rows, int64_t columns, int64_t batch) {
    struct linear l = {.values = values, .x = x, .out = out, .rows = rows, .columns = columns, .batch = batch,
                       .words = columns / 32};
    return T(product)(&l, T(dense_share));
}
#endif
