/* The operator MatMulNBits of domain "edgevl", registered with ONNX Runtime by RegisterCustomOps.
 *
 * Inputs and attributes are those of com.microsoft.MatMulNBits: A float [..., K], B uint8 [N, blocks, block_size × bits
 * / 8], scales float [N, blocks], zero_points uint8 [N, ceil(blocks × bits / 8)] or none, g_idx, which must be absent,
 * bias float [N] or none. More, all of them optional: gate and residual of the output's shape, the one's SiLU is
 * multiplied with the output, the other added to it; norm_weight and norm_bias float [K] and norm_epsilon float [1], by
 * which rows of A are normalised at first (Norm in nbits.h). Weights are read where they are, out of the mapped file: nothing is repacked or
 * copied.
 */
#include "nbits.h"
#include "operator.h"

enum {
    TASK_BYTES = 1 << 17, /* of weights, that one thread takes at a time: some 10 µs, so that none waits for long */
    G_IDX = 4, BIAS = 5, GATE = 6, RESIDUAL = 7, NORM = 8, INPUTS = 11,
    TASK_OUTPUTS = 32,    /* a multiple of a tile's */
    ROWS_AT_A_TIME = 8,   /* to round */
};

/* The instructions that the kernels use on this processor; NULL: it has none that they know. */
EXPORT const char *edgevl_instructions(void) {
    const Kernels *kernels = usable_kernels();
    return kernels == NULL ? NULL : kernels->name;
}

/* ---------------------------------------------------------------------------------------------- rows and their room */

/* One allocation for all of it; NULL: no memory. */
static void *make_room(const Weight *w, int64_t rows, Activations *x) {
    x->rows = rows;
    x->chunks = up_to(w->columns, CHUNK) / CHUNK;
    x->padded = up_to(w->blocks, 16) + 16;
    x->units = w->block < CHUNK ? CHUNK / w->block : 1;
    const size_t codes = x->chunks * rows * CHUNK, numbers = up_to(rows * x->padded * sizeof(float), 64);
    const size_t sums = up_to(x->chunks * rows * x->units * sizeof(int32_t), 64);
    char *room = aligned_alloc(64, codes + numbers + sums);
    if (room == NULL) return NULL;
    x->codes = (int8_t *)room;
    x->scales = (float *)(room + codes);
    x->sums = (int32_t *)(room + codes + numbers);
    return room;
}

/* For tests: one thread, y [m, w.rows] = x [m, w.columns] Wᵀ by the kernels `name`. 0: done, 1: not on this one,
 * 2: no memory. */
EXPORT int edgevl_multiply(const char *name, const Weight *w, const float *x, int64_t m, float *y) {
    for (const Kernels *const *k = all_kernels; *k != NULL; k++)
        if (strcmp((*k)->name, name) == 0 && (*k)->supported()) {
            Activations rounded;
            void *room = make_room(w, m, &rounded);
            if (room == NULL) return 2;
            (*k)->round(w, x, &rounded, 0, m);
            (*k)->multiply(w, &rounded, y, 0, w->rows);
            free(room);
            return 0;
        }
    return 1;
}

/* For tests: a row of x [columns], normalised by the kernels `name`. 0: done, 1: not on this one. */
EXPORT int edgevl_normalize(const char *name, const Norm *norm, const float *x, int64_t columns, float *to) {
    for (const Kernels *const *k = all_kernels; *k != NULL; k++)
        if (strcmp((*k)->name, name) == 0 && (*k)->supported()) {
            (*k)->normalize(norm, x, columns, to);
            return 0;
        }
    return 1;
}

/* ---------------------------------------------------------------------------------------------------- the operator */

typedef struct {
    Api api;
    const Kernels *kernels;
    int64_t rows, columns, block, bits;
    int checked; /* the sizes of the weight's parts, which do not change from call to call */
} Node;

typedef struct {
    const Node *node;
    Weight weight;
    Activations rounded;
    Norm norm;
    const float *x, *gate, *residual;
    float *y;
    int64_t outputs; /* of a task */
    int failed;      /* a task had no memory */
} Call;

static void round_task(void *data, size_t i) {
    Call *call = data;
    const Kernels *kernels = call->node->kernels;
    const int64_t first = (int64_t)i * ROWS_AT_A_TIME, left = call->rounded.rows - first;
    const int64_t rows = left < ROWS_AT_A_TIME ? left : ROWS_AT_A_TIME, columns = call->weight.columns;
    float *room;
    const float *x = normalized(kernels, &call->norm, call->x + first * columns, rows, columns, &room);
    if (x == NULL) __atomic_store_n(&call->failed, 1, __ATOMIC_RELAXED);
    else kernels->round(&call->weight, x, &call->rounded, first, first + rows);
    free(room);
}

static void multiply_task(void *data, size_t i) {
    const Call *call = data;
    const int64_t n = call->weight.rows, first = (int64_t)i * call->outputs;
    const int64_t last = first + call->outputs < n ? first + call->outputs : n;
    call->node->kernels->multiply(&call->weight, &call->rounded, call->y, first, last);
    if (call->gate == NULL && call->residual == NULL) return;
    for (int64_t at = first; at < call->rounded.rows * n; at += n)
        call->node->kernels->gate_and_add(call->gate ? call->gate + at : NULL,
                                          call->residual ? call->residual + at : NULL, call->y + at, last - first);
}

static Status *check_sizes(Node *node, const KernelContext *context, const Weight *w) {
    const char *const mismatch = "edgevl.MatMulNBits: B, scales, zero_points or bias is not of the size that N, K, "
                                 "bits and block_size say";
    CHECK(check_size(node->api, context, 1, w->rows * weight_row_bytes(w), mismatch));
    CHECK(check_size(node->api, context, 2, w->rows * w->blocks, mismatch));
    CHECK(check_size(node->api, context, 3, w->rows * ((w->blocks * w->bits + 7) / 8), mismatch));
    CHECK(check_size(node->api, context, BIAS, w->rows, mismatch));
    CHECK(check_norm(node->api, context, NORM, w->columns));
    node->checked = 1;
    return NULL;
}

static Status *compute(void *kernel, KernelContext *context) {
    Node *node = kernel;
    const Api api = node->api;
    Call call = {.node = node};
    Weight *w = &call.weight;
    const void *order = NULL;
    int64_t rows = 0;
    w->rows = node->rows, w->columns = node->columns, w->bits = (int)node->bits, w->block = (int)node->block;
    w->blocks = up_to(w->columns, w->block) / w->block;
    if (!node->checked) CHECK(check_sizes(node, context, w));
    CHECK(input_data(api, context, 0, &call.x));
    CHECK(input_data(api, context, 1, &w->codes));
    CHECK(input_data(api, context, 2, &w->scales));
    CHECK(input_data(api, context, 3, &w->zeros));
    CHECK(input_data(api, context, G_IDX, &order));
    CHECK(input_data(api, context, BIAS, &w->bias));
    CHECK(like_output(api, context, GATE, w->columns, w->rows, &call.gate));
    CHECK(like_output(api, context, RESIDUAL, w->columns, w->rows, &call.residual));
    CHECK(norm_inputs(api, context, NORM, &call.norm));
    if (order != NULL)
        return CreateStatus(api)(ABI_INVALID_ARGUMENT, "edgevl.MatMulNBits: takes no g_idx; reorder A's columns");
    CHECK(open_product(api, context, w->columns, w->rows, "edgevl.MatMulNBits: the last axis of A is not K", &rows,
                       &call.y));
    if (rows == 0) return NULL;
    void *room = make_room(w, rows, &call.rounded);
    const char *const no_memory = "edgevl.MatMulNBits: no memory for the rounded rows";
    if (room == NULL) return CreateStatus(api)(ABI_FAIL, no_memory);
    Status *status = NULL;
    if (rows <= ROWS_AT_A_TIME)
        round_task(&call, 0);
    else
        status = parallel(api, context, round_task, up_to(rows, ROWS_AT_A_TIME) / ROWS_AT_A_TIME, &call);
    if (status == NULL && call.failed) status = CreateStatus(api)(ABI_FAIL, no_memory);
    const int64_t wanted = TASK_BYTES / weight_row_bytes(w);
    call.outputs = up_to(wanted > 1 ? wanted : 1, TASK_OUTPUTS);
    if (status == NULL)
        status = parallel(api, context, multiply_task, up_to(w->rows, call.outputs) / call.outputs, &call);
    free(room);
    return status;
}

static Status *create(const CustomOp *op, Api api, const KernelInfo *info, void **kernel) {
    (void)op;
    Node node = {.api = api, .kernels = usable_kernels()};
    const char *const names[] = {"N", "K", "block_size", "bits"};
    int64_t *const to[] = {&node.rows, &node.columns, &node.block, &node.bits};
    CHECK(attributes(api, info, names, to, 4));
    if (node.kernels == NULL)
        return CreateStatus(api)(ABI_FAIL, "edgevl.MatMulNBits: this processor has no instructions that it knows");
    const int known_block = node.block == 32 || node.block == 64 || (node.block > 0 && node.block % CHUNK == 0);
    if ((node.bits != 4 && node.bits != 8) || !known_block || node.rows < 1 || node.columns < 1)
        return CreateStatus(api)(ABI_INVALID_ARGUMENT, "edgevl.MatMulNBits: expected bits 4 or 8, a block_size of 32, "
                                                       "64 or a multiple of 128, and N and K of at least 1");
    return keep(api, &node, sizeof node, kernel);
}

static const char *name(const CustomOp *op) { (void)op; return "MatMulNBits"; }
static size_t input_count(const CustomOp *op) { (void)op; return INPUTS; }
static int input_kind(const CustomOp *op, size_t i) { (void)op; return i < 3 ? ABI_REQUIRED : ABI_OPTIONAL; }
static int input_type(const CustomOp *op, size_t i) {
    (void)op;
    return i == 1 || i == 3 ? ABI_UINT8 : i == G_IDX ? ABI_INT32 : ABI_FLOAT;
}

const CustomOp matmul_nbits = OPERATOR(name, input_count, input_type, input_kind, create, compute, free);
