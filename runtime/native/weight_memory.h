/* Memory for weights that are laid out anew as a model opens. */
#pragma once

#include <stddef.h>

/* Zeros from a multiple of 64 bytes on, or NULL. Many weights share huge pages where the system has them: a step reads
 * every weight once, and with small pages waits for translations of addresses as well. */
void *weight_memory(size_t size);
void free_weight_memory(void *memory); /* NULL: nothing */
