/* The numbers of the scalar functions: MOE_UN_exp, MOE_PR_isnan, MOE_BI_add, MOE_CM_eq, ... */
#ifndef MOE_OP_POINTWISE_H
#define MOE_OP_POINTWISE_H

enum {
#define UNARY(name, keep, value, slope) MOE_UN_##name,
#include "op/pointwise.def"
  MOE_UN_COUNT
};

enum {
#define PREDICATE(name, value) MOE_PR_##name,
#include "op/pointwise.def"
  MOE_PR_COUNT
};

enum {
#define BINARY(name, value) MOE_BI_##name,
#define BINARY_CALL(name, value) MOE_BI_##name,
#include "op/pointwise.def"
  MOE_BI_COUNT
};

enum {
#define COMPARE(name, value) MOE_CM_##name,
#include "op/pointwise.def"
  MOE_CM_COUNT
};

#endif
