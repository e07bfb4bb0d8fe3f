/* Products of one data type, included once for each: T(name) is name with the type's prefix, VALUE the type stored.
 *
 * Every output is the sum of one row times one input, always in the same order: its bits depend neither on the number
 * of threads nor on what else is in the batch.
 */

/* The inputs in tiles of `width`, in each [word][input][32], columns past the last one zero. */
static void T(lay_out)(const struct linear *l, T(input) *to) {
    const int step = l->in_pairs ? 2 : 1;
    for (int64_t item = 0; item < l->batch; item += l->width) {
        int64_t width = MIN(l->width, l->batch - item);
        for (int64_t b = 0; b < width; b++) {
            const VALUE *from = (const VALUE *)l->x + (item + b) * l->columns;
            for (int64_t c = 0; c < l->words; c += step) {
                T(input) *place = to + (c * width + b) * 32;
                int count = (int)MIN(l->columns - c * 32, step * 32);
                if (step == 2) T(prepare_pair)(place, width * 32, from + c * 32, count);
                else T(prepare)(place, from + c * 32, count);
            }
        }
        to += width * l->words * 32;
    }
}

/* Where a row is read: what comes next, and what its group's codes stand for. */
typedef struct { const uint8_t *next; T(table) table; float scale; } T(reader);

ALWAYS_INLINE T(table) T(table_of_group)(const struct linear *l, int64_t group) {
    return T(table_of)(T(to_float)(((const VALUE *)l->scales)[group]), l->zeros[group & l->has_zeros]);
}

/* At the first word `c` of a group: what codes stand for in the words that are read together. */
ALWAYS_INLINE void T(begin_group)(const struct linear *l, const enum rows_are are, int64_t row, int64_t c, T(reader) *from) {
    int64_t group = row * l->groups + (c >> l->group_shift);
    if (are == CODES_8) {
        from->scale = T(to_float)(((const VALUE *)l->scales)[group]);
        return;
    }
    from->table = T(table_of_group)(l, group);
    if (T(STEP) == 2 && l->group_shift == 0 && c + 1 < l->mask_words)
        from->table = T(two_tables)(from->table, T(table_of_group)(l, group + 1));
}

/* `to` = the next words of a row: of codes of 4 bits STEP, of all else one. `mask` is theirs, of `left` that are left
 * of the row; a panel's words follow `apart` after each other. */
ALWAYS_INLINE void T(read)(const enum rows_are are, const uint32_t *mask, int64_t left, int64_t apart, T(reader) *from,
                           T(word) *to) {
    if (are == PACKED) {
        to[0] = T(expand)((const VALUE *)from->next, *mask);
        from->next += (size_t)__builtin_popcount(*mask) * sizeof(VALUE);
    } else if (are == CODES_4 || are == HALF_4) {
        uint64_t bits = 0;
        if (T(STEP) == 2 && left > 1) memcpy(&bits, mask, sizeof bits);
        else bits = *mask;
        T(expand_4)(to, &from->next, bits, are == HALF_4, from->table);
    } else if (are == CODES_8) {
        to[0] = T(expand_8)(from->next, *mask, from->scale);
        from->next += __builtin_popcount(*mask);
    } else if (are == PLAIN_4) {
        T(load_4)(to, from->next, from->table);
        from->next += T(STEP) * 16;
    } else {
        to[0] = T(load)((const VALUE *)from->next);
        from->next += (size_t)apart * 32 * sizeof(VALUE);
    }
}

/* Row `row` as it was before packing: its first `columns`, every 32 of them `apart` words after the last; those that
 * are read in pairs are put in order, or left as they are multiplied. */
ALWAYS_INLINE void T(restore_as)(const struct linear *l, const enum rows_are are, int64_t row, VALUE *to, int64_t apart,
                                 int64_t columns, int in_order) {
    const int step = are == CODES_4 ? T(STEP) : 1;
    const int64_t group_end = (1 << l->group_shift) - 1;
    T(reader) from = {.next = l->values + l->offsets[row] * (are == PACKED ? (int64_t)sizeof(VALUE) : 1)};
    for (int64_t c = 0; c * 32 < columns; c += step) {
        T(word) w[2];
        if (are != PACKED && (c & group_end) == 0) T(begin_group)(l, are, row, c, &from);
        T(read)(are, l->mask + row * l->mask_words + c, l->mask_words - c, 1, &from, w);
        if (step == 2 && in_order) T(put_in_order)(w);
        for (int i = 0; i < step && (c + i) * 32 < columns; i++, to += apart * 32) {
            VALUE last[32];
            int whole = columns - (c + i) * 32 >= 32;
            T(store)(whole ? to : last, w[i]);
            if (!whole) memcpy(to, last, (size_t)(columns - (c + i) * 32) * sizeof(VALUE));
        }
    }
}

static void T(restore)(const struct linear *l, int64_t row, VALUE *to, int64_t apart, int64_t columns, int in_order) {
    if (l->bits == 4) T(restore_as)(l, CODES_4, row, to, apart, columns, in_order);
    else if (l->bits == 8) T(restore_as)(l, CODES_8, row, to, apart, columns, in_order);
    else T(restore_as)(l, PACKED, row, to, apart, columns, in_order);
}

/* `height` rows times `width` inputs, which are the batch's from `item` on; all sums stay in registers.
 * The rows are packed, or lie in a panel, [word][row][32], or plain one after the other. */
ALWAYS_INLINE void T(block)(const struct linear *l, const enum rows_are are, const VALUE *panel, int64_t row,
                            const int height, const T(input) *x, int64_t item, const int width) {
    const int packed = are == PACKED || are == CODES_4 || are == HALF_4 || are == CODES_8;
    const int coded = are == CODES_4 || are == HALF_4 || are == CODES_8 || are == PLAIN_4;
    const int step = coded && are != CODES_8 ? T(STEP) : 1;
    const int64_t words = l->words, size = are == PACKED ? sizeof(VALUE) : 1; /* of what offsets count */
    const int64_t row_bytes = are == PLAIN_4 ? words * 16 : words * 32 * (int64_t)sizeof(VALUE); /* of a plain row */
    T(reader) from[MAX_HEIGHT];
    sums s[MAX_HEIGHT][MAX_WIDTH];
    UNROLL for (int r = 0; r < height; r++) {
        const uint8_t *begin = packed ? l->values + l->offsets[row + r] * size
                             : are == IN_PANEL ? (const uint8_t *)(panel + r * 32) : l->values + (row + r) * row_bytes;
        from[r] = (T(reader)){.next = begin};
        UNROLL for (int b = 0; b < width; b++) s[r][b] = no_sums();
    }
    /* rows after these are fetched into the second cache meanwhile, their masks and scales too */
    const int64_t usual = words * (are == CODES_4 || are == HALF_4 ? 8 : are == CODES_8 ? 16 : 16 * (int64_t)sizeof(VALUE));
    int64_t later = height * (FETCH_AHEAD / (height * usual) + 1);
    later = MIN(later, l->rows - 1 - row);
    const int64_t ahead = packed ? (l->offsets[row + later] - l->offsets[row]) * size : later * row_bytes;
    const int often = are == HALF_4 ? 8 : are == CODES_4 || are == PLAIN_4 ? 4 : are == CODES_8 ? 2 : 1; /* a line at most */
    const uint32_t *mask = packed ? l->mask + row * l->mask_words : NULL;
    const int64_t mask_words = l->mask_words, group_end = (1 << l->group_shift) - 1;
    for (int64_t c = 0; c < words; c += step) {
        int64_t apart = mask_words;
        __asm__("" : "+r"(apart)); /* or each row would have a pointer, more than there are registers */
        if (packed && c % 16 == 0)
            UNROLL for (int r = 0; r < height; r++) __builtin_prefetch(mask + (later + r) * apart + c, 0, 2);
        if (coded && (c & group_end) == 0)
            UNROLL for (int r = 0; r < height; r++) T(begin_group)(l, are, row + r, c, &from[r]);
        if (coded && c % 64 == 0)
            UNROLL for (int r = 0; r < height; r++)
                __builtin_prefetch((const VALUE *)l->scales + (row + later + r) * l->groups + (c >> l->group_shift), 0, 2);
        if (are != IN_PANEL && c % often == 0)
            UNROLL for (int r = 0; r < height; r++) __builtin_prefetch(from[r].next + ahead, 0, 2);
        T(word) w[MAX_HEIGHT][2];
        UNROLL for (int r = 0; r < height; r++)
            T(read)(are, packed ? mask + r * apart + c : NULL, mask_words - c, are == IN_PANEL ? height : 1, &from[r],
                    w[r]);
        UNROLL for (int i = 0; i < step; i++) UNROLL for (int b = 0; b < width; b++) {
            T(item) item = T(fetch)(x + ((c + i) * width + b) * 32);
            UNROLL for (int r = 0; r < height; r++) s[r][b] = T(dot)(s[r][b], w[r][i], item);
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

/* Rows from `row` to `end`, which may lie in a panel, times the tile of inputs that begins with `item`. */
ALWAYS_INLINE void T(rows)(const struct linear *l, const enum rows_are are, const VALUE *panel, int64_t row,
                           int64_t end, int64_t item) {
    const T(input) *x = (const T(input) *)l->input + item * l->words * 32;
    const int64_t first = row;
#define BLOCK(height, width) \
    T(block)(l, are, are == IN_PANEL ? panel + (row - first) * l->words * 32 : NULL, row, height, x, item, width)
#define CASE(width)                                                                                       \
    case width: {                                                                                         \
        const int height = are == IN_PANEL ? GROUP : HEIGHT(width);                                       \
        if (are == IN_PANEL && width > TILE_WIDTH) break;                                                 \
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
            T(restore)(l, row + r, to, height, l->words * 32, 0);
        }
        for (int64_t item = 0; item < l->batch; item += l->width) T(rows)(l, IN_PANEL, panel, row, stop, item);
    }
}

/* One thread's rows. */
static void T(share)(int64_t row, int64_t end, void *context) {
    struct linear *l = context;
    if (l->batch <= MAX_WIDTH) { /* each is expanded in registers */
        if (T(STEP) == 2 && l->bits == 4 && l->half) T(rows)(l, HALF_4, NULL, row, end, 0);
        else if (l->bits == 4) T(rows)(l, CODES_4, NULL, row, end, 0);
        else if (l->bits == 8) T(rows)(l, CODES_8, NULL, row, end, 0);
        else T(rows)(l, PACKED, NULL, row, end, 0);
        return;
    }
    VALUE *panel = malloc((size_t)(PANEL * l->words * 32) * sizeof(VALUE));
    if (panel) T(many)(l, panel, row, end);
    else l->failed = 1;
    free(panel);
}

static void T(restore_share)(int64_t row, int64_t end, void *context) {
    const struct linear *l = context;
    for (; row < end; row++) T(restore)(l, row, (VALUE *)l->out + row * l->columns, 1, l->columns, 1);
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

/* A packed weight; without zeros that of all groups is the middle code. */
static struct linear T(packed)(const void *values, const uint32_t *mask, const int64_t *offsets, int64_t rows,
                               int64_t columns, const void *scales, const uint8_t *zeros, int64_t bits,
                               int64_t group_size, int64_t half) {
    struct linear l = {.values = values, .mask = mask, .offsets = offsets, .rows = rows, .columns = columns,
                       .mask_words = (columns + 31) / 32, .scales = scales, .zeros = zeros ? zeros : &middle,
                       .has_zeros = zeros ? -1 : 0, .bits = bits, .half = half != 0};
    l.in_pairs = bits == 4 && T(STEP) == 2;
    l.words = l.mask_words + (l.in_pairs && l.mask_words % 2);
    if (bits) {
        l.groups = (columns + group_size - 1) / group_size;
        l.group_shift = __builtin_ctzll((unsigned long long)group_size / 32);
    }
    return l;
}

/* out[batch, rows] = x[batch, columns] times the packed rows, and the bias where there is one; 0, or 1 without memory.
 * `bits` is 0 where values are packed as they are; of codes there are scales, and zeros where these are not 8; `half`
 * says of them that each whole word of the mask keeps 16. */
int T(linear)(const void *values, const uint32_t *mask, const int64_t *offsets, const VALUE *bias, const VALUE *x,
              VALUE *out, int64_t rows, int64_t columns, int64_t batch, const VALUE *scales, const uint8_t *zeros,
              int64_t bits, int64_t group_size, int64_t half) {
    struct linear l = T(packed)(values, mask, offsets, rows, columns, scales, zeros, bits, group_size, half);
    l.bias = bias, l.x = x, l.out = out, l.batch = batch;
    return T(product)(&l, T(share));
}

/* out[rows, columns] = the rows as they were before packing. */
void T(unpack)(const void *values, const uint32_t *mask, const int64_t *offsets, VALUE *out, int64_t rows,
               int64_t columns, const VALUE *scales, const uint8_t *zeros, int64_t bits, int64_t group_size) {
    struct linear l = T(packed)(values, mask, offsets, rows, columns, scales, zeros, bits, group_size, 0);
    l.out = out;
    in_parallel(T(restore_share), rows, columns, &l);
}

#ifdef DENSE /* for comparison: a plain matrix, or one of codes of 4 bits; its columns a multiple of 64 */
static void T(dense_share)(int64_t row, int64_t end, void *context) {
    const struct linear *l = context;
    for (int64_t item = 0; item < l->batch; item += l->width)
        if (l->bits) T(rows)(l, PLAIN_4, NULL, row, end, item);
        else T(rows)(l, PLAIN, NULL, row, end, item);
}

int T(dense_linear)(const void *values, const VALUE *x, VALUE *out, int64_t rows, int64_t columns, int64_t batch,
                    const VALUE *scales, const uint8_t *zeros, int64_t bits, int64_t group_size) {
    struct linear l = T(packed)(values, NULL, NULL, rows, columns, scales, zeros, bits, group_size, 0);
    l.x = x, l.out = out, l.batch = batch;
    return T(product)(&l, T(dense_share));
}
#endif
