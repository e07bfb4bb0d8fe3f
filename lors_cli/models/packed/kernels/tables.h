/* Shuffles that spread the next values over the set bits of a byte or nibble; places without a value become zero. */

static int8_t eight_places[256][8];                                   /* which value, -1 for none */
static uint8_t eight_halves[256][16] __attribute__((aligned(16)));    /* which bytes, of two-byte values */
static uint8_t four_words[16][16] __attribute__((aligned(16), unused)); /* which bytes, of four-byte values */

__attribute__((constructor)) static void fill_tables(void) {
    for (int bits = 0; bits < 256; bits++)
        for (int place = 0, value = 0; place < 8; place++) {
            int kept = bits >> place & 1 ? value++ : -1;
            eight_places[bits][place] = (int8_t)kept;
            for (int i = 0; i < 2; i++) eight_halves[bits][2 * place + i] = kept < 0 ? 0x80 : (uint8_t)(2 * kept + i);
            for (int i = 0; i < 4 && bits < 16 && place < 4; i++)
                four_words[bits][4 * place + i] = kept < 0 ? 0x80 : (uint8_t)(4 * kept + i);
        }
}
