/* What the thread that runs a session wants done between its products; see runtime/pauses.py. */
#include "operator.h"

static __thread int (*at_pauses)(void);

/* What `call` gives: whether the pass goes on; else the operator fails. */
EXPORT void edgevl_at_pauses(int (*call)(void)) { at_pauses = call; }

Status *pause_pass(Api api) {
    if (at_pauses == NULL || at_pauses()) return NULL;
    return CreateStatus(api)(ABI_FAIL, "edgevl: the pass was given up");
}
