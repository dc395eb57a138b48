/* The training loop: see trainer.h. */
#include "train/trainer.h"

#include <math.h>
#include <time.h>

#include "autograd/graph.h"
#include "tensor/env.h"

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static moe_status not_finite(moe_trainer *t, const moe_trainer_calls *c, const char *what, double value) {
  if (c->not_finite != NULL) {
    moe_status st = c->not_finite(c->host, t->step + 1, what, value);
    if (st != MOE_OK) return st;
  }
  return moe_fail(MOE_EINVAL, "trainer: the %s is %g at step %lld", what, value, (long long)t->step + 1);
}

static moe_status check_loss(moe_tensor *loss) {
  char text[MOE_SHAPE_TEXT];
  if (moe_numel(loss) != 1)
    return moe_fail(MOE_EINVAL, "trainer: the loss must be one number, got a tensor %s (take its mean)", moe_shape_of(text, loss));
  if (!moe_dtype_is_float(loss->dtype))
    return moe_fail(MOE_EINVAL, "trainer: the loss has type %s, a floating type was wanted", moe_dtype_name(loss->dtype));
  return MOE_OK;
}

/* Calls for a loss under the trainer's settings. */
static moe_status call_loss(moe_trainer *t, const moe_trainer_calls *c, int64_t step, int micro, bool training,
                            moe_tensor **loss, double *tokens) {
  moe_env *env = moe_env_now();
  int autocast = env->autocast;
  bool grad_off = env->grad_off;
  *loss = NULL;
  *tokens = 0;
  if (t->autocast != MOE_bool) env->autocast = (int)t->autocast;
  env->grad_off = !training;
  moe_status st = c->loss(c->host, step, micro, training, loss, tokens);
  env->autocast = autocast;
  env->grad_off = grad_off;
  return st;
}

/* One micro-batch: its gradient, over the number of them, is added to the leaves'. */
static moe_status micro_step(moe_trainer *t, const moe_trainer_calls *c, int micro, double *sum, double *tokens, bool *end) {
  moe_tensor *loss;
  double count, value;
  MOE_TRY(call_loss(t, c, t->step + 1, micro, true, &loss, &count));
  *end = loss == NULL;
  if (*end) return MOE_OK;
  MOE_TRY(check_loss(loss));
  MOE_TRY(moe_get_f64(loss, 0, &value));
  if (!isfinite(value)) return not_finite(t, c, "loss", value);
  if (!moe_wants_grad(loss)) return moe_fail(MOE_EINVAL, "trainer: the loss does not depend on any parameter that is being trained");
  moe_tensor *seed = moe_full(loss->ndim, loss->shape, loss->dtype, moe_dev(loss), 1.0 / t->accumulate);
  if (seed == NULL) return moe_error_code();
  MOE_TRY(moe_backward(&loss, &seed, 1, 0));
  *sum += value;
  *tokens += count;
  return MOE_OK;
}

moe_status moe_trainer_step(moe_trainer *t, const moe_trainer_calls *c, bool *end) {
  double start = now(), sum = 0, tokens = 0, norm = 0, multiplier = 1;
  int64_t step = t->step + 1;
  int micro = 0;
  *end = false;
  if (c->begin != NULL) MOE_TRY(c->begin(c->host, step));
  if (c->rate != NULL) MOE_TRY(c->rate(c->host, step, &multiplier));
  if (!isfinite(multiplier) || multiplier < 0)
    return moe_fail(MOE_EINVAL, "trainer: the schedule gave %g at step %lld; a finite number of at least 0 was wanted",
                    multiplier, (long long)step);
  moe_optim_zero_grad(t->optim);
  while (micro < t->accumulate && !*end) {
    moe_scope s = moe_scope_open();
    moe_status st = micro_step(t, c, ++micro, &sum, &tokens, end);
    moe_scope_close(s);
    if (st != MOE_OK) return st;
  }
  if (*end) { /* what a part of a step has gathered is dropped */
    moe_optim_zero_grad(t->optim);
    return MOE_OK;
  }
  MOE_TRY(moe_optim_grad_norm(t->optim, &norm));
  if (!isfinite(norm)) return not_finite(t, c, "gradient's norm", norm);
  double own_scale = t->optim->lr_scale; /* the schedule leaves no trace in the optimizer */
  t->optim->lr_scale *= multiplier;
  moe_status st = moe_optim_step(t->optim, t->clip > 0 ? moe_clip_factor(norm, t->clip) : 1);
  t->optim->lr_scale = own_scale;
  MOE_TRY(st);
  t->step = step;
  double seconds = now() - start;
  t->last = (moe_metrics){.step = step,
                          .loss = sum / t->accumulate,
                          .lr = t->optim->ngroups > 0 ? t->optim->group[0].value[0] * own_scale * multiplier : 0,
                          .grad_norm = norm,
                          .tokens = tokens,
                          .seconds = seconds,
                          .tokens_per_second = seconds > 0 ? tokens / seconds : 0};
  return c->stepped != NULL ? c->stepped(c->host, step) : MOE_OK;
}

moe_status moe_trainer_advance(moe_trainer *t, const moe_trainer_calls *c, bool final, bool *end) {
  MOE_TRY(moe_trainer_step(t, c, end));
  final = final || *end;
  if (!*end && c->report != NULL) MOE_TRY(c->report(c->host, &t->last));
  if (t->eval_every > 0 && c->evaluate != NULL && (final || t->step % t->eval_every == 0))
    MOE_TRY(c->evaluate(c->host, t->step));
  if (t->save_every > 0 && c->save != NULL && (final || t->step % t->save_every == 0)) MOE_TRY(c->save(c->host, t->step));
  return MOE_OK;
}

moe_status moe_trainer_run(moe_trainer *t, const moe_trainer_calls *c, int64_t until) {
  bool end = false;
  while (t->step < until && !end) MOE_TRY(moe_trainer_advance(t, c, t->step + 1 == until, &end));
  return MOE_OK;
}

moe_status moe_trainer_evaluate(moe_trainer *t, const moe_trainer_calls *c, int64_t batches, double *mean, int64_t *count) {
  moe_env *env = moe_env_now();
  moe_rng rng = env->rng;
  double sum = 0, weight = 0;
  moe_status st = MOE_OK;
  bool end = false;
  *count = 0;
  while (st == MOE_OK && !end && (batches < 0 || *count < batches)) {
    moe_tensor *loss;
    double tokens, value = 0;
    moe_scope s = moe_scope_open();
    st = call_loss(t, c, t->step, (int)MOE_MIN(*count + 1, (int64_t)INT32_MAX), false, &loss, &tokens);
    end = st == MOE_OK && loss == NULL;
    if (st == MOE_OK && !end && (st = check_loss(loss)) == MOE_OK && (st = moe_get_f64(loss, 0, &value)) == MOE_OK) {
      double w = tokens > 0 ? tokens : 1;
      sum += value * w;
      weight += w;
      ++*count;
    }
    moe_scope_close(s);
  }
  env->rng = rng;
  *mean = weight > 0 ? sum / weight : 0;
  return st;
}
