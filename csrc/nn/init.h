/* Initialisers. They draw from the current settings' generator on the host, element by element, so that one
** seed gives the same weights on every device, for every number of threads and (rounded) in every type.
** "fan" of a weight [out, in, ...]: in or out times the product of the trailing sizes.
*/
#ifndef MOE_NN_INIT_H
#define MOE_NN_INIT_H

#include "tensor/tensor.h"

moe_status moe_init_uniform(moe_tensor *t, double lo, double hi);
moe_status moe_init_normal(moe_tensor *t, double mean, double std);
/* What PyTorch gives a linear layer's weight and bias: U(-1/sqrt(fan_in), 1/sqrt(fan_in)). */
moe_status moe_init_linear(moe_tensor *t, int64_t fan_in);
/* "xavier_uniform", "normal(0.02)", "trunc_normal(0.02, 0, -0.04, 0.04)": a row of the table in init.c by its
** name, with numbers for its options. */
moe_status moe_init_named(moe_tensor *t, const char *text);

/* The table, for the binding: name, argument names with defaults (signature language), doc. */
typedef struct moe_initialiser {
  const char *name, *args, *doc;
  moe_status (*run)(moe_tensor *t, const double *arg);
} moe_initialiser;
enum { MOE_INIT_ARGS = 4 };
extern const moe_initialiser moe_initialisers[];
extern const int moe_initialiser_count;

#endif
