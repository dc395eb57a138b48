/* What the kernels of the selective scan are given (Gu and Dao 2023, "Mamba", arXiv 2312.00752, section 3).
**
**   dt = delta + bias, with softplus: log(1 + exp(dt));  h_t = exp(dt A) h_{t-1} + dt B_t u_t;  y_t = <C_t, h_t> + D u_t
**   out_t = y_t silu(z_t) where there is z
**
** for every channel, h a vector of `states` numbers. Sequences lie one after the other: sequence s has the rows
** start[s] .. start[s + 1] - 1. All arrays are contiguous, of one type, f32 or f64, in the memory of the device. */
#ifndef MOE_TENSOR_SELECTIVE_H
#define MOE_TENSOR_SELECTIVE_H

#include <stdbool.h>
#include <stdint.h>

#include "tensor/dtype.h"

/* Positions between two states that the forward keeps for the backward. */
enum { MOE_SCAN_CHUNK = 32 };

typedef struct moe_selective {
  moe_dtype dtype;
  int64_t rows, sequences, channels, states, groups;
  bool softplus;
  const int64_t *start; /* [sequences + 1] */
  const int64_t *chunk; /* [sequences + 1] the chunks before each sequence */
  const void *u, *delta, *z; /* [rows, channels]; z may be NULL */
  const void *a;             /* [channels, states] */
  const void *b, *c;         /* [rows, groups, states]; a group has channels / groups channels in a row */
  const void *d, *bias;      /* [channels] or NULL */
  const void *state;         /* [sequences, channels, states] the states before, or NULL: zeros */
} moe_selective;

/* Gradients; each may be NULL but u, delta and those of weights that are there. */
typedef struct moe_selective_grads {
  void *u, *delta, *z;       /* [rows, channels] */
  void *a, *d, *bias;        /* [channels, states], [channels] */
  void *b, *c;               /* [rows, groups, states] */
  void *state;               /* [sequences, channels, states] */
  const void *gy;            /* [rows, channels] the gradient of out */
  const void *glast;         /* [sequences, channels, states] the gradient of the states after, or NULL */
} moe_selective_grads;

#endif
