/* The few functions of ONNX Runtime's C API that an operator of one's own needs, found by their places in its table.
 *
 * The table only grows at its end (onnxruntime_c_api.h promises it), and wheels bring no header. Places are those of
 * that header; ABI_VERSION is the oldest release that has them all, which ONNX Runtime is asked for by number.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define ABI_VERSION 17 /* ONNX Runtime 1.17: KernelContext_ParallelFor */

enum { ABI_FLOAT = 1, ABI_UINT8 = 2, ABI_INT8 = 3, ABI_INT32 = 6 };           /* ONNXTensorElementDataType */
enum { ABI_REQUIRED = 0, ABI_OPTIONAL = 1 };      /* OrtCustomOpInputOutputCharacteristic */
enum { ABI_FAIL = 1, ABI_INVALID_ARGUMENT = 2 };  /* OrtErrorCode */

typedef void *const *Api; /* OrtApi */
typedef struct Status Status;
typedef struct Value Value;
typedef struct ShapeInfo ShapeInfo;
typedef struct KernelContext KernelContext;
typedef struct KernelInfo KernelInfo;
typedef struct Domain Domain;
typedef struct SessionOptions SessionOptions;

typedef struct {
    Api (*GetApi)(uint32_t version);
    const char *(*GetVersionString)(void);
} ApiBase;

typedef struct CustomOp {
    uint32_t version;
    void *(*CreateKernel)(const struct CustomOp *, Api, const KernelInfo *);
    const char *(*GetName)(const struct CustomOp *);
    const char *(*GetExecutionProviderType)(const struct CustomOp *);
    int (*GetInputType)(const struct CustomOp *, size_t);
    size_t (*GetInputTypeCount)(const struct CustomOp *);
    int (*GetOutputType)(const struct CustomOp *, size_t);
    size_t (*GetOutputTypeCount)(const struct CustomOp *);
    void (*KernelCompute)(void *, KernelContext *);
    void (*KernelDestroy)(void *);
    int (*GetInputCharacteristic)(const struct CustomOp *, size_t);
    int (*GetOutputCharacteristic)(const struct CustomOp *, size_t);
    int (*GetInputMemoryType)(const struct CustomOp *, size_t);
    int (*GetVariadicInputMinArity)(const struct CustomOp *);
    int (*GetVariadicInputHomogeneity)(const struct CustomOp *);
    int (*GetVariadicOutputMinArity)(const struct CustomOp *);
    int (*GetVariadicOutputHomogeneity)(const struct CustomOp *);
    Status *(*CreateKernelV2)(const struct CustomOp *, Api, const KernelInfo *, void **);
    Status *(*KernelComputeV2)(void *, KernelContext *);
    Status *(*InferOutputShape)(const struct CustomOp *, void *);
    int (*GetStartVersion)(const struct CustomOp *);
    int (*GetEndVersion)(const struct CustomOp *);
} CustomOp;

#define ABI_SLOT(place, result, name, ...) \
    static inline result (*name(Api api))(__VA_ARGS__) { return (result (*)(__VA_ARGS__))api[place]; }

ABI_SLOT(0, Status *, CreateStatus, int, const char *)
ABI_SLOT(26, Status *, CreateCustomOpDomain, const char *, Domain **)
ABI_SLOT(27, Status *, CustomOpDomain_Add, Domain *, const CustomOp *)
ABI_SLOT(28, Status *, AddCustomOpDomain, SessionOptions *, Domain *)
ABI_SLOT(51, Status *, GetTensorMutableData, Value *, void **)
ABI_SLOT(61, Status *, GetDimensionsCount, const ShapeInfo *, size_t *)
ABI_SLOT(62, Status *, GetDimensions, const ShapeInfo *, int64_t *, size_t)
ABI_SLOT(65, Status *, GetTensorTypeAndShape, const Value *, ShapeInfo **)
ABI_SLOT(86, Status *, KernelInfoGetAttribute_int64, const KernelInfo *, const char *, int64_t *)
ABI_SLOT(90, Status *, KernelContext_GetInput, const KernelContext *, size_t, const Value **)
ABI_SLOT(91, Status *, KernelContext_GetOutput, KernelContext *, size_t, const int64_t *, size_t, Value **)
ABI_SLOT(99, void, ReleaseTensorTypeAndShapeInfo, ShapeInfo *)
ABI_SLOT(249, Status *, KernelInfoGetConstantInput_tensor, const KernelInfo *, size_t, int *, const Value **)
ABI_SLOT(274, Status *, KernelContext_ParallelFor, const KernelContext *, void (*)(void *, size_t), size_t, size_t,
         void *)
