/* The C interface of the native step: what kernels/cpu.py binds with ctypes.
 *
 * Nothing of torch is in it, so one library serves every version of torch and Python. Any change to a structure, a
 * constant or a function's meaning raises LOWMEM_ADAM_ABI_VERSION; kernels/cpu.py refuses a library of another one.
 */
#ifndef LOWMEM_ADAM_H
#define LOWMEM_ADAM_H

#include <stdint.h>

#if defined(_WIN32)
#define LOWMEM_ADAM_API __declspec(dllexport)
#else
#define LOWMEM_ADAM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define LOWMEM_ADAM_ABI_VERSION 4

/* The most dimensions of a tensor that is not contiguous, after neighbours that run on in memory were merged. */
#define LOWMEM_ADAM_MAX_DIMS 8

enum lowmem_adam_status {
    LOWMEM_ADAM_OK = 0,
    LOWMEM_ADAM_BAD_DTYPE = 1,   /* a dtype, or a pair of them, that no kernel serves */
    LOWMEM_ADAM_BAD_LAYOUT = 2,  /* rows, blocks, sizes and scalars that do not fit one another */
    LOWMEM_ADAM_BAD_POINTER = 3, /* a null pointer where data must be */
    LOWMEM_ADAM_BAD_ISA = 4,     /* an instruction set that was not built, or that this processor lacks */
    LOWMEM_ADAM_BAD_THREADS = 5, /* fewer than one thread */
    LOWMEM_ADAM_FORKED = 6,      /* more than one thread in the child of a fork, where OpenMP would hang */
};

enum lowmem_adam_dtype {
    LOWMEM_ADAM_FLOAT32 = 0,
    LOWMEM_ADAM_BFLOAT16 = 1,
    LOWMEM_ADAM_FLOAT16 = 2,
};

/* What is kept of a weight beside its 16-bit parameter, an entry an element: kernels/rounding.py. */
enum lowmem_adam_master_kind {
    LOWMEM_ADAM_NO_MASTER = 0,
    LOWMEM_ADAM_MASTER_FLOAT32 = 1, /* the weight */
    LOWMEM_ADAM_MASTER_INT16 = 2,   /* a correction */
    LOWMEM_ADAM_MASTER_INT8 = 3,
};

enum lowmem_adam_isa {
    LOWMEM_ADAM_BEST = -1,
    LOWMEM_ADAM_SCALAR = 0,
    LOWMEM_ADAM_AVX2 = 1,
    LOWMEM_ADAM_AVX512 = 2,
    LOWMEM_ADAM_NEON = 3,
};

/* Elements in row-major order: one after the other where dims is 0, else by `dims` sizes and then as many strides, both
 * in elements, the outermost dimension first. */
struct lowmem_adam_tensor {
    void *data;
    const int64_t *shape;
    int32_t dtype;
    int32_t dims;
};

/* Blocks [first_block, end_block) of a parameter of `rows` rows of `cols` elements; all pointers begin at the first of
 * them. With block_floor, exp_avg and exp_avg_sq are int8 and uint8 codes; with absmax1, uint8 codes of bitsandbytes'
 * dynamic maps; without either float32. They are always contiguous, as is master. Blocks have 128 elements, or 256: those
 * of bitsandbytes, and of float32 moments beside it. */
struct lowmem_adam_fragment {
    struct lowmem_adam_tensor param;
    struct lowmem_adam_tensor grad;
    void *exp_avg;
    void *exp_avg_sq;
    uint8_t *block_floor;
    uint8_t *block_span;
    float *absmax1;
    float *absmax2;
    void *master;
    int64_t master_kind;
    int64_t rows;
    int64_t cols;
    int64_t block_size;
    int64_t first_block;
    int64_t end_block;
    int64_t scalars; /* index into the array of hyperparameters */
};

/* One step's hyperparameters; StepScalars of kernels/fragment.py says what each is. Rounded to float32 once. */
struct lowmem_adam_scalars {
    float beta1;
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float eps;
    float weight_decay;
    float shrink;
    float step_size;
    float grad_scale; /* negative to ascend */
    int32_t stochastic; /* where there is no master */
    int32_t skip_nonfinite;
    int32_t wide;       /* whether blocks look for ratio octaves */
    uint32_t seed_hash; /* mix32(seed) */
    uint32_t step;      /* modulo 2^32: all that the dither depends on */
};

/* The constants of the format that this library was compiled with, for comparison with codec.FORMAT, and the sizes of
 * the two structures above, for comparison with what kernels/cpu.py packs. */
struct lowmem_adam_format {
    int32_t fragment_bytes;
    int32_t scalars_bytes;
    int32_t version;
    int32_t block_size;
    int32_t root_intervals;
    int32_t max_octaves;
    int32_t octave_bits;
    int32_t ratio_scale;
    int32_t ratio_limit;
    int32_t ratio_always_dithered;
    float ratio_thresholds[7];
    float reciprocal_first;
    float reciprocal_second;
    uint32_t reciprocal_seed;
    uint32_t hash_fold;
    uint32_t hash_multipliers[2];
    uint32_t moment_step;
    uint32_t moment_lane;
    uint32_t update_step;
    uint32_t update_lane;
    uint32_t update_key;
};

LOWMEM_ADAM_API int32_t lowmem_adam_abi_version(void);

LOWMEM_ADAM_API struct lowmem_adam_format lowmem_adam_format(void);

/* The 256 values of bitsandbytes' signed (1) or unsigned (0) dynamic map that this library has, for comparison. */
LOWMEM_ADAM_API const float *lowmem_adam_dynamic_map(int32_t is_signed);

/* 1 where this library has the instruction set and this processor can run it, else 0. */
LOWMEM_ADAM_API int32_t lowmem_adam_has_isa(int32_t isa);

/* The best instruction set there is: what LOWMEM_ADAM_BEST stands for. */
LOWMEM_ADAM_API int32_t lowmem_adam_best_isa(void);

/* The file of the OpenMP library whose threads are used, "" where that is not known; NULL without OpenMP: then threads
 * are started for each call. */
LOWMEM_ADAM_API const char *lowmem_adam_openmp_library(void);

/* One Adam step on `count` fragments, in place.
 *
 * The blocks of all fragments are one list of work, split over at most `num_threads` threads. The result does not
 * depend on threads, on the order of fragments, on how a parameter is cut at block starts, or on `isa`. Everything is
 * checked first: with a status other than OK nothing has changed.
 *
 * skipped: gets the number of blocks left as they were for a non-finite gradient. */
LOWMEM_ADAM_API int32_t lowmem_adam_step(const struct lowmem_adam_fragment *fragments, int64_t count,
                                         const struct lowmem_adam_scalars *scalars, int64_t scalars_count,
                                         int32_t num_threads, int32_t isa, int64_t *skipped);

#ifdef __cplusplus
}
#endif

#endif
