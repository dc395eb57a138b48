/* Optimizers: a row (options, state, hyper-parameters of a step) and a kernel each; see optim.c.
**
** State is f32 (f64 for f64 parameters) on the parameter's device, made when a parameter is first stepped. Parameters in
** bf16 and f16 keep an f32 master copy, from which they are rounded after each step.
**
** A row-sparse gradient (autograd/rows.h) updates its rows alone, as PyTorch's SparseAdam does: the other rows' weights and states
** stay as they are, without decay. The step number, and with it the bias correction, is the parameter's.
*/
#ifndef MOE_TRAIN_OPTIM_H
#define MOE_TRAIN_OPTIM_H

#include "tensor/tensor.h"

enum { MOE_OPTIM_STATES = 2, MOE_OPTIM_HYPER = 8, MOE_OPTIM_VALUES = 8, MOE_OPTIM_OPTIONS = 8 };

typedef struct moe_optim_option {
  const char *name;
  int size;        /* 1, or 2 for a pair: so many places of the values */
  bool boolean;
  double def[2];
  double min, max; /* min <= value < max */
} moe_optim_option;

/* What a kernel of an optimizer gets: `count` gradients of one type (f32 or f64) on one device, contiguous, of n[i] elements, and
** what they update: as many elements, or the rows that rows[i] lists, of width[i] each (tensor/kernels.def).
** state [count][MOE_OPTIM_STATES], hyper [count][MOE_OPTIM_HYPER]; hyper[0] scales the gradient. */
typedef moe_status moe_optim_kernel(void *const *p, void *const *state, const void *const *g, const int64_t *n,
                                    const int64_t *const *rows, const int64_t *width, int64_t count, const double *hyper,
                                    moe_dtype dt);

typedef struct moe_optim_class {
  const char *name;
  const char *state[MOE_OPTIM_STATES + 1]; /* NULL-ended names */
  moe_optim_option option[MOE_OPTIM_OPTIONS + 1]; /* ended by a NULL name; option 0 is lr; weight_decay by that name */
  moe_optim_kernel *(*kernel)(const moe_device *dev);
  /* value: the group's options, flattened, lr already scheduled; t counts steps from 1; fills hyper[1..] */
  void (*hyper)(const double *value, int64_t t, double *hyper);
  /* NULL, or why these options do not go together */
  const char *(*check)(const double *value);
  /* how many of the states these options use; NULL: all */
  int (*states)(const double *value);
  const char *doc;
} moe_optim_class;

extern const moe_optim_class moe_optims[];
extern const int moe_optim_count;
const moe_optim_class *moe_optim_find(const char *name);
/* Place of option `name` among the values and its row; -1 when there is none. */
int moe_optim_place(const moe_optim_class *c, const char *name, const moe_optim_option **row);
/* Checks one value of an option; the error names it. */
moe_status moe_optim_check(const moe_optim_class *c, const moe_optim_option *row, double v);

/* Which parameters are spared from weight decay. */
typedef enum moe_optim_spare { MOE_SPARE_TAGGED, MOE_SPARE_VECTORS, MOE_SPARE_NONE } moe_optim_spare;

typedef struct moe_optim_param {
  moe_tensor *t;   /* owned */
  char *name;      /* owned */
  int group;
  int64_t steps;
  moe_tensor *state[MOE_OPTIM_STATES]; /* owned; NULL before the first step */
  moe_tensor *master; /* bf16, f16: the f32 copy */
  uint32_t seen;   /* the parameter's version after our last write: another one means that the master is stale */
} moe_optim_param;

typedef struct moe_optim_group {
  double value[MOE_OPTIM_VALUES];
  moe_optim_spare spare;
} moe_optim_group;

typedef struct moe_optim {
  const moe_optim_class *cls;
  double lr_scale; /* multiplies every group's lr: the schedule's place; 1 */
  int ngroups;
  moe_optim_group *group;
  int64_t nparams;
  moe_optim_param *param;
} moe_optim;

moe_optim *moe_optim_new(const moe_optim_class *cls); /* owned; without groups */
void moe_optim_free(moe_optim *o);
void moe_optim_defaults(const moe_optim_class *c, double *value);
/* names[i] may be NULL: the parameter's number is its name. */
moe_status moe_optim_add(moe_optim *o, const moe_optim_group *g, int64_t n, moe_tensor *const *t, const char *const *names);
/* One step of every parameter that has a gradient, which is read times grad_scale. All or nothing. */
moe_status moe_optim_step(moe_optim *o, double grad_scale);
void moe_optim_zero_grad(moe_optim *o);
/* Global 2-norm of the gradients, in double, in an order that shapes alone fix. */
moe_status moe_grad_norm(moe_tensor *const *t, int64_t n, double *norm);
moe_status moe_optim_grad_norm(const moe_optim *o, double *norm);
/* Multiplies the gradients of t in place. */
moe_status moe_grad_scale(moe_tensor *const *t, int64_t n, double factor);
/* What scales gradients of that norm to at most `most`, as PyTorch's clip_grad_norm_ does. */
static inline double moe_clip_factor(double norm, double most) { return MOE_MIN(1.0, most / (norm + 1e-6)); }
/* Replaces state `k` of a parameter (converted, copied); its shape must fit. k == MOE_OPTIM_STATES: the master copy. */
moe_status moe_optim_load_state(moe_optim_param *p, int k, moe_tensor *from);

#endif
