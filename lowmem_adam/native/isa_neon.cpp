// The step for NEON. Everything in here but the one function has internal linkage, so that no code compiled
// for this instruction set can serve a machine without it.
#include "blocks.h"
#include "vec_neon.h"
#include "work.h"

int64_t lowmem_adam_step_blocks_neon(const lowmem_adam_fragment &fragment, const lowmem_adam_scalars &scalars,
                                     int64_t first, int64_t end) {
    return step_blocks_of<Neon>(fragment, scalars, first, end);
}
