/* Memory of a mapped file that was read once: given back, or all weights would be resident twice while a model opens. */
#pragma once

#include <stdint.h>

#ifdef __linux__
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGES_AT_A_TIME = 512, OF_FILE = 61, SWAPPED, RESIDENT }; /* bits of an entry, proc_pid_pagemap(5) */

/* Whole pages within [from, from + size) that are the file's own, not a copy that somebody wrote to; they come back by
 * themselves when they are read again. The caller knows that nobody unmaps them meanwhile. */
static inline void release_file_pages(const void *from, int64_t size) {
    const int64_t page = sysconf(_SC_PAGESIZE), first = ((int64_t)(intptr_t)from + page - 1) / page;
    const int64_t last = ((int64_t)(intptr_t)from + size) / page;
    const int map = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    uint64_t entries[PAGES_AT_A_TIME];
    for (int64_t at = first; map >= 0 && at < last; at += PAGES_AT_A_TIME) {
        const int64_t count = last - at < PAGES_AT_A_TIME ? last - at : PAGES_AT_A_TIME;
        const int64_t bytes = count * (int64_t)sizeof(uint64_t);
        if (pread(map, entries, bytes, at * (int64_t)sizeof(uint64_t)) != bytes) break;
        int clean = 1;
        for (int64_t i = 0; i < count; i++) {
            const int resident = entries[i] >> RESIDENT & 1, of_file = entries[i] >> OF_FILE & 1;
            clean &= resident ? of_file : !(entries[i] >> SWAPPED & 1);
        }
        if (clean && madvise((void *)(intptr_t)(at * page), count * page, MADV_DONTNEED) != 0) break;
    }
    if (map >= 0) close(map);
}

#else
static inline void release_file_pages(const void *from, int64_t size) { (void)from, (void)size; }
#endif
