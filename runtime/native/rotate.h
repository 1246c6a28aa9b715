/* What attention of frames and of decoders share. */
#pragma once

#include <stdint.h>

#include "compiler.h"

#define LOG2_E 1.44269504f
#define UNSEEN (-1e30f) /* the score of what is not seen; finite, so that differences of it are numbers */

/* factor × [x1 cos - x2 sin, x2 cos + x1 sin], x1 and x2 being the halves of x. */
INLINE void rotate(const float *restrict x, const float *restrict cosine, const float *restrict sine, int64_t half,
                   float factor, float *restrict out) {
    for (int64_t i = 0; i < half; i++) {
        out[i] = (x[i] * cosine[i] - x[half + i] * sine[i]) * factor;
        out[half + i] = (x[half + i] * cosine[i] + x[i] * sine[i]) * factor;
    }
}
