// Included ahead of dispatch.cpp (-include): cpu.h with a processor that has AVX-512, for a library that emulates it.
#ifndef LOWMEM_ADAM_TESTS_EVERY_CPU_H
#define LOWMEM_ADAM_TESTS_EVERY_CPU_H

#define host_cpu probed_cpu
#include "cpu.h"
#undef host_cpu

namespace {

inline HostCpu host_cpu() {
    HostCpu cpu = probed_cpu();
    cpu.avx512 = true;
    return cpu;
}

}  // namespace

#endif
