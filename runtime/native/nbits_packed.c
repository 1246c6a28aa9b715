/* Weights in blocks, laid out for the kernels that multiply with them: once, however many sessions have them.
 *
 * A bundle's sessions for prompts and for steps both have the head, and a process may open a bundle twice; each maps the
 * file for itself. Whether two weights are the same is seen by their bytes, tile by tile: others differ in the first.
 */
#include "nbits.h"
#include "release_pages.h"
#include "weight_memory.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { READ_AT_A_TIME = 8 << 20 }; /* bytes of the file that are resident beside what was made of them */

typedef struct Packed {
    struct Packed *next;
    const Kernels *kernels;
    Weight weight; /* only what the layout depends on */
    uint8_t *memory;
    int users;
} Packed;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Packed *all;

static int64_t tiles_of(const Kernels *kernels, const Weight *w) {
    return (w->rows + kernels->tile - 1) / kernels->tile;
}

static int has_format(const Packed *packed, const Kernels *kernels, const Weight *w) {
    const Weight *other = &packed->weight;
    return packed->kernels == kernels && other->rows == w->rows && other->columns == w->columns &&
           other->bits == w->bits && other->block == w->block && other->half == w->half &&
           (other->zeros == NULL) == (w->zeros == NULL);
}

/* From the second tile on. */
static int is_rest_same(const Packed *packed, const Kernels *kernels, const Weight *w, uint8_t *room) {
    const int64_t bytes = kernels->tile_bytes(w);
    for (int64_t tile = 1; tile < tiles_of(kernels, w); tile++) {
        kernels->pack_tile(w, tile, room);
        if (memcmp(room, packed->memory + tile * bytes, bytes) != 0) return 0;
    }
    return 1;
}

static Packed *find(const Kernels *kernels, const Weight *w) {
    const int64_t bytes = (kernels->tile_bytes(w) + 63) / 64 * 64;
    uint8_t *first = aligned_alloc(64, 2 * bytes), *other = first + bytes;
    if (first == NULL) return NULL; /* then it is laid out once more, or not at all */
    kernels->pack_tile(w, 0, first);
    Packed *packed = all;
    for (; packed != NULL; packed = packed->next)
        if (has_format(packed, kernels, w) && memcmp(first, packed->memory, kernels->tile_bytes(w)) == 0 &&
            is_rest_same(packed, kernels, w, other))
            break;
    free(first);
    return packed;
}

static Packed *make(const Kernels *kernels, const Weight *w) {
    const int64_t bytes = kernels->tile_bytes(w), tiles = tiles_of(kernels, w);
    Packed *packed = malloc(sizeof *packed);
    uint8_t *memory = packed == NULL ? NULL : weight_memory(tiles * bytes);
    if (memory == NULL) {
        free(packed);
        return NULL;
    }
    const int64_t of_tile = kernels->tile * weight_row_bytes(w), together = READ_AT_A_TIME / of_tile + 1;
    for (int64_t tile = 0; tile < tiles; tile++) {
        kernels->pack_tile(w, tile, memory + tile * bytes);
        const int64_t since = tile % together + 1, first = tile + 1 - since;
        if (since == together && tile + 1 < tiles) release_file_pages(w->codes + first * of_tile, since * of_tile);
    }
    *packed = (Packed){all, kernels, *w, memory, 0};
    return all = packed;
}

static int has_half_scales(const Weight *w) {
    uint16_t half;
    for (int64_t i = 0; i < w->rows * w->blocks; i++)
        if (!exact_half(w->scales[i], &half)) return 0;
    return 1;
}

void pack_weight(const Kernels *kernels, Weight *w) {
    w->half = has_half_scales(w);
    pthread_mutex_lock(&lock);
    Packed *packed = find(kernels, w);
    if (packed == NULL) packed = make(kernels, w);
    if (packed != NULL) packed->users++;
    release_file_pages(w->codes, w->rows * weight_row_bytes(w));
    release_file_pages(w->scales, w->rows * w->blocks * (int64_t)sizeof(float));
    if (w->zeros != NULL) release_file_pages(w->zeros, w->rows * weight_zero_bytes(w));
    pthread_mutex_unlock(&lock);
    w->packed = packed == NULL ? NULL : packed->memory;
}

void release_weight(const uint8_t *memory) {
    pthread_mutex_lock(&lock);
    for (Packed **at = &all; memory != NULL && *at != NULL; at = &(*at)->next) {
        Packed *packed = *at;
        if (packed->memory != memory) continue;
        if (--packed->users == 0) {
            *at = packed->next;
            free_weight_memory(packed->memory);
            free(packed);
        }
        break;
    }
    pthread_mutex_unlock(&lock);
}
