/* A routing's plan as an argument of operations: six i64 tensors, in the order of moe_plan's members. They come from
** nn/routing.c alone, which vouches for what they hold. */
#ifndef MOE_OP_PLAN_H
#define MOE_OP_PLAN_H

#include "op/op.h"
#include "tensor/plan.h"

/* ORDER moe_plan */
enum {
  MOE_PLAN_EXPERT,
  MOE_PLAN_START,
  MOE_PLAN_TOKEN,
  MOE_PLAN_SOURCE,
  MOE_PLAN_ROW_START,
  MOE_PLAN_SLOT,
  MOE_PLAN_LISTS
};

/* The plan whose lists are t[0 .. MOE_PLAN_LISTS-1]. */
static inline moe_plan moe_plan_of(moe_tensor *const *t, int64_t experts) {
  return (moe_plan){.tokens = moe_numel(t[MOE_PLAN_ROW_START]) - 1,
                    .experts = experts,
                    .rows = moe_numel(t[MOE_PLAN_SLOT]),
                    .groups = moe_numel(t[MOE_PLAN_EXPERT]),
                    .expert = moe_data_i64(t[MOE_PLAN_EXPERT]),
                    .start = moe_data_i64(t[MOE_PLAN_START]),
                    .token = moe_data_i64(t[MOE_PLAN_TOKEN]),
                    .source = moe_data_i64(t[MOE_PLAN_SOURCE]),
                    .row_start = moe_data_i64(t[MOE_PLAN_ROW_START]),
                    .slot = moe_data_i64(t[MOE_PLAN_SLOT])};
}

#endif
