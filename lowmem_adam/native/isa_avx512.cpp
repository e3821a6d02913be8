// The step for AVX-512. Everything in here but the one function has internal linkage, so that no code compiled
// for this instruction set can serve a machine without it.
#include "blocks.h"
#include "vec_avx512.h"
#include "work.h"

int64_t lowmem_adam_step_blocks_avx512(const lowmem_adam_fragment &fragment, const lowmem_adam_scalars &scalars,
                                     int64_t first, int64_t end) {
    return step_blocks_of<Avx512>(fragment, scalars, first, end);
}
