/* Looked up by ONNX Runtime under its name, once for every session that is given this library. */
#include "operator.h"

EXPORT Status *RegisterCustomOps(SessionOptions *options, const ApiBase *base) {
    static Domain *domain = NULL; /* lives as long as the process */
    const Api api = base->GetApi(ABI_VERSION);
    if (domain == NULL) {
        Domain *made = NULL;
        const CustomOp *const operators[] = {&causal_attention, &matmul_nbits, &matmul_int8, &frame_attention};
        CHECK(CreateCustomOpDomain(api)("edgevl", &made));
        for (size_t i = 0; i < sizeof operators / sizeof *operators; i++)
            CHECK(CustomOpDomain_Add(api)(made, operators[i]));
        domain = made;
    }
    return AddCustomOpDomain(api)(options, domain);
}
