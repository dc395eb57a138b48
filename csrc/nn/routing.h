/* A routing: which experts work on which tokens, with what weight. The narrow waist between routers and whatever
** consumes sparsity: expert networks, heads, skipped layers, memories, statistics, exchange between processes.
**
** It holds the lists of a plan (tensor/plan.h), the tensor in which the weights lie (as the router made it, so that
** gradients flow back without a copy), and what was dropped. Dense mixing is the same type: dispatch and combine
** matrices between tokens and slots, the slots being what the plan routes to the experts. */
#ifndef MOE_NN_ROUTING_H
#define MOE_NN_ROUTING_H

#include "op/plan.h"

typedef struct moe_routing {
  int refs;
  int64_t tokens, experts;
  moe_tensor *plan[MOE_PLAN_LISTS]; /* the last two over the tokens, or the slots of a soft routing */
  moe_tensor *weight;               /* any shape, at plan.source; NULL: all 1 */
  moe_tensor *mask;                 /* bool [tokens] or NULL */
  moe_tensor *dispatch, *combine;   /* soft: [tokens, experts, p] or [batch, time, experts, p] */
  /* Lost assignments: of masked tokens, named 0 by the router, beyond an expert's capacity. */
  int64_t masked, none, dropped;
  moe_tensor *dropped_token, *dropped_expert; /* i64 [dropped], from 0; NULL when dropped == 0 */
  moe_tensor *demand; /* i64 [experts]: the load before capacity; NULL: as the load is now */
} moe_routing;

/* Owned; NULL with an error. `base`: what index counts from; base - 1 is "none". mask may be NULL. */
/* index [T, k] of experts, weight [T, k] or NULL */
moe_routing *moe_routing_topk(moe_tensor *index, moe_tensor *weight, int64_t experts, moe_tensor *mask,
                              int base);
/* the gates of [T, E] that are not zero */
moe_routing *moe_routing_dense(moe_tensor *gates, moe_tensor *mask);
/* index [E, C] of tokens, weight [E, C] or NULL */
moe_routing *moe_routing_experts(moe_tensor *index, moe_tensor *weight, int64_t tokens, moe_tensor *mask,
                                 int base);
moe_routing *moe_routing_soft(moe_tensor *dispatch, moe_tensor *combine);
/* The same with at most `capacity` assignments an expert. priority: floats [rows] for MOE_DROP_PRIORITY, else NULL. */
moe_routing *moe_routing_limit(const moe_routing *r, int64_t capacity, moe_drop policy, moe_tensor *priority);

/* The assignments of some experts alone, over the same tokens (or slots) and weights: expert pick[i] of r, from 0, is
** expert i of the result. */
moe_routing *moe_routing_pick(const moe_routing *r, const int64_t *pick, int64_t n);

moe_routing *moe_routing_retain(moe_routing *r);
void moe_routing_free(moe_routing *r); /* one reference less */

static inline moe_plan moe_routing_plan(const moe_routing *r) { return moe_plan_of(r->plan, r->experts); }
/* i64 [experts], scoped */
moe_tensor *moe_routing_load(const moe_routing *r);
/* The sum of every expert's weights, f32 [experts], scoped */
moe_tensor *moe_routing_importance(const moe_routing *r);
/* Lists for a reader who counts from `base`, scoped: the expert of every row; where every expert's rows begin,
** [experts + 1]; one of the plan's lists of tokens, sources or slots. */
moe_tensor *moe_routing_expert(const moe_routing *r, int base);
moe_tensor *moe_routing_offsets(const moe_routing *r, int base);
moe_tensor *moe_routing_list(moe_tensor *list, int base);

#endif
