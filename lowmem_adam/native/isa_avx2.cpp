// The step for AVX2 and F16C. Everything in here but the one function has internal linkage, so that no code compiled
// for this instruction set can serve a machine without it.
#include "blocks.h"
#include "vec_avx2.h"
#include "work.h"

int64_t lowmem_adam_step_blocks_avx2(const lowmem_adam_fragment &fragment, const lowmem_adam_scalars &scalars,
                                     int64_t first, int64_t end) {
    return step_blocks_of<Avx2>(fragment, scalars, first, end);
}
