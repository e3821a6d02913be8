// What dispatch.cpp and the instruction sets' own files share: one function for each set.
#ifndef LOWMEM_ADAM_WORK_H
#define LOWMEM_ADAM_WORK_H

#include "lowmem_adam.h"

// Steps blocks [first, end) of a checked fragment (numbered as in the whole parameter); returns how many were left as
// they were for a non-finite gradient.
using StepBlocks = int64_t (*)(const lowmem_adam_fragment &fragment, const lowmem_adam_scalars &scalars, int64_t first,
                               int64_t end);

int64_t lowmem_adam_step_blocks_scalar(const lowmem_adam_fragment &, const lowmem_adam_scalars &, int64_t, int64_t);
int64_t lowmem_adam_step_blocks_avx2(const lowmem_adam_fragment &, const lowmem_adam_scalars &, int64_t, int64_t);
int64_t lowmem_adam_step_blocks_avx512(const lowmem_adam_fragment &, const lowmem_adam_scalars &, int64_t, int64_t);
int64_t lowmem_adam_step_blocks_neon(const lowmem_adam_fragment &, const lowmem_adam_scalars &, int64_t, int64_t);

#endif
