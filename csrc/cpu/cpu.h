/* What every CPU kernel file includes. Each file of this folder but blas.c and device.c is compiled once
** an instruction set, with MOE_ISA_NAME = baseline | avx2 | avx512; a kernel is written as
** `moe_status MOE_CPU(name)(...)` for a slot `name` of tensor/kernels.def, and table.c gathers them.
*/
#ifndef MOE_CPU_CPU_H
#define MOE_CPU_CPU_H

#include "base/err.h"
#include "base/pool.h"
#include "tensor/device.h"
#include "tensor/iter.h"
#include "tensor/tensor.h"

#ifndef MOE_ISA_NAME
#define MOE_ISA_NAME baseline
#endif

#define MOE_CPU_PASTE2(name, isa) moe_cpu_##name##_##isa
#define MOE_CPU_PASTE(name, isa) MOE_CPU_PASTE2(name, isa)
#define MOE_CPU(name) MOE_CPU_PASTE(name, MOE_ISA_NAME)

#define KERNEL(name, params) moe_status MOE_CPU(name) params;
#include "tensor/kernels.def"
#undef KERNEL

extern const moe_kernels MOE_CPU(kernels);

/* Elements below which a kernel runs in one task, and the size of a task above it. */
enum { MOE_GRAIN = 16384 };

#endif
