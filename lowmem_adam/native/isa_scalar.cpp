// The step for every processor, one element at a time.
#include "blocks.h"
#include "vec_scalar.h"
#include "work.h"

int64_t lowmem_adam_step_blocks_scalar(const lowmem_adam_fragment &fragment, const lowmem_adam_scalars &scalars,
                                       int64_t first, int64_t end) {
    return step_blocks_of<Scalar>(fragment, scalars, first, end);
}
