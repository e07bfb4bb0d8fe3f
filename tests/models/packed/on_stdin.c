/* The kernels as a program, to run them where torch does not: cases from stdin, results to stdout. */
#include <stdio.h>

#include SOURCE

static void *take(size_t bytes) {
    char *place = malloc(bytes ? bytes : 1);
    if (!place || fread(place, 1, bytes, stdin) != bytes) exit(1);
    return place;
}

/* Merged weights of the case: its inputs are A, what came out of it is B. */
#define MERGE(name, value)                                                                                        \
    static int name##_merged(const void *values, const void *mask, const void *offsets, const value *x,           \
                             const value *out, const void *thresholds, void *merged, const int64_t *size) {       \
        int64_t rows = size[1], columns = size[2], rank = size[3];                                                \
        float *A = malloc((size_t)(rank * columns * 4)), *B = malloc((size_t)(rank * rows * 4));                  \
        for (int64_t i = 0; i < rank * columns; i++) A[i] = name##_to_float(x[i]);                                \
        for (int64_t i = 0; i < rank * rows; i++) B[i % rows * rank + i / rows] = name##_to_float(out[i]);        \
        int failed = name##_merge(values, mask, offsets, A, B, thresholds, merged, rows, columns, rank, columns, columns, \
                                  NULL, NULL, 0, 0, 0, 0);                                                        \
        free(A), free(B);                                                                                         \
        return failed;                                                                                            \
    }
MERGE(f32, float)
MERGE(bf16, uint16_t)

#define ANSWER(name)                                                                                               \
    if (name##_linear(values, mask, offsets, bias, x, out, rows, columns, batch, scales, zeros, bits, group, 0)) return 1; \
    name##_unpack(values, mask, offsets, plain, rows, columns, scales, zeros, bits, group);                        \
    if (!bits && name##_merged(values, mask, offsets, x, out, thresholds, merged, size)) return 1;                 \
    if (!bits && name##_merged(plain, NULL, NULL, x, out, thresholds, again, size)) return 1;

int main(void) {
    /* bytes a value, rows, columns, batch, bytes of the values, whether there is a bias, bits of codes or 0, their group,
     * whether there are zeros */
    int64_t size[9];
    while (fread(size, sizeof size, 1, stdin) == 1) {
        int64_t bytes = size[0], rows = size[1], columns = size[2], batch = size[3], bits = size[6], group = size[7];
        int64_t groups = bits ? rows * ((columns + group - 1) / group) : 0, *offsets = take((size_t)(rows * 8));
        uint32_t *mask = take((size_t)(rows * ((columns + 31) / 32) * 4));
        void *values = take((size_t)size[4]), *x = take((size_t)(batch * columns * bytes));
        void *bias = size[5] ? take((size_t)(rows * bytes)) : NULL;
        void *scales = bits ? take((size_t)(groups * bytes)) : NULL, *zeros = size[8] ? take((size_t)groups) : NULL;
        void *out = malloc((size_t)(batch * rows * bytes)), *plain = malloc((size_t)(rows * columns * bytes));
        void *thresholds = bytes == 2 && !bits ? take((size_t)(PERIOD * columns * 4)) : NULL;
        void *merged = malloc((size_t)(rows * columns * bytes)), *again = malloc((size_t)(rows * columns * bytes));
        if (bytes == 4) {
            ANSWER(f32)
        } else {
            ANSWER(bf16)
        }
        fwrite(out, (size_t)bytes, (size_t)(batch * rows), stdout);
        fwrite(plain, (size_t)bytes, (size_t)(rows * columns), stdout);
        if (!bits) fwrite(merged, (size_t)bytes, (size_t)(rows * columns), stdout);
        if (!bits) fwrite(again, (size_t)bytes, (size_t)(rows * columns), stdout);
        void *taken[] = {offsets, mask, values, x, bias, scales, zeros, thresholds, out, plain, merged, again};
        for (size_t i = 0; i < sizeof taken / sizeof *taken; i++) free(taken[i]);
    }
    return 0;
}
