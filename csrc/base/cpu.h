/* What the processor can do, and which build of the kernels serves it. */
#ifndef MOE_BASE_CPU_H
#define MOE_BASE_CPU_H

#include <stdbool.h>

typedef enum moe_isa { MOE_ISA_BASELINE, MOE_ISA_AVX2, MOE_ISA_AVX512, MOE_ISA_AMX, MOE_ISA_COUNT } moe_isa;

/* The best instruction set of this machine, or the one that the environment variable
** MOE_ISA=baseline|avx2|avx512|amx forces. A name that the machine does not have is
** ignored (moe_isa_note says so). Decided once a process. */
moe_isa moe_cpu_isa(void);
bool moe_cpu_has(moe_isa isa);
const char *moe_isa_name(moe_isa isa);
const char *moe_isa_note(void); /* NULL, or why MOE_ISA was not obeyed */

#endif
