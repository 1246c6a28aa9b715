/* The operator MatMulNBits of domain "edgevl", registered with ONNX Runtime by RegisterCustomOps.
 *
 * Inputs and attributes are those of com.microsoft.MatMulNBits: A float [..., K], B uint8 [N, blocks, block_size × bits
 * / 8], scales float [N, blocks], zero_points uint8 [N, ceil(blocks × bits / 8)] or none, g_idx, which must be absent,
 * bias float [N] or none. More, all of them optional: gate and residual of the output's shape, the one's SiLU is
 * multiplied with the output, the other added to it; norm_weight and norm_bias float [K] and norm_epsilon float [1], by
 * which rows of A are normalised at first (Norm in nbits.h). B, scales and zero_points are constants, and laid out anew
 * as a session opens (nbits_multiply.h).
 */
#include "nbits.h"
#include "operator.h"

enum {
    TASK_BYTES = 1 << 17, /* of weights, that one thread takes at a time: some 10 µs, so that none waits for long */
    G_IDX = 4, BIAS = 5, GATE = 6, RESIDUAL = 7, NORM = 8, INPUTS = 11,
    TASK_OUTPUTS = 32,    /* a multiple of every tile's */
    ROWS_AT_A_TIME = 8,   /* to round */
    MOST_SIZE = 1 << 30,  /* of N and K: no product of sizes passes 64 bits */
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
    x->chunks = weight_chunks(w);
    x->padded = up_to(w->blocks, 16) + 16;
    x->units = weight_units(w);
    const size_t codes = x->chunks * rows * CHUNK, numbers = up_to(rows * x->padded * sizeof(float), 64);
    const size_t sums = up_to(x->chunks * rows * x->units * sizeof(int32_t), 64);
    char *room = aligned_alloc(64, codes + numbers + sums);
    if (room == NULL) return NULL;
    x->codes = (int8_t *)room;
    x->scales = (float *)(room + codes);
    x->sums = (int32_t *)(room + codes + numbers);
    return room;
}

/* For tests: one thread, y [m, w.rows] = x [m, w.columns] Wᵀ by the kernels `name`; fills in w.half. 0: done, 1: not on
 * this one, 2: no memory. */
EXPORT int edgevl_multiply(const char *name, Weight *w, const float *x, int64_t m, float *y) {
    for (const Kernels *const *k = all_kernels; *k != NULL; k++)
        if (strcmp((*k)->name, name) == 0 && (*k)->supported()) {
            Activations rounded;
            pack_weight(*k, w);
            void *room = w->packed == NULL ? NULL : make_room(w, m, &rounded);
            if (room != NULL) {
                (*k)->round(w, x, &rounded, 0, m);
                (*k)->multiply(w, &rounded, y, 0, w->rows);
            }
            release_weight(w->packed);
            free(room);
            return room == NULL ? 2 : 0;
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
    Weight weight; /* packed; its bias is the graph's, set for every call */
    uint32_t constants; /* bits of its inputs */
    int checked;        /* its inputs, which no later call can change */
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

static const char *const not_constant = "edgevl.MatMulNBits: B, scales or zero_points is not a constant";
static const char *const mismatch = "edgevl.MatMulNBits: B, scales, zero_points or bias is not of the size that N, K, "
                                    "bits and block_size say";

/* Once where they are constants. A zero point that is not a constant looks like none while the kernel is made. */
static Status *check_inputs(Node *node, const KernelContext *context) {
    const Value *zeros = NULL;
    CHECK(KernelContext_GetInput(node->api)(context, 3, &zeros));
    if (zeros != NULL && node->weight.zeros == NULL) return CreateStatus(node->api)(ABI_INVALID_ARGUMENT, not_constant);
    int checked = 1;
    CHECK(check_once(node->api, context, BIAS, node->weight.rows, mismatch, node->constants, &checked));
    CHECK(check_norm(node->api, context, NORM, node->weight.columns, node->constants, &checked));
    __atomic_store_n(&node->checked, checked, __ATOMIC_RELAXED);
    return NULL;
}

static Status *compute(void *kernel, KernelContext *context) {
    Node *node = kernel;
    const Api api = node->api;
    Call call = {.node = node, .weight = node->weight};
    Weight *w = &call.weight;
    const void *order = NULL;
    int64_t rows = 0;
    CHECK(pause_pass(api));
    if (!__atomic_load_n(&node->checked, __ATOMIC_RELAXED)) CHECK(check_inputs(node, context));
    CHECK(input_data(api, context, 0, &call.x));
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

/* A part of the weight, which has `wanted` numbers; left as it is where the input is absent or not a constant. */
static Status *constant(Api api, const KernelInfo *info, size_t index, int64_t wanted, const void *data) {
    const Value *value = NULL;
    int is_constant = 0;
    int64_t dims[MOST_DIMENSIONS], size = 1;
    size_t count = 0;
    CHECK(KernelInfoGetConstantInput_tensor(api)(info, index, &is_constant, &value));
    if (!is_constant) return NULL;
    CHECK(tensor_shape(api, value, dims, &count));
    for (size_t axis = 0; axis < count; axis++) size *= dims[axis];
    if (size != wanted) return CreateStatus(api)(ABI_INVALID_ARGUMENT, mismatch);
    return GetTensorMutableData(api)((Value *)value, (void **)data);
}

static Status *pack(Api api, const KernelInfo *info, const Kernels *kernels, Weight *w) {
    CHECK(constant(api, info, 1, w->rows * weight_row_bytes(w), &w->codes));
    CHECK(constant(api, info, 2, w->rows * w->blocks, &w->scales));
    CHECK(constant(api, info, 3, w->rows * weight_zero_bytes(w), &w->zeros));
    if (w->codes == NULL || w->scales == NULL) return CreateStatus(api)(ABI_INVALID_ARGUMENT, not_constant);
    pack_weight(kernels, w);
    return w->packed ? NULL : CreateStatus(api)(ABI_FAIL, "edgevl.MatMulNBits: no memory for the weight laid out anew");
}

static Status *create(const CustomOp *op, Api api, const KernelInfo *info, void **kernel) {
    (void)op;
    Node node = {.api = api, .kernels = usable_kernels()};
    Weight *w = &node.weight;
    int64_t block = 0, bits = 0;
    const char *const names[] = {"N", "K", "block_size", "bits"};
    int64_t *const to[] = {&w->rows, &w->columns, &block, &bits};
    CHECK(attributes(api, info, names, to, 4));
    if (node.kernels == NULL)
        return CreateStatus(api)(ABI_FAIL, "edgevl.MatMulNBits: this processor has no instructions that it knows");
    const int known_block = block == 32 || block == 64 || (block > 0 && block <= INT32_MAX && block % CHUNK == 0);
    const int known_size = w->rows >= 1 && w->rows <= MOST_SIZE && w->columns >= 1 && w->columns <= MOST_SIZE;
    if ((bits != 4 && bits != 8) || !known_block || !known_size)
        return CreateStatus(api)(ABI_INVALID_ARGUMENT, "edgevl.MatMulNBits: expected bits 4 or 8, a block_size of 32, "
                                                       "64 or a multiple of 128, and N and K of 1 to 2^30");
    w->bits = (int)bits, w->block = (int)block, w->blocks = up_to(w->columns, block) / block;
    CHECK(constant_inputs(api, info, INPUTS, &node.constants));
    CHECK(pack(api, info, node.kernels, w));
    Status *status = keep(api, &node, sizeof node, kernel);
    if (status != NULL) release_weight(w->packed);
    return status;
}

static void destroy(void *kernel) {
    const Node *node = kernel;
    release_weight(node->weight.packed);
    free(kernel);
}

static const char *name(const CustomOp *op) { (void)op; return "MatMulNBits"; }
static size_t input_count(const CustomOp *op) { (void)op; return INPUTS; }
static int input_kind(const CustomOp *op, size_t i) { (void)op; return i < 3 ? ABI_REQUIRED : ABI_OPTIONAL; }
static int input_type(const CustomOp *op, size_t i) {
    (void)op;
    return i == 1 || i == 3 ? ABI_UINT8 : i == G_IDX ? ABI_INT32 : ABI_FLOAT;
}

const CustomOp matmul_nbits = OPERATOR(name, input_count, input_type, input_kind, create, compute, destroy);
