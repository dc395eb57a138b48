/* The device table of this instruction set: one line of tensor/kernels.def a slot. */
#include "cpu/cpu.h"

const moe_kernels MOE_CPU(kernels) = {
#define KERNEL(name, params) .name = MOE_CPU(name),
#include "tensor/kernels.def"
#undef KERNEL
};
