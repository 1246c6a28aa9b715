/* What the thread that runs a session wants done between its products; see runtime/pauses.py. */
#include "operator.h"

static __thread void (*at_pauses)(void);

EXPORT void edgevl_at_pauses(void (*call)(void)) { at_pauses = call; }

void pause_pass(void) {
    if (at_pauses != NULL) at_pauses();
}
