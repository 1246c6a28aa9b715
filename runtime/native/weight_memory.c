/* Regions of huge pages, from which weights are cut one behind the other; a region goes with its last weight. */
#include "weight_memory.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#ifndef MAP_ANONYMOUS
#define MAP_ANONYMOUS MAP_ANON
#endif

enum { HUGE_PAGE = 2 << 20, REGION = 64 << 20, LINE = 64 };

typedef struct {
    char *memory;
    size_t size, used; /* used: what is behind it was never touched, and costs nothing */
    int weights;
} Region;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Region *newest; /* which the next weight is cut from, or NULL */

static size_t up_to(size_t size, size_t multiple) { return (size + multiple - 1) / multiple * multiple; }

static Region *new_region(size_t size) {
    Region *region = malloc(sizeof *region);
    if (region == NULL) return NULL;
    region->size = up_to(size > REGION ? size : REGION, HUGE_PAGE) + HUGE_PAGE;
    region->memory = mmap(NULL, region->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (region->memory == MAP_FAILED) {
        free(region);
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    madvise(region->memory, region->size, MADV_HUGEPAGE); /* a wish: small pages do as well */
#endif
    region->used = up_to((uintptr_t)region->memory, HUGE_PAGE) - (uintptr_t)region->memory;
    region->weights = 0;
    return region;
}

void *weight_memory(size_t size) {
    const size_t wanted = up_to(size, LINE) + LINE; /* the first line says which region it is of */
    char *memory = NULL;
    pthread_mutex_lock(&lock);
    if (newest == NULL || newest->size - newest->used < wanted) {
        Region *region = new_region(wanted);
        if (region != NULL) newest = region;
    }
    if (newest != NULL && newest->size - newest->used >= wanted) {
        memory = newest->memory + newest->used;
        newest->used += wanted;
        newest->weights++;
        *(Region **)memory = newest;
    }
    pthread_mutex_unlock(&lock);
    return memory == NULL ? NULL : memory + LINE;
}

void free_weight_memory(void *memory) {
    if (memory == NULL) return;
    pthread_mutex_lock(&lock);
    Region *region = *(Region **)((char *)memory - LINE);
    if (--region->weights == 0) {
        if (region == newest) newest = NULL;
        munmap(region->memory, region->size);
        free(region);
    }
    pthread_mutex_unlock(&lock);
}
