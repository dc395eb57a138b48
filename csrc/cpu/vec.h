/* The vector registers of the instruction set that a kernel file is being compiled for: their bytes and their number.
** A kernel's vector of REAL is `typedef REAL R(vec) MOE_VEC_OF(REAL)`, which may lie anywhere. */
#ifndef MOE_CPU_VEC_H
#define MOE_CPU_VEC_H

#if defined __AVX512F__
#define MOE_VEC_BYTES 64
#elif defined __AVX__
#define MOE_VEC_BYTES 32
#else
#define MOE_VEC_BYTES 16
#endif
#if defined __AVX512F__ || defined __aarch64__
#define MOE_VEC_REGISTERS 32
#else
#define MOE_VEC_REGISTERS 16
#endif

#define MOE_VEC_OF(real) __attribute__((vector_size(MOE_VEC_BYTES), aligned(sizeof(real)), may_alias))

#endif
