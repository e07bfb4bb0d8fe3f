/* The kernels as a program, to run them where torch does not: cases from stdin, results to stdout. */
#include <stdio.h>

#include SOURCE

static void *take(size_t bytes) {
    char *place = malloc(bytes + 64);
    if (!place || fread(place, 1, bytes, stdin) != bytes) exit(1);
    return place;
}

int main(void) {
    int64_t size[6]; /* bytes a value, rows, columns, batch, kept values with the zeros after them, whether there is a bias */
    while (fread(size, sizeof size, 1, stdin) == 1) {
        int64_t bytes = size[0], rows = size[1], columns = size[2], batch = size[3];
        int64_t *offsets = take((size_t)(rows * 8));
        uint32_t *mask = take((size_t)(rows * ((columns + 31) / 32) * 4));
        void *values = take((size_t)(size[4] * bytes)), *x = take((size_t)(batch * columns * bytes));
        void *bias = size[5] ? take((size_t)(rows * bytes)) : NULL;
        void *out = malloc((size_t)(batch * rows * bytes)), *plain = malloc((size_t)(rows * columns * bytes));
        if (bytes == 4) {
            if (f32_linear(values, mask, offsets, bias, x, out, rows, columns, batch)) return 1;
            f32_unpack(values, mask, offsets, plain, rows, columns);
        } else {
            if (bf16_linear(values, mask, offsets, bias, x, out, rows, columns, batch)) return 1;
            bf16_unpack(values, mask, offsets, plain, rows, columns);
        }
        fwrite(out, (size_t)bytes, (size_t)(batch * rows), stdout);
        fwrite(plain, (size_t)bytes, (size_t)(rows * columns), stdout);
    }
    return 0;
}
