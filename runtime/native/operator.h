/* What all operators share: how ONNX Runtime is asked for tensors, and the descriptions that never change. */
#pragma once

#include <stdlib.h>
#include <string.h>

#include "nbits.h"
#include "ort_abi.h"

#define EXPORT __attribute__((visibility("default")))
#define CHECK(call)                        \
    do {                                   \
        Status *status_ = (call);          \
        if (status_ != NULL) return status_; \
    } while (0)

enum { MOST_DIMENSIONS = 8 };

static inline int64_t up_to(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

/* An input's data, NULL where an optional one is absent. */
static inline Status *input_data(Api api, const KernelContext *context, size_t index, const void *data) {
    const Value *value = NULL;
    *(const void **)data = NULL;
    CHECK(KernelContext_GetInput(api)(context, index, &value));
    return value == NULL ? NULL : GetTensorMutableData(api)((Value *)value, (void **)data);
}

/* The axes of a tensor, at most MOST_DIMENSIONS. */
static inline Status *tensor_shape(Api api, const Value *value, int64_t *dims, size_t *count) {
    ShapeInfo *shape = NULL;
    CHECK(GetTensorTypeAndShape(api)(value, &shape));
    Status *status = GetDimensionsCount(api)(shape, count);
    if (status == NULL && *count <= MOST_DIMENSIONS) status = GetDimensions(api)(shape, dims, *count);
    ReleaseTensorTypeAndShapeInfo(api)(shape);
    if (status == NULL && *count > MOST_DIMENSIONS)
        status = CreateStatus(api)(ABI_INVALID_ARGUMENT, "edgevl: an input has more than 8 axes");
    return status;
}

static inline Status *input_shape(Api api, const KernelContext *context, size_t index, int64_t *dims, size_t *count) {
    const Value *value = NULL;
    CHECK(KernelContext_GetInput(api)(context, index, &value));
    return tensor_shape(api, value, dims, count);
}

static inline Status *input_size(Api api, const KernelContext *context, size_t index, int64_t *size) {
    int64_t dims[MOST_DIMENSIONS];
    size_t count = 0;
    CHECK(input_shape(api, context, index, dims, &count));
    *size = 1;
    for (size_t axis = 0; axis < count; axis++) *size *= dims[axis];
    return NULL;
}

/* Refuses a present input of another number of elements. */
static inline Status *check_size(Api api, const KernelContext *context, size_t index, int64_t wanted,
                                 const char *mismatch) {
    const Value *value = NULL;
    int64_t size = 0;
    CHECK(KernelContext_GetInput(api)(context, index, &value));
    if (value == NULL) return NULL;
    CHECK(input_size(api, context, index, &size));
    return size == wanted ? NULL : CreateStatus(api)(ABI_INVALID_ARGUMENT, mismatch);
}

/* Bits of those of the first `count` inputs that are constants. */
static inline Status *constant_inputs(Api api, const KernelInfo *info, size_t count, uint32_t *constants) {
    *constants = 0;
    for (size_t index = 0; index < count; index++) {
        const Value *value = NULL;
        int constant = 0;
        CHECK(KernelInfoGetConstantInput_tensor(api)(info, index, &constant, &value));
        *constants |= (uint32_t)(constant != 0) << index;
    }
    return NULL;
}

/* As check_size; `checked` becomes 0 where the next call may bring another size: the input is there and no constant. */
static inline Status *check_once(Api api, const KernelContext *context, size_t index, int64_t wanted,
                                 const char *mismatch, uint32_t constants, int *checked) {
    const Value *value = NULL;
    CHECK(KernelContext_GetInput(api)(context, index, &value));
    if (value == NULL) return NULL;
    if (!(constants >> index & 1)) *checked = 0;
    return check_size(api, context, index, wanted, mismatch);
}

static inline Status *output_data(Api api, KernelContext *context, size_t index, const int64_t *dims, size_t count,
                                  float **y) {
    Value *output = NULL;
    CHECK(KernelContext_GetOutput(api)(context, index, dims, count, &output));
    return GetTensorMutableData(api)(output, (void **)y);
}

/* For products: x [..., columns] and y [..., rows of the weight], as two axes. */
static inline Status *open_product(Api api, KernelContext *context, int64_t columns, int64_t outputs,
                                   const char *mismatch, int64_t *rows, float **y) {
    int64_t dims[MOST_DIMENSIONS];
    size_t count = 0;
    CHECK(input_shape(api, context, 0, dims, &count));
    if (count < 1 || dims[count - 1] != columns)
        return CreateStatus(api)(ABI_INVALID_ARGUMENT, mismatch);
    *rows = 1;
    for (size_t i = 0; i + 1 < count; i++) *rows *= dims[i];
    dims[count - 1] = outputs;
    return output_data(api, context, 0, dims, count, y);
}

/* An optional input that has as many numbers as the product's output. */
static inline Status *like_output(Api api, const KernelContext *context, size_t index, int64_t columns, int64_t outputs,
                                  const float **data) {
    int64_t size = 0;
    CHECK(input_data(api, context, index, data));
    if (*data == NULL) return NULL;
    CHECK(input_size(api, context, 0, &size));
    return check_size(api, context, index, size / columns * outputs,
                      "edgevl: gate or residual is not of the output's shape");
}

/* For products: the inputs norm_weight, norm_bias and norm_epsilon, from `first` on, all three optional. */
static inline Status *norm_inputs(Api api, const KernelContext *context, size_t first, Norm *norm) {
    const float *epsilon = NULL;
    CHECK(input_data(api, context, first, &norm->weight));
    CHECK(input_data(api, context, first + 1, &norm->bias));
    CHECK(input_data(api, context, first + 2, &epsilon));
    if ((norm->weight == NULL) != (epsilon == NULL) || (norm->weight == NULL && norm->bias != NULL))
        return CreateStatus(api)(ABI_INVALID_ARGUMENT, "edgevl: norm_weight and norm_epsilon go together, and "
                                                       "norm_bias with them");
    if (epsilon != NULL) norm->epsilon = *epsilon;
    return NULL;
}

static inline Status *check_norm(Api api, const KernelContext *context, size_t first, int64_t columns,
                                 uint32_t constants, int *checked) {
    const char *const mismatch = "edgevl: norm_weight or norm_bias has not K numbers, or norm_epsilon not one";
    for (size_t i = 0; i < 2; i++) CHECK(check_once(api, context, first + i, columns, mismatch, constants, checked));
    return check_once(api, context, first + 2, 1, mismatch, constants, checked);
}

/* Rows of x, normalised in memory that is to be freed afterwards; those of x itself without a norm. NULL: no memory. */
static inline const float *normalized(const Kernels *kernels, const Norm *norm, const float *x, int64_t rows,
                                      int64_t columns, float **room) {
    *room = NULL;
    if (norm->weight == NULL) return x;
    *room = malloc(rows * columns * sizeof(float));
    if (*room == NULL) return NULL;
    for (int64_t m = 0; m < rows; m++)
        kernels->normalize(norm, x + m * columns, columns, *room + m * columns);
    return *room;
}

static inline Status *parallel(Api api, KernelContext *context, void (*task)(void *, size_t), int64_t count,
                               void *data) {
    return KernelContext_ParallelFor(api)(context, task, count, 0, data);
}

static inline Status *attributes(Api api, const KernelInfo *info, const char *const *names, int64_t *const *to,
                                 int count) {
    for (int i = 0; i < count; i++) CHECK(KernelInfoGetAttribute_int64(api)(info, names[i], to[i]));
    return NULL;
}

/* A copy of a node that lives as long as its kernel. */
static inline Status *keep(Api api, const void *node, size_t size, void **kernel) {
    *kernel = malloc(size);
    if (*kernel == NULL) return CreateStatus(api)(ABI_FAIL, "edgevl: no memory for an operator");
    memcpy(*kernel, node, size);
    return NULL;
}

static inline const char *op_provider(const CustomOp *op) { (void)op; return "CPUExecutionProvider"; }
static inline size_t op_one_output(const CustomOp *op) { (void)op; return 1; }
static inline int op_float_output(const CustomOp *op, size_t i) { (void)op; (void)i; return ABI_FLOAT; }
static inline int op_required_output(const CustomOp *op, size_t i) { (void)op; (void)i; return ABI_REQUIRED; }
static inline int op_cpu_memory(const CustomOp *op, size_t i) { (void)op; (void)i; return 0; }
static inline int op_none(const CustomOp *op) { (void)op; return 0; }
static inline int op_version(const CustomOp *op) { (void)op; return 1; }

#define OPERATOR_OF(name_, inputs_, type_, kind_, outputs_, create_, compute_, destroy_)        \
    {                                                                                           \
        .version = ABI_VERSION, .GetName = name_, .GetExecutionProviderType = op_provider,      \
        .GetInputType = type_, .GetInputTypeCount = inputs_, .GetInputCharacteristic = kind_,   \
        .GetOutputType = op_float_output, .GetOutputTypeCount = outputs_,                       \
        .GetOutputCharacteristic = op_required_output, .GetInputMemoryType = op_cpu_memory,     \
        .GetVariadicInputMinArity = op_none, .GetVariadicInputHomogeneity = op_none,            \
        .GetVariadicOutputMinArity = op_none, .GetVariadicOutputHomogeneity = op_none,          \
        .GetStartVersion = op_version, .GetEndVersion = op_version,                             \
        .CreateKernelV2 = create_, .KernelComputeV2 = compute_, .KernelDestroy = destroy_,      \
    }
#define OPERATOR(name_, inputs_, type_, kind_, create_, compute_, destroy_) \
    OPERATOR_OF(name_, inputs_, type_, kind_, op_one_output, create_, compute_, destroy_)

Status *pause_pass(Api api); /* before a product takes its inputs: see pauses.c */

extern const CustomOp causal_attention, matmul_nbits, matmul_int8, frame_attention;
