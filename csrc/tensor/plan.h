/* What the kernels of the sparse layers are given: a routing's lists, and a bank of expert networks.
**
** A plan lists `rows` assignments (token, expert), sorted by expert and, within one, by token. Only experts
** that have rows are listed (`groups` of them), so that no list grows with the number of experts. Positions
** and numbers count from 0. All arrays lie in the memory of the device whose kernel is called.
*/
#ifndef MOE_TENSOR_PLAN_H
#define MOE_TENSOR_PLAN_H

#include <stdbool.h>
#include <stdint.h>

#include "tensor/dtype.h"

typedef struct moe_plan {
  int64_t tokens, experts, rows, groups;
  bool dense;         /* one expert has every token: row r is token r, and only expert and start are there */
  int64_t *expert;    /* [groups] the expert of a group, ascending */
  int64_t *start;     /* [groups + 1] its rows are start[g] .. start[g + 1] - 1 */
  int64_t *token;     /* [rows] */
  int64_t *source;    /* [rows] where the row's weight lies in the weight tensor */
  int64_t *row_start; /* [tokens + 1] a token's rows are slot[row_start[t]] .. slot[row_start[t + 1] - 1] */
  int64_t *slot;      /* [rows] rows in the order of tokens and, for one, of sources */
} moe_plan;

/* Where a router's list of choices comes from: the slot route_entries. */
typedef enum moe_choice {
  MOE_CHOICE_TOKEN,  /* index [tokens, k] of experts */
  MOE_CHOICE_EXPERT, /* index [experts, capacity] of tokens */
  MOE_CHOICE_DENSE   /* gates [tokens, experts]: those that are not zero */
} moe_choice;

/* Whom an expert keeps when more tokens want it than it has room for: the slot route_limit. */
typedef enum moe_drop {
  MOE_DROP_PROBS,    /* keeps the largest weights, equals in order of token */
  MOE_DROP_POSITION, /* keeps the first tokens */
  MOE_DROP_PRIORITY  /* keeps the largest of numbers given for the rows */
} moe_drop;

/* What a router makes of its logits. ORDER MOE_SCORE: the choices of the option `score` in op/ops.def. */
typedef enum moe_score {
  MOE_SCORE_SOFTMAX,
  MOE_SCORE_SIGMOID,
  MOE_SCORE_SQRTSOFTPLUS,
  MOE_SCORE_RELU
} moe_score;

typedef struct moe_topk_options {
  int64_t tokens, experts, top_k;
  int score;        /* moe_score */
  bool score_after; /* choose by the logits, score the chosen alone */
  bool normalise;   /* weights of a token sum to 1 */
  int64_t n_group, topk_group,
      group_top; /* groups of experts; so many stay; judged by the sum of so many best */
  double scale;
  const int64_t *forced; /* [tokens, top_k] a choice made before, instead of choosing; or NULL */
} moe_topk_options;

/* Activations of expert networks. ORDER MOE_ACT: the choices of the option `act` in op/ops.def. */
#define MOE_ACTS(X) X(silu) X(gelu) X(gelu_tanh) X(relu) X(relu2) X(tanh) X(sigmoid) X(identity)
typedef enum moe_act {
#define X(name) MOE_ACT_##name,
  MOE_ACTS(X)
#undef X
      MOE_ACT_COUNT
} moe_act;

/* y_t = sum over the rows r of token t: weight_r * (w_out_e a_r + b_out_e), a_r = act(h_r) or, gated,
** act(gate_r) * up_r with h_r = [gate_r, up_r]; h_r = w_in_e x_t + b_in_e. F = gated ? 2 I : I.
** All tensors are contiguous and of one type, f32 or f64. */
typedef struct moe_ffn {
  moe_plan plan;
  moe_dtype dtype;
  int act; /* moe_act */
  bool gated;
  int64_t d_in, hidden, d_out;
  const void *x;            /* [tokens, d_in] */
  const void *w_in, *w_out; /* [experts, F, d_in], [experts, d_out, I] */
  const void *b_in, *b_out; /* [experts, F], [experts, d_out], or NULL */
  const void *weight;       /* at plan.source, or NULL: all 1 */
} moe_ffn;

#endif
