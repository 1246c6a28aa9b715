/* The operator CausalAttention of domain "edgevl": grouped-query attention of new tokens over a cache that it writes.
 *
 * Inputs: q float [batch, count, heads × dim], k and v float [batch, count, kv_heads × dim], or neither where q has
 * them behind its own; cos and sin float [batch, count, dim / 2], which rotate queries and keys in halves; past keys
 * and values float [batch, kv_heads, capacity, dim]; int32 [batch], where each row's last new token lies in the cache.
 * Attributes num_heads and kv_num_heads. Outputs: float [batch, count, heads × dim], and the cache with the new tokens
 * in it, which is not copied where past and present are one buffer. Scores are scaled by 1 / sqrt(dim).
 */
#include "nbits.h"
#include "operator.h"
#include "rotate.h"

#include <math.h>

enum {
    Q, K, V, COS, SIN, PAST_KEYS, PAST_VALUES, LAST, INPUTS,
    FEW_TOKENS = 8,        /* up to these, laying out the keys anew costs more than it saves */
    TOKENS_AT_A_TIME = 16, /* to rotate, or to attend: a compromise between how often keys are read and equal shares */
    PART = 256,            /* keys that few tokens see in one task, of which each must be worth its start */
};

typedef struct {
    Api api;
    const Kernels *kernels;
    int64_t heads, groups;
} Node;

typedef struct {
    Api api;
    KernelContext *context;
    const CausalKernels *kernels;
    CausalAttention a;
    int64_t tokens, blocks, parts; /* new tokens of a task, tasks of a group's new tokens, and of their keys */
    int64_t room;                  /* of a task's partial result */
    float *partials;
} Call;

static void write_task(void *data, size_t i) {
    const Call *call = data;
    const CausalAttention *a = &call->a;
    const int64_t pieces = up_to(a->count, TOKENS_AT_A_TIME) / TOKENS_AT_A_TIME;
    const int64_t first = (int64_t)i % pieces * TOKENS_AT_A_TIME, last = first + TOKENS_AT_A_TIME;
    call->kernels->write(a, (int64_t)i / pieces, first, last < a->count ? last : a->count);
}

static void pack_task(void *data, size_t i) {
    const Call *call = data;
    const CausalAttention *a = &call->a;
    const int64_t pair = (int64_t)i / a->blocks, row = pair / a->groups, block = (int64_t)i % a->blocks;
    if (block * KEY_BLOCK <= a->last[row]) call->kernels->pack(a, row, pair % a->groups, block);
}

static QueryBlock queries_of(const Call *call, int64_t i) {
    const CausalAttention *a = &call->a;
    const int64_t pair = i / call->blocks, first = i % call->blocks * call->tokens, left = a->count - first;
    return (QueryBlock){pair / a->groups, pair % a->groups, first, left < call->tokens ? left : call->tokens};
}

static void attend_task(void *data, size_t i) {
    const Call *call = data;
    const QueryBlock queries = queries_of(call, (int64_t)i / call->parts);
    const int64_t all = first_new(&call->a, queries.row) + queries.first + queries.count;
    const int64_t first = (int64_t)i % call->parts * PART, last = first + PART;
    if (call->parts == 1)
        call->kernels->attend(&call->a, &queries, 0, all, NULL);
    else
        call->kernels->attend(&call->a, &queries, first, last < all ? last : all, call->partials + i * call->room);
}

/* ----------------------------------------------------------------------------------------------- many tokens or few */

/* Without a context, in tests, on one thread. */
static Status *for_all(const Call *call, void (*task)(void *, size_t), int64_t count) {
    if (call->context != NULL) return parallel(call->api, call->context, task, count, (void *)call);
    for (int64_t i = 0; i < count; i++) task((void *)call, (size_t)i);
    return NULL;
}

static Status *no_memory(const Call *call) {
    return call->context == NULL ? NULL : CreateStatus(call->api)(ABI_FAIL, "edgevl.CausalAttention: no memory");
}

static Status *attend_many(Call *call) {
    CausalAttention *a = &call->a;
    const int64_t pairs = a->batch * a->groups, pieces = up_to(a->count, TOKENS_AT_A_TIME) / TOKENS_AT_A_TIME;
    call->parts = 1;
    a->packed = aligned_alloc(64, pairs * a->blocks * KEY_BLOCK * a->dim * sizeof(float));
    if (a->packed == NULL) return no_memory(call);
    Status *status = for_all(call, write_task, a->batch * pieces);
    if (status == NULL) status = for_all(call, pack_task, pairs * a->blocks);
    if (status == NULL) status = for_all(call, attend_task, pairs * call->blocks);
    free(a->packed);
    return status;
}

static Status *attend_few(Call *call) {
    CausalAttention *a = &call->a;
    const int64_t tasks = a->batch * a->groups * call->blocks;
    call->parts = up_to(a->blocks * KEY_BLOCK, PART) / PART;
    call->room = partial_size(a, call->tokens * a->heads);
    if (call->parts > 1) {
        call->partials = malloc(tasks * call->parts * call->room * sizeof(float));
        if (call->partials == NULL) return no_memory(call);
    }
    for (int64_t row = 0; row < a->batch; row++) call->kernels->write(a, row, 0, a->count);
    Status *status = for_all(call, attend_task, tasks * call->parts);
    for (int64_t i = 0; status == NULL && call->parts > 1 && i < tasks; i++) {
        const QueryBlock queries = queries_of(call, i);
        call->kernels->join(a, &queries, call->partials + i * call->parts * call->room, call->parts, call->room);
    }
    free(call->partials);
    return status;
}

/* Of at least one new token. */
static Status *attend_all(Call *call) {
    CausalAttention *a = &call->a;
    int64_t longest = 0;
    for (int64_t row = 0; row < a->batch; row++) longest = a->last[row] + 1 > longest ? a->last[row] + 1 : longest;
    const int64_t most = MOST_QUERIES / a->heads < TOKENS_AT_A_TIME ? MOST_QUERIES / a->heads : TOKENS_AT_A_TIME;
    a->scale = LOG2_E / sqrtf((float)a->dim);
    a->blocks = up_to(longest, KEY_BLOCK) / KEY_BLOCK;
    call->tokens = most < a->count ? most : a->count;
    call->blocks = (a->count + call->tokens - 1) / call->tokens;
    return a->count <= FEW_TOKENS ? attend_few(call) : attend_many(call);
}

/* For tests: on one thread, by the kernels `name`. 0: done, 1: not on this one */
EXPORT int edgevl_attend(const char *name, const CausalAttention *a) {
    for (const Kernels *const *k = all_kernels; *k != NULL; k++)
        if (strcmp((*k)->name, name) == 0 && (*k)->supported()) {
            Call call = {.kernels = &(*k)->causal, .a = *a};
            attend_all(&call);
            return 0;
        }
    return 1;
}

/* ------------------------------------------------------------------------------------------------ inputs and outputs */

static Status *refuse(Api api, const char *message) { return CreateStatus(api)(ABI_INVALID_ARGUMENT, message); }

/* The cache as the output `index`, copied where it is not the input's buffer. */
static Status *open_cache(Api api, KernelContext *context, size_t input, size_t index, const int64_t *dims,
                          float **to) {
    const float *from = NULL;
    CHECK(input_data(api, context, input, &from));
    CHECK(check_size(api, context, input, dims[0] * dims[1] * dims[2] * dims[3],
                     "edgevl.CausalAttention: past keys and values differ in shape"));
    CHECK(output_data(api, context, index, dims, 4, to));
    if (*to != from) memcpy(*to, from, dims[0] * dims[1] * dims[2] * dims[3] * sizeof(float));
    return NULL;
}

static Status *open_tokens(Api api, KernelContext *context, CausalAttention *a) {
    const int64_t tokens = a->batch * a->count, q = a->groups * a->heads * a->dim, kv = a->groups * a->dim;
    const char *const mismatch = "edgevl.CausalAttention: q, k, v, cos or sin is not of the size that the heads say";
    CHECK(input_data(api, context, Q, &a->q));
    CHECK(input_data(api, context, K, &a->k));
    CHECK(input_data(api, context, V, &a->v));
    if ((a->k == NULL) != (a->v == NULL)) return refuse(api, "edgevl.CausalAttention: has one of k and v, not both");
    const int merged = a->k == NULL;
    a->q_stride = merged ? q + 2 * kv : q, a->k_stride = a->v_stride = merged ? a->q_stride : kv;
    if (merged) a->k = a->q + q, a->v = a->k + kv;
    CHECK(check_size(api, context, Q, tokens * a->q_stride, mismatch));
    CHECK(check_size(api, context, K, tokens * kv, mismatch));
    CHECK(check_size(api, context, V, tokens * kv, mismatch));
    CHECK(check_size(api, context, COS, tokens * a->dim / 2, mismatch));
    CHECK(check_size(api, context, SIN, tokens * a->dim / 2, mismatch));
    CHECK(check_size(api, context, LAST, a->batch, "edgevl.CausalAttention: expected a length of every row"));
    CHECK(input_data(api, context, COS, &a->cosine));
    CHECK(input_data(api, context, SIN, &a->sine));
    return input_data(api, context, LAST, &a->last);
}

static Status *compute(void *kernel, KernelContext *context) {
    const Node *node = kernel;
    const Api api = node->api;
    int64_t dims[MOST_DIMENSIONS], cache[MOST_DIMENSIONS];
    size_t count = 0, axes = 0;
    Call call = {.api = api, .context = context, .kernels = &node->kernels->causal};
    CausalAttention *a = &call.a;
    CHECK(input_shape(api, context, Q, dims, &count));
    CHECK(input_shape(api, context, PAST_KEYS, cache, &axes));
    if (count != 3 || axes != 4 || cache[0] != dims[0] || cache[1] != node->groups || cache[3] < 1 ||
        cache[3] > MOST_HEAD_DIM || cache[3] % HEAD_DIM_UNIT != 0)
        return refuse(api, "edgevl.CausalAttention: expected q [batch, count, …] and a cache [batch, kv_heads, "
                           "capacity, dim], dim being a multiple of 16 of at most 128");
    a->batch = dims[0], a->count = dims[1], a->groups = cache[1], a->capacity = cache[2], a->dim = cache[3];
    a->heads = node->heads / node->groups;
    CHECK(open_tokens(api, context, a));
    for (int64_t row = 0; row < a->batch; row++)
        if (first_new(a, row) < 0 || a->last[row] >= a->capacity)
            return refuse(api, "edgevl.CausalAttention: the new tokens are not within the cache");
    CHECK(open_cache(api, context, PAST_KEYS, 1, cache, &a->keys));
    CHECK(open_cache(api, context, PAST_VALUES, 2, cache, &a->values));
    dims[2] = node->heads * a->dim;
    CHECK(output_data(api, context, 0, dims, 3, &a->out));
    return a->batch * a->count == 0 ? NULL : attend_all(&call);
}

static Status *create(const CustomOp *op, Api api, const KernelInfo *info, void **kernel) {
    (void)op;
    Node node = {.api = api, .kernels = usable_kernels()};
    const char *const names[] = {"num_heads", "kv_num_heads"};
    int64_t *const to[] = {&node.heads, &node.groups};
    CHECK(attributes(api, info, names, to, 2));
    if (node.kernels == NULL)
        return CreateStatus(api)(ABI_FAIL, "edgevl.CausalAttention: this processor has no instructions that it knows");
    if (node.groups < 1 || node.heads < 1 || node.heads % node.groups != 0 || node.heads / node.groups > MOST_QUERIES)
        return refuse(api, "edgevl.CausalAttention: expected num_heads to be kv_num_heads of at least 1, up to 96 "
                           "times");
    return keep(api, &node, sizeof node, kernel);
}

static const char *name(const CustomOp *op) { (void)op; return "CausalAttention"; }
static size_t input_count(const CustomOp *op) { (void)op; return INPUTS; }
static size_t output_count(const CustomOp *op) { (void)op; return 3; }
static int input_kind(const CustomOp *op, size_t i) { (void)op; return i == K || i == V ? ABI_OPTIONAL : ABI_REQUIRED; }
static int input_type(const CustomOp *op, size_t i) { (void)op; return i == LAST ? ABI_INT32 : ABI_FLOAT; }

const CustomOp causal_attention = OPERATOR_OF(name, input_count, input_type, input_kind, output_count, create, compute,
                                              free);
