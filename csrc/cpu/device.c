/* The CPU as a device: plain aligned memory and the kernels of the best instruction set. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "base/cpu.h"
#include "tensor/device.h"

extern const moe_kernels moe_cpu_kernels_baseline;
#ifdef MOE_HAVE_X86_KERNELS
extern const moe_kernels moe_cpu_kernels_avx2, moe_cpu_kernels_avx512;
#endif

/* Large blocks lie on huge pages where the system gives them: fewer faults at first touch, fewer TLB misses after. */
enum { HUGE = 2 << 20 };

static void *cpu_alloc(moe_device *d, int64_t bytes) {
  (void)d;
  size_t align = bytes >= 2 * HUGE ? HUGE : 64;
  void *p = aligned_alloc(align, ((size_t)bytes + align - 1) & ~(align - 1));
#ifdef MADV_HUGEPAGE
  if (p != NULL && align == HUGE) madvise(p, (size_t)bytes & ~(align - 1), MADV_HUGEPAGE);
#endif
  return p;
}

static void cpu_release(moe_device *d, void *p, int64_t bytes) {
  (void)d, (void)bytes;
  free(p);
}

static moe_status cpu_copy(moe_device *d, void *dst, const void *src, int64_t bytes) {
  (void)d;
  memcpy(dst, src, (size_t)bytes);
  return MOE_OK;
}

static moe_device cpu = {
    .type = "cpu", .name = "cpu", .alloc = cpu_alloc, .release = cpu_release, .to_host = cpu_copy, .from_host = cpu_copy,
    .host_memory = true};
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void choose(void) {
  cpu.k = moe_cpu_kernels_baseline;
#ifdef MOE_HAVE_X86_KERNELS
  /* AMX serves bf16 products only; everything else of an AMX machine is AVX-512. */
  static const moe_kernels *const by_isa[MOE_ISA_COUNT] = {
      [MOE_ISA_BASELINE] = &moe_cpu_kernels_baseline, [MOE_ISA_AVX2] = &moe_cpu_kernels_avx2,
      [MOE_ISA_AVX512] = &moe_cpu_kernels_avx512, [MOE_ISA_AMX] = &moe_cpu_kernels_avx512};
  cpu.k = *by_isa[moe_cpu_isa()];
#endif
}

moe_device *moe_cpu(void) {
  pthread_once(&once, choose);
  return &cpu;
}
