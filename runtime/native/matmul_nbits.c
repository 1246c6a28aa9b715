/* The operator MatMulNBits of domain "edgevl", registered with ONNX Runtime by RegisterCustomOps.
 *
 * Inputs and attributes are those of com.microsoft.MatMulNBits: A float [..., K], B uint8 [N, blocks, block_size × bits
 * / 8], scales float [N, blocks], zero_points uint8 [N, ceil(blocks × bits / 8)] or none, g_idx, which must be absent,
 * bias float [N] or none. Weights are read where they are, out of the mapped file: nothing is repacked or copied.
 */
#include <stdlib.h>
#include <string.h>

#include "nbits.h"
#include "ort_abi.h"

#define EXPORT __attribute__((visibility("default")))
#define CHECK(call)                           \
    do {                                      \
        Status *status = (call);              \
        if (status != NULL) return status;    \
    } while (0)

enum {
    TASK_BYTES = 1 << 17, /* of weights, that one thread takes at a time: some 10 µs, so that none waits for long */
    INPUTS = 6, G_IDX = 4, BIAS = 5,
    MOST_DIMENSIONS = 8,
    TASK_OUTPUTS = 32,    /* a multiple of a tile's */
    ROWS_AT_A_TIME = 8,   /* to round */
};

static const Kernels *const all_kernels[] = {
#if defined(__x86_64__) && defined(__GNUC__)
    &nbits_avx512,
#endif
    NULL,
};

static const Kernels *usable_kernels(void) {
    for (const Kernels *const *k = all_kernels; *k != NULL; k++)
        if ((*k)->supported()) return *k;
    return NULL;
}

/* The instructions that the kernels use on this processor; NULL: it has none that they know. */
EXPORT const char *edgevl_instructions(void) {
    const Kernels *kernels = usable_kernels();
    return kernels == NULL ? NULL : kernels->name;
}

/* ---------------------------------------------------------------------------------------------- rows and their room */

static int64_t up_to(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

/* One allocation for all of it; NULL: no memory. */
static void *make_room(const Weight *w, int64_t rows, Activations *x) {
    x->rows = rows;
    x->chunks = up_to(w->columns, CHUNK) / CHUNK;
    x->padded = up_to(w->blocks, 16) + 16;
    x->units = w->block < CHUNK ? CHUNK / w->block : 1;
    const size_t codes = x->chunks * rows * CHUNK, numbers = up_to(rows * x->padded * sizeof(float), 64);
    const size_t sums = up_to(x->chunks * rows * x->units * sizeof(int32_t), 64);
    char *room = aligned_alloc(64, codes + 2 * numbers + sums);
    x->codes = (int8_t *)room;
    x->scales = (float *)(room + codes);
    x->totals = (float *)(room + codes + numbers);
    x->sums = (int32_t *)(room + codes + 2 * numbers);
    return room;
}

/* For tests: one thread, y [m, w.rows] = x [m, w.columns] Wᵀ by the kernels `name`. 0: done, 1: not on this processor. */
EXPORT int edgevl_multiply(const char *name, const Weight *w, const float *x, int64_t m, float *y) {
    for (const Kernels *const *k = all_kernels; *k != NULL; k++)
        if (strcmp((*k)->name, name) == 0 && (*k)->supported()) {
            Activations rounded;
            void *room = make_room(w, m, &rounded);
            (*k)->round(w, x, &rounded, 0, m);
            (*k)->multiply(w, &rounded, y, 0, w->rows);
            free(room);
            return 0;
        }
    return 1;
}

/* ---------------------------------------------------------------------------------------------------- the operator */

typedef struct {
    Api api;
    const Kernels *kernels;
    int64_t rows, columns, block, bits;
} Node;

typedef struct {
    const Node *node;
    Weight weight;
    Activations rounded;
    const float *x;
    float *y;
    int64_t outputs; /* of a task */
} Call;

static void round_task(void *data, size_t i) {
    const Call *call = data;
    const int64_t first = (int64_t)i * ROWS_AT_A_TIME, last = first + ROWS_AT_A_TIME;
    call->node->kernels->round(&call->weight, call->x, &call->rounded, first,
                               last < call->rounded.rows ? last : call->rounded.rows);
}

static void multiply_task(void *data, size_t i) {
    const Call *call = data;
    const int64_t first = (int64_t)i * call->outputs, last = first + call->outputs;
    call->node->kernels->multiply(&call->weight, &call->rounded, call->y, first,
                                  last < call->weight.rows ? last : call->weight.rows);
}

/* An input's data, NULL where an optional one is absent. */
static Status *input_data(const Node *node, const KernelContext *context, size_t index, const void **data) {
    const Value *value = NULL;
    *data = NULL;
    CHECK(KernelContext_GetInput(node->api)(context, index, &value));
    return value == NULL ? NULL : GetTensorMutableData(node->api)((Value *)value, (void **)data);
}

static Status *open_rows(const Node *node, KernelContext *context, int64_t *rows, float **y) {
    const Api api = node->api;
    const Value *value = NULL;
    ShapeInfo *shape = NULL;
    size_t count = 0;
    int64_t dims[MOST_DIMENSIONS];
    CHECK(KernelContext_GetInput(api)(context, 0, &value));
    CHECK(GetTensorTypeAndShape(api)(value, &shape));
    Status *status = GetDimensionsCount(api)(shape, &count);
    if (status == NULL && count >= 1 && count <= MOST_DIMENSIONS) status = GetDimensions(api)(shape, dims, count);
    ReleaseTensorTypeAndShapeInfo(api)(shape);
    if (status != NULL) return status;
    if (count < 1 || count > MOST_DIMENSIONS || dims[count - 1] != node->columns)
        return CreateStatus(api)(ABI_INVALID_ARGUMENT, "edgevl.MatMulNBits: the last axis of A is not K");
    *rows = 1;
    for (size_t i = 0; i + 1 < count; i++) *rows *= dims[i];
    dims[count - 1] = node->rows;
    Value *output = NULL;
    CHECK(KernelContext_GetOutput(api)(context, 0, dims, count, &output));
    return GetTensorMutableData(api)(output, (void **)y);
}

static Status *compute(void *kernel, KernelContext *context) {
    const Node *node = kernel;
    Call call = {.node = node};
    Weight *w = &call.weight;
    w->rows = node->rows, w->columns = node->columns, w->bits = (int)node->bits, w->block = (int)node->block;
    w->blocks = up_to(w->columns, w->block) / w->block;
    CHECK(input_data(node, context, 0, (const void **)&call.x));
    CHECK(input_data(node, context, 1, (const void **)&w->codes));
    CHECK(input_data(node, context, 2, (const void **)&w->scales));
    CHECK(input_data(node, context, 3, (const void **)&w->zeros));
    const void *order = NULL;
    CHECK(input_data(node, context, G_IDX, &order));
    CHECK(input_data(node, context, BIAS, (const void **)&w->bias));
    int64_t rows = 0;
    CHECK(open_rows(node, context, &rows, &call.y));
    if (order != NULL)
        return CreateStatus(node->api)(ABI_INVALID_ARGUMENT, "edgevl.MatMulNBits: takes no g_idx; reorder A's columns");
    if (rows == 0) return NULL;
    void *room = make_room(w, rows, &call.rounded);
    if (room == NULL) return CreateStatus(node->api)(ABI_FAIL, "edgevl.MatMulNBits: no memory for the rounded rows");
    Status *status = NULL;
    if (rows <= ROWS_AT_A_TIME)
        node->kernels->round(w, call.x, &call.rounded, 0, rows);
    else
        status = KernelContext_ParallelFor(node->api)(context, round_task, up_to(rows, ROWS_AT_A_TIME) / ROWS_AT_A_TIME, 0,
                                                      &call);
    const int64_t wanted = TASK_BYTES / weight_row_bytes(w);
    call.outputs = up_to(wanted > 1 ? wanted : 1, TASK_OUTPUTS);
    if (status == NULL)
        status = KernelContext_ParallelFor(node->api)(context, multiply_task, up_to(w->rows, call.outputs) / call.outputs, 0,
                                                      &call);
    free(room);
    return status;
}

static Status *create(const CustomOp *op, Api api, const KernelInfo *info, void **kernel) {
    (void)op;
    Node node = {.api = api, .kernels = usable_kernels()};
    const struct { const char *name; int64_t *to; } wanted[] = {
        {"N", &node.rows}, {"K", &node.columns}, {"block_size", &node.block}, {"bits", &node.bits}};
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        CHECK(KernelInfoGetAttribute_int64(api)(info, wanted[i].name, wanted[i].to));
    if (node.kernels == NULL)
        return CreateStatus(api)(ABI_FAIL, "edgevl.MatMulNBits: this processor has no instructions that it knows");
    const int known_block = node.block == 32 || node.block == 64 || (node.block > 0 && node.block % CHUNK == 0);
    if ((node.bits != 4 && node.bits != 8) || !known_block || node.rows < 1 || node.columns < 1)
        return CreateStatus(api)(ABI_INVALID_ARGUMENT, "edgevl.MatMulNBits: expected bits 4 or 8, a block_size of 32, 64 or "
                                                       "a multiple of 128, and N and K of at least 1");
    *kernel = malloc(sizeof node);
    if (*kernel == NULL) return CreateStatus(api)(ABI_FAIL, "edgevl.MatMulNBits: no memory");
    memcpy(*kernel, &node, sizeof node);
    return NULL;
}

static void destroy(void *kernel) { free(kernel); }
static const char *name(const CustomOp *op) { (void)op; return "MatMulNBits"; }
static const char *provider(const CustomOp *op) { (void)op; return "CPUExecutionProvider"; }
static size_t input_count(const CustomOp *op) { (void)op; return INPUTS; }
static size_t output_count(const CustomOp *op) { (void)op; return 1; }
static int input_type(const CustomOp *op, size_t i) {
    (void)op;
    return i == 1 || i == 3 ? ABI_UINT8 : i == G_IDX ? ABI_INT32 : ABI_FLOAT;
}
static int output_type(const CustomOp *op, size_t i) { (void)op; (void)i; return ABI_FLOAT; }
static int input_kind(const CustomOp *op, size_t i) { (void)op; return i < 3 ? ABI_REQUIRED : ABI_OPTIONAL; }
static int output_kind(const CustomOp *op, size_t i) { (void)op; (void)i; return ABI_REQUIRED; }
static int memory_type(const CustomOp *op, size_t i) { (void)op; (void)i; return 0; }
static int none(const CustomOp *op) { (void)op; return 0; }
static int first_version(const CustomOp *op) { (void)op; return 1; }

static const CustomOp matmul_nbits = {
    .version = ABI_VERSION, .GetName = name, .GetExecutionProviderType = provider, .GetInputType = input_type,
    .GetInputTypeCount = input_count, .GetOutputType = output_type, .GetOutputTypeCount = output_count,
    .KernelDestroy = destroy, .GetInputCharacteristic = input_kind, .GetOutputCharacteristic = output_kind,
    .GetInputMemoryType = memory_type, .GetVariadicInputMinArity = none, .GetVariadicInputHomogeneity = none,
    .GetVariadicOutputMinArity = none, .GetVariadicOutputHomogeneity = none, .CreateKernelV2 = create,
    .KernelComputeV2 = compute, .GetStartVersion = first_version, .GetEndVersion = first_version,
};

/* Looked up by ONNX Runtime under this name. The domain lives as long as the process. */
EXPORT Status *RegisterCustomOps(SessionOptions *options, const ApiBase *base) {
    static Domain *domain = NULL;
    const Api api = base->GetApi(ABI_VERSION);
    if (domain == NULL) {
        Domain *made = NULL;
        CHECK(CreateCustomOpDomain(api)("edgevl", &made));
        CHECK(CustomOpDomain_Add(api)(made, &matmul_nbits));
        domain = made;
    }
    return AddCustomOpDomain(api)(options, domain);
}
