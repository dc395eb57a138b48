/* The training loop. It knows of no language and no files: what a step needs from outside comes through callbacks.
**
** One step: rate -> (loss -> finite? -> backward) x accumulate -> gradient norm, clipping -> optimizer -> stepped.
** Weights change in the optimizer's step alone, after everything that can fail: a step that fails leaves weights,
** optimizer and step number as they were.
*/
#ifndef MOE_TRAIN_TRAINER_H
#define MOE_TRAIN_TRAINER_H

#include "train/optim.h"

typedef struct moe_metrics {
  int64_t step;     /* of the step just made, from 1 */
  double loss;      /* mean over the micro-batches */
  double lr;        /* of the first group, scheduled */
  double grad_norm; /* before clipping */
  double tokens;    /* read in this step */
  double seconds;   /* that the step took */
  double tokens_per_second;
} moe_metrics;

/* Callbacks return a status (MOE_ECALLBACK when they failed) and may be NULL unless marked. */
typedef struct moe_trainer_calls {
  void *host;
  /* Before step `step` does anything: remember what a failed step must give back. */
  moe_status (*begin)(void *host, int64_t step);
  /* What multiplies the learning rates in step `step`. */
  moe_status (*rate)(void *host, int64_t step, double *multiplier);
  /* Required. The loss of the next batch (a scoped tensor of one element), and how many tokens it is made of; `micro`
  ** counts from 1. *loss = NULL: there are no more batches. training: false in an evaluation. */
  moe_status (*loss)(void *host, int64_t step, int micro, bool training, moe_tensor **loss, double *tokens);
  /* A loss or gradient norm that is not finite came up: explain it (moe_fail) and return the code. */
  moe_status (*not_finite)(void *host, int64_t step, const char *what, double value);
  /* The weights have changed. */
  moe_status (*stepped)(void *host, int64_t step);
  moe_status (*report)(void *host, const moe_metrics *m);
  moe_status (*evaluate)(void *host, int64_t step);
  moe_status (*save)(void *host, int64_t step);
} moe_trainer_calls;

typedef struct moe_trainer {
  moe_optim *optim;   /* borrowed */
  int64_t step;       /* steps made */
  int accumulate;     /* micro-batches a step, at least 1 */
  double clip;        /* largest gradient norm; 0: no clipping */
  moe_dtype autocast; /* MOE_bool: none */
  int64_t eval_every, save_every; /* 0: never */
  moe_metrics last;
} moe_trainer;

/* One step; *end when the batches ran out (then no step was made). */
moe_status moe_trainer_step(moe_trainer *t, const moe_trainer_calls *c, bool *end);
/* One step, its report, and the evaluation and checkpoint that are due after it; `final`: those that are not, too. */
moe_status moe_trainer_advance(moe_trainer *t, const moe_trainer_calls *c, bool final, bool *end);
/* Steps until t->step == until or the batches run out. */
moe_status moe_trainer_run(moe_trainer *t, const moe_trainer_calls *c, int64_t until);
/* Mean loss over at most `batches` batches (< 0: all), weighted by tokens; nothing is recorded, and the generator is left
** as it was. *count: batches seen. */
moe_status moe_trainer_evaluate(moe_trainer *t, const moe_trainer_calls *c, int64_t batches, double *mean, int64_t *count);

#endif
