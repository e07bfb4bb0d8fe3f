/* The kernels as a program, to run them where torch does not: cases from stdin, results to stdout. */
#include <stdio.h>

#include SOURCE

static void *take(size_t bytes) {
    char *place = malloc(bytes + 64);
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
        return name##_merge(values, mask, offsets, A, B, thresholds, merged, rows, columns, rank, columns, columns); \
    }
MERGE(f32, float)
MERGE(bf16, uint16_t)

int main(void) {
    int64_t size[6]; /* bytes a value, rows, columns, batch, kept values with the zeros after them, whether there is a bias */
    while (fread(size, sizeof size, 1, stdin) == 1) {
        int64_t bytes = size[0], rows = size[1], columns = size[2], batch = size[3];
        int64_t *offsets = take((size_t)(rows * 8));
        uint32_t *mask = take((size_t)(rows * ((columns + 31) / 32) * 4));
        void *values = take((size_t)(size[4] * bytes)), *x = take((size_t)(batch * columns * bytes));
        void *bias = size[5] ? take((size_t)(rows * bytes)) : NULL;
        void *out = malloc((size_t)(batch * rows * bytes)), *plain = malloc((size_t)(rows * columns * bytes));
        void *thresholds = bytes == 2 ? take((size_t)(PERIOD * columns * 4)) : NULL;
        void *merged = malloc((size_t)(rows * columns * bytes)), *again = malloc((size_t)(rows * columns * bytes));
        if (bytes == 4) {
            if (f32_linear(values, mask, offsets, bias, x, out, rows, columns, batch)) return 1;
            f32_unpack(values, mask, offsets, plain, rows, columns);
            if (f32_merged(values, mask, offsets, x, out, NULL, merged, size)) return 1;
            if (f32_merged(plain, NULL, NULL, x, out, NULL, again, size)) return 1;
        } else {
            if (bf16_linear(values, mask, offsets, bias, x, out, rows, columns, batch)) return 1;
            bf16_unpack(values, mask, offsets, plain, rows, columns);
            if (bf16_merged(values, mask, offsets, x, out, thresholds, merged, size)) return 1;
            if (bf16_merged(plain, NULL, NULL, x, out, thresholds, again, size)) return 1;
        }
        fwrite(out, (size_t)bytes, (size_t)(batch * rows), stdout);
        fwrite(plain, (size_t)bytes, (size_t)(rows * columns), stdout);
        fwrite(merged, (size_t)bytes, (size_t)(rows * columns), stdout);
        fwrite(again, (size_t)bytes, (size_t)(rows * columns), stdout);
    }
    return 0;
}
