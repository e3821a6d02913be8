// What the processor at hand can do, and the mode its float unit is to be in. Only dispatch.cpp includes this.
#ifndef LOWMEM_ADAM_CPU_H
#define LOWMEM_ADAM_CPU_H

#include <stdint.h>

#if defined(__x86_64__) || defined(_M_X64)
#define LOWMEM_ADAM_X86 1
#include <cpuid.h>
#include <xmmintrin.h>
#elif defined(__aarch64__)
#define LOWMEM_ADAM_ARM64 1
#endif

namespace {

struct HostCpu {
    bool avx2 = false;    // with F16C
    bool avx512 = false;  // F, DQ, BW and VL

    HostCpu() {
#ifdef LOWMEM_ADAM_X86
        // Intel SDM volume 1, sections 14.3 and 15.2: an instruction set counts only where the system saves its registers.
        uint32_t a, b, c, d;
        if (!__get_cpuid(1, &a, &b, &c, &d)) return;
        const bool xsave = c >> 27 & 1, avx = c >> 28 & 1, f16c = c >> 29 & 1;
        if (!xsave || !avx) return;
        uint32_t saved, upper;
        __asm__("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
        if ((saved & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        avx2 = f16c && (b >> 5 & 1);
        constexpr uint32_t needed = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
        avx512 = avx2 && (saved & 0xE6) == 0xE6 && (b & needed) == needed;
#endif
    }
};

inline const HostCpu &host_cpu() {
    static const HostCpu cpu;  // probed once
    return cpu;
}

// While it lives: rounding to nearest, subnormal numbers kept. torch.set_flush_denormal changes the calling thread only,
// which would make results depend on the number of threads.
class FloatMode {
   public:
#ifdef LOWMEM_ADAM_X86
    FloatMode() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
    ~FloatMode() { _mm_setcsr(before_); }

   private:
    unsigned int before_;
#elif defined(LOWMEM_ADAM_ARM64)
    FloatMode() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
        __asm__ volatile("msr fpcr, %0" : : "r"(static_cast<uint64_t>(0)));
    }
    ~FloatMode() { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }

   private:
    uint64_t before_;
#else
    FloatMode() {}
    ~FloatMode() {}
#endif
    FloatMode(const FloatMode &) = delete;
    FloatMode &operator=(const FloatMode &) = delete;
};

}  // namespace

#endif
