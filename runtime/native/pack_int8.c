/* How MatMulInt8 lays a weight out. */
#include "int8.h"

enum { STRIP = 4 }; /* columns that a product takes at once */

void pack_int8(const Int8Weight *w, const int8_t *from, int8_t *codes, int32_t *sums) {
    const int64_t rows = padded_rows(w), columns = padded_columns(w);
    for (int64_t n = 0; n < rows; n++) sums[n] = 0;
    /* By columns on the outside: the source is read once from its beginning to its end. */
    for (int64_t column = 0; column < columns; column += STRIP)
        for (int64_t tile = 0; tile < rows; tile += OUTPUTS) {
            int8_t *to = codes + tile * columns + column * OUTPUTS;
            for (int64_t i = 0; i < OUTPUTS; i++)
                for (int64_t j = 0; j < STRIP; j++) {
                    const int inside = tile + i < w->rows && column + j < w->columns;
                    const int8_t code = inside ? from[(column + j) * w->rows + tile + i] : 0;
                    to[i * STRIP + j] = code;
                    sums[tile + i] += code;
                }
        }
}
