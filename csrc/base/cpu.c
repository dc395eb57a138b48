#include "base/cpu.h"

#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

static const char *const names[MOE_ISA_COUNT] = {"baseline", "avx2", "avx512", "amx"};

static pthread_once_t once = PTHREAD_ONCE_INIT;
static moe_isa chosen;
static bool has[MOE_ISA_COUNT];
static const char *note;

#if defined(__x86_64__) && defined(__linux__)
/* AMX needs the tile and bf16 units and the kernel's leave to use the tile state. */
static bool detect_amx(void) {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d >> 24 & 1) || !(d >> 22 & 1)) return false;
  const long arch_req_xcomp_perm = 0x1023, xtile_data = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xtile_data) == 0;
}
#endif

static void detect(void) {
  has[MOE_ISA_BASELINE] = true;
#if defined(__x86_64__) && defined(__linux__)
  __builtin_cpu_init();
  has[MOE_ISA_AVX2] = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  has[MOE_ISA_AVX512] = has[MOE_ISA_AVX2] && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
  has[MOE_ISA_AMX] = has[MOE_ISA_AVX512] && detect_amx();
#endif
  for (int i = 0; i < MOE_ISA_COUNT; i++)
    if (has[i]) chosen = (moe_isa)i;
  const char *force = getenv("MOE_ISA");
  if (force == NULL || *force == '\0') return;
  for (int i = 0; i < MOE_ISA_COUNT; i++)
    if (strcmp(force, names[i]) == 0) {
      if (has[i]) chosen = (moe_isa)i;
      else note = "MOE_ISA names an instruction set that this machine does not have; ignored";
      return;
    }
  note = "MOE_ISA must be baseline, avx2, avx512 or amx; ignored";
}

moe_isa moe_cpu_isa(void) {
  pthread_once(&once, detect);
  return chosen;
}

bool moe_cpu_has(moe_isa isa) {
  pthread_once(&once, detect);
  return has[isa];
}

const char *moe_isa_name(moe_isa isa) { return names[isa]; }

const char *moe_isa_note(void) {
  pthread_once(&once, detect);
  return note;
}
