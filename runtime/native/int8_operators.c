/* The operators MatMulInt8 and FrameAttention of domain "edgevl". */
#include "nbits.h"
#include "operator.h"
#include "int8.h"
#include "release_pages.h"
#include "weight_memory.h"

#include <math.h>

enum {
    NORM = 6, INPUTS = 9,
    TASK_OUTPUTS = 32,   /* a multiple of a tile's */
    ROWS_AT_A_TIME = 16, /* to round */
    MOST_OUTPUTS = 1 << 30,
    MOST_COLUMNS = 1 << 16, /* 255 × 128 times as many are less than 2^31 */
    PART_LENGTH = 1024,  /* patches of a frame for each of which its attention has a pause: work goes by their square */
};

/* As edgevl_instructions, of these operators. */
EXPORT const char *edgevl_int8_instructions(void) {
    const Int8Kernels *kernels = usable_int8_kernels();
    return kernels == NULL ? NULL : kernels->name;
}

/* ------------------------------------------------------------------------------------------------------ MatMulInt8
 * A float [..., K], B int8 [K, N], scales float [N], bias float [N] or none, gate, residual, norm_weight, norm_bias and
 * norm_epsilon or none (as in matmul_nbits.c); attributes K, N, quick_gelu and affine (0 or 1).
 */

typedef struct {
    Api api;
    const Int8Kernels *kernels;
    const Kernels *norms; /* which normalise */
    Int8Weight weight; /* its codes and sums are ours, scales and bias the graph's, set for every call */
    int64_t quick_gelu, affine;
    uint32_t constants; /* bits of its inputs */
    int checked;        /* the sizes of scales, bias and norms, which no later call can change */
} Product;

typedef struct {
    const Product *node;
    Int8Weight weight;
    Int8Rows rounded;
    Norm norm;
    const float *x;
    float *y;
    int failed; /* a task had no memory */
} ProductCall;

static void round_task(void *data, size_t i) {
    ProductCall *call = data;
    const int64_t first = (int64_t)i * ROWS_AT_A_TIME, left = call->rounded.rows - first;
    const int64_t rows = left < ROWS_AT_A_TIME ? left : ROWS_AT_A_TIME, columns = call->weight.columns;
    float *room;
    const float *x = normalized(call->node->norms, &call->norm, call->x + first * columns, rows, columns, &room);
    if (x == NULL) __atomic_store_n(&call->failed, 1, __ATOMIC_RELAXED);
    else call->node->kernels->round(&call->weight, x, &call->rounded, first, first + rows);
    free(room);
}

static void multiply_task(void *data, size_t i) {
    const ProductCall *call = data;
    const int64_t first = (int64_t)i * TASK_OUTPUTS, last = first + TASK_OUTPUTS;
    call->node->kernels->multiply(&call->weight, &call->rounded, call->y, first,
                                  last < call->weight.rows ? last : call->weight.rows);
}

static Status *check_sizes(Product *node, const KernelContext *context) {
    const char *const mismatch = "edgevl.MatMulInt8: scales or bias has not N numbers";
    int checked = 1;
    for (size_t input = 2; input <= 3; input++)
        CHECK(check_once(node->api, context, input, node->weight.rows, mismatch, node->constants, &checked));
    CHECK(check_norm(node->api, context, NORM, node->weight.columns, node->constants, &checked));
    __atomic_store_n(&node->checked, checked, __ATOMIC_RELAXED);
    return NULL;
}

static Status *multiply(void *kernel, KernelContext *context) {
    Product *node = kernel;
    const Api api = node->api;
    ProductCall call = {.node = node, .weight = node->weight};
    Int8Weight *w = &call.weight;
    int64_t rows = 0;
    CHECK(pause_pass(api));
    if (!__atomic_load_n(&node->checked, __ATOMIC_RELAXED)) CHECK(check_sizes(node, context));
    CHECK(input_data(api, context, 0, &call.x));
    CHECK(input_data(api, context, 2, &w->scales));
    CHECK(input_data(api, context, 3, &w->bias));
    CHECK(like_output(api, context, 4, w->columns, w->rows, &w->gate));
    CHECK(like_output(api, context, 5, w->columns, w->rows, &w->residual));
    CHECK(norm_inputs(api, context, NORM, &call.norm));
    CHECK(open_product(api, context, w->columns, w->rows, "edgevl.MatMulInt8: the last axis of A is not K", &rows,
                       &call.y));
    if (rows == 0) return NULL;
    call.rounded.rows = rows;
    const size_t codes = rows * up_to(w->columns, DEPTH) * node->kernels->code_bytes;
    const size_t numbers = up_to(rows * sizeof(float), 64);
    char *room = aligned_alloc(64, codes + 2 * numbers);
    const char *const no_memory = "edgevl.MatMulInt8: no memory for the rounded rows";
    if (room == NULL) return CreateStatus(api)(ABI_FAIL, no_memory);
    call.rounded.codes = room, call.rounded.scales = (float *)(room + codes);
    call.rounded.zeros = (int32_t *)(room + codes + numbers);
    Status *status = parallel(api, context, round_task, up_to(rows, ROWS_AT_A_TIME) / ROWS_AT_A_TIME, &call);
    if (status == NULL && call.failed) status = CreateStatus(api)(ABI_FAIL, no_memory);
    if (status == NULL)
        status = parallel(api, context, multiply_task, up_to(w->rows, TASK_OUTPUTS) / TASK_OUTPUTS, &call);
    free(room);
    return status;
}

static Status *check_shape(Api api, const Value *value, const Int8Weight *w) {
    int64_t dims[MOST_DIMENSIONS];
    size_t count = 0;
    CHECK(tensor_shape(api, value, dims, &count));
    if (count == 2 && dims[0] == w->columns && dims[1] == w->rows) return NULL;
    return CreateStatus(api)(ABI_INVALID_ARGUMENT, "edgevl.MatMulInt8: B is not [K, N]");
}

/* The weight laid out anew, which the kernels read in one stream; the graph's own is not touched again. */
static Status *pack(Api api, const KernelInfo *info, const Int8Kernels *kernels, Int8Weight *w) {
    const Value *value = NULL;
    int constant = 0;
    void *from = NULL;
    CHECK(KernelInfoGetConstantInput_tensor(api)(info, 1, &constant, &value));
    if (!constant) return CreateStatus(api)(ABI_INVALID_ARGUMENT, "edgevl.MatMulInt8: B is not a constant");
    CHECK(check_shape(api, value, w));
    CHECK(GetTensorMutableData(api)((Value *)value, &from));
    int8_t *codes = weight_memory(padded_rows(w) * padded_columns(w));
    int32_t *sums = aligned_alloc(64, padded_rows(w) * sizeof(int32_t));
    if (codes == NULL || sums == NULL) {
        free_weight_memory(codes);
        free(sums);
        return CreateStatus(api)(ABI_FAIL, "edgevl.MatMulInt8: no memory for the packed weight");
    }
    kernels->pack(w, from, codes, sums);
    release_file_pages(from, w->columns * w->rows);
    w->codes = codes, w->sums = sums;
    return NULL;
}

static void release(const Int8Weight *w) {
    free_weight_memory((void *)w->codes);
    free((void *)w->sums);
}

static Status *create_product(const CustomOp *op, Api api, const KernelInfo *info, void **kernel) {
    (void)op;
    Product node = {.api = api, .kernels = usable_int8_kernels(), .norms = usable_kernels()};
    Int8Weight *w = &node.weight;
    const char *const names[] = {"N", "K", "quick_gelu", "affine"};
    int64_t *const to[] = {&w->rows, &w->columns, &node.quick_gelu, &node.affine};
    CHECK(attributes(api, info, names, to, 4));
    w->quick_gelu = node.quick_gelu != 0, w->affine = node.affine != 0;
    if (node.kernels == NULL)
        return CreateStatus(api)(ABI_FAIL, "edgevl.MatMulInt8: this processor has no instructions that it knows");
    if (w->rows < 1 || w->rows > MOST_OUTPUTS || w->columns < 1 || w->columns > MOST_COLUMNS)
        return CreateStatus(api)(ABI_INVALID_ARGUMENT, "edgevl.MatMulInt8: expected N of 1 to 2^30, and K of 1 to "
                                                       "65536, whose sums fit into 32 bits");
    CHECK(constant_inputs(api, info, INPUTS, &node.constants));
    CHECK(pack(api, info, node.kernels, w));
    Status *status = keep(api, &node, sizeof node, kernel);
    if (status != NULL) release(w);
    return status;
}

static void destroy_product(void *kernel) {
    const Product *node = kernel;
    release(&node->weight);
    free(kernel);
}

static const char *product_name(const CustomOp *op) { (void)op; return "MatMulInt8"; }
static size_t product_inputs(const CustomOp *op) { (void)op; return INPUTS; }
static int product_type(const CustomOp *op, size_t i) { (void)op; return i == 1 ? ABI_INT8 : ABI_FLOAT; }
static int product_kind(const CustomOp *op, size_t i) { (void)op; return i < 3 ? ABI_REQUIRED : ABI_OPTIONAL; }

const CustomOp matmul_int8 = OPERATOR(product_name, product_inputs, product_type, product_kind, create_product,
                                      multiply, destroy_product);

/* -------------------------------------------------------------------------------------------------- FrameAttention
 * qkv float [frames, patches, 3 × heads × dim], cos and sin float [frames, patches, dim / 2]; attribute num_heads.
 * Rotates queries and keys in halves, scales by 1 / sqrt(dim).
 */

typedef struct {
    Api api;
    const Int8Kernels *kernels;
    int64_t heads;
} Frames;

typedef struct {
    const Frames *node;
    Attention attention;
    int64_t blocks; /* of queries */
    int64_t done;   /* blocks of all heads, before the last pause */
    int failed;
} FramesCall;

static void prepare_task(void *data, size_t i) {
    FramesCall *call = data;
    if (!call->node->kernels->prepare(&call->attention, (int64_t)i))
        __atomic_store_n(&call->failed, 1, __ATOMIC_RELAXED);
}

static void attend_task(void *data, size_t i) {
    const FramesCall *call = data;
    const int64_t task = call->done + (int64_t)i;
    call->node->kernels->attend(&call->attention, task / call->blocks, task % call->blocks);
}

static Status *run_frames(const Frames *node, KernelContext *context, FramesCall *call) {
    Attention *a = &call->attention;
    const int64_t heads = a->frames * a->heads, length = padded_length(a), padded = padded_dim(a);
    const size_t codes = heads * length * padded, of_keys = heads * length * sizeof(float);
    const size_t of_values = heads * key_blocks(a) * padded * sizeof(float);
    char *memory = aligned_alloc(64, 2 * (codes + of_keys) + of_values);
    const char *const no_memory = "edgevl.FrameAttention: no memory for keys and values";
    if (memory == NULL) return CreateStatus(node->api)(ABI_FAIL, no_memory);
    a->keys = (uint8_t *)memory, a->values = (int8_t *)(memory + codes);
    a->key_scales = (float *)(memory + 2 * codes), a->key_limits = (float *)(memory + 2 * codes + of_keys);
    a->value_scales = (float *)(memory + 2 * (codes + of_keys));
    call->blocks = up_to(a->length, QUERIES) / QUERIES;
    Status *status = parallel(node->api, context, prepare_task, heads, call);
    if (status == NULL && call->failed) status = CreateStatus(node->api)(ABI_FAIL, no_memory);
    const int64_t tasks = heads * call->blocks, parts = up_to(a->length, PART_LENGTH) / PART_LENGTH;
    const int64_t most = up_to(tasks, parts) / parts;
    for (; status == NULL && call->done < tasks; call->done += most) {
        const int64_t left = tasks - call->done;
        status = pause_pass(node->api);
        if (status == NULL) status = parallel(node->api, context, attend_task, left < most ? left : most, call);
    }
    free(memory);
    return status;
}

static Status *attend(void *kernel, KernelContext *context) {
    const Frames *node = kernel;
    const Api api = node->api;
    FramesCall call = {.node = node};
    Attention *a = &call.attention;
    int64_t dims[MOST_DIMENSIONS];
    size_t count = 0;
    CHECK(input_data(api, context, 0, &a->qkv));
    CHECK(input_data(api, context, 1, &a->cosine));
    CHECK(input_data(api, context, 2, &a->sine));
    CHECK(input_shape(api, context, 0, dims, &count));
    a->heads = node->heads;
    a->dim = count == 3 ? dims[2] / 3 / a->heads : 0;
    if (count != 3 || a->dim * 3 * a->heads != dims[2] || a->dim % 2 != 0 || a->dim < 2 || a->dim > 128)
        return CreateStatus(api)(ABI_INVALID_ARGUMENT, "edgevl.FrameAttention: expected qkv [frames, patches, 3 × "
                                                       "heads × dim] with an even dim of at most 128");
    for (size_t input = 1; input <= 2; input++) {
        int64_t rotary[MOST_DIMENSIONS];
        size_t axes = 0;
        CHECK(input_shape(api, context, input, rotary, &axes));
        if (axes != 3 || rotary[0] != dims[0] || rotary[1] != dims[1] || rotary[2] * 2 != a->dim)
            return CreateStatus(api)(ABI_INVALID_ARGUMENT, "edgevl.FrameAttention: expected cos and sin "
                                                           "[frames, patches, dim / 2]");
    }
    a->frames = dims[0], a->length = dims[1];
    a->scale = 1 / sqrtf((float)a->dim);
    dims[2] = a->heads * a->dim;
    CHECK(output_data(api, context, 0, dims, 3, &a->out));
    return a->frames == 0 || a->length == 0 ? NULL : run_frames(node, context, &call);
}

static Status *create_frames(const CustomOp *op, Api api, const KernelInfo *info, void **kernel) {
    (void)op;
    Frames node = {.api = api, .kernels = usable_int8_kernels()};
    const char *const names[] = {"num_heads"};
    int64_t *const to[] = {&node.heads};
    CHECK(attributes(api, info, names, to, 1));
    if (node.kernels == NULL)
        return CreateStatus(api)(ABI_FAIL, "edgevl.FrameAttention: this processor has no instructions that it knows");
    if (node.heads < 1)
        return CreateStatus(api)(ABI_INVALID_ARGUMENT, "edgevl.FrameAttention: expected num_heads of at least 1");
    return keep(api, &node, sizeof node, kernel);
}

static const char *frames_name(const CustomOp *op) { (void)op; return "FrameAttention"; }
static size_t frames_inputs(const CustomOp *op) { (void)op; return 3; }
static int frames_type(const CustomOp *op, size_t i) { (void)op; (void)i; return ABI_FLOAT; }
static int frames_kind(const CustomOp *op, size_t i) { (void)op; (void)i; return ABI_REQUIRED; }

const CustomOp frame_attention = OPERATOR(frames_name, frames_inputs, frames_type, frames_kind, create_frames,
                                          attend, free);
