/* The router's kernels for one element type; route.c includes this once with REAL = float, once with double. */

/* Sum below which a normaliser counts as nothing: keeps 0/0 out of rows of zeros. */
#define TINY ((REAL)1e-20)

/* Scores of one row of logits. */
static void R(score_row)(REAL *restrict s, const REAL *restrict x, int64_t n, int score) {
  if (score == MOE_SCORE_SOFTMAX) {
    REAL top = x[0], sum = 0;
    for (int64_t e = 1; e < n; e++) top = x[e] > top ? x[e] : top;
  #pragma omp simd reduction(+ : sum)
    for (int64_t e = 0; e < n; e++) {
      s[e] = VM1(exp)(x[e] - top);
      sum += s[e];
    }
    REAL scale = 1 / sum;
    for (int64_t e = 0; e < n; e++) s[e] *= scale;
  } else if (score == MOE_SCORE_SIGMOID) {
    for (int64_t e = 0; e < n; e++) s[e] = VM1(sigmoid)(x[e]);
  } else if (score == MOE_SCORE_SQRTSOFTPLUS) {
    for (int64_t e = 0; e < n; e++) s[e] = VM1(sqrt)(VM1(softplus)(x[e]));
  } else {
    for (int64_t e = 0; e < n; e++) s[e] = x[e] > 0 ? x[e] : (x[e] <= 0 ? 0 : x[e]);
  }
}

/* The k largest of key [n] into best [k], in order; equals, and then NaN, in order of position. One pass: most keys
** lose against the k-th best at once. */
static void R(choose)(int64_t *restrict best, REAL *restrict value, const REAL *restrict key, int64_t n,
                      int64_t k) {
  int64_t have = 0;
  for (int64_t e = 0; e < n; e++) {
    REAL v = key[e] == key[e] ? key[e] : -(REAL)INFINITY;
    if (have == k && !(v > value[k - 1])) continue;
    int64_t i = have < k ? have++ : k - 1;
    while (i > 0 && v > value[i - 1]) {
      value[i] = value[i - 1];
      best[i] = best[i - 1];
      i--;
    }
    value[i] = v;
    best[i] = e;
  }
}

/* key <- -inf outside of the topk_group best groups; a group is judged by the sum of its group_top best keys. */
static void R(mask_groups)(REAL *key, const moe_topk_options *o, int64_t *order, REAL *value, REAL *judge) {
  int64_t size = o->experts / o->n_group;
  for (int64_t g = 0; g < o->n_group; g++) {
    R(choose)(order, value, key + g * size, size, o->group_top);
    judge[g] = 0;
    for (int64_t i = 0; i < o->group_top; i++) judge[g] += value[i];
  }
  R(choose)(order, value, judge, o->n_group, o->topk_group);
  for (int64_t g = 0; g < o->n_group; g++) {
    bool stays = false;
    for (int64_t i = 0; i < o->topk_group; i++) stays |= order[i] == g;
    if (!stays)
      for (int64_t e = 0; e < size; e++) key[g * size + e] = -(REAL)INFINITY;
  }
}

/* What is wrong with a row of logits for a router that chooses k: NaN or +inf, or fewer than k above -inf. */
static int R(row_fault)(const REAL *x, int64_t n, int64_t k) {
  int64_t wild = 0, open = 0;
#pragma omp simd reduction(+ : wild, open)
  for (int64_t e = 0; e < n; e++) {
    wild += !(x[e] < (REAL)INFINITY);
    open += x[e] > -(REAL)INFINITY;
  }
  return wild ? FAILED_WILD : open < k ? FAILED_MASKED : 0;
}

/* The first token at fault, for the message: the rows ran in any order. */
static moe_status R(explain)(const router_job *j) {
  const moe_topk_options *o = j->o;
  for (int64_t t = 0; t < o->tokens; t++) {
    const REAL *x = (const REAL *)j->logits + t * o->experts;
    if (j->mask && !j->mask[t]) continue;
    int fault = R(row_fault)(x, o->experts, o->forced ? 1 : o->top_k);
    int64_t e = 0, open = 0;
    while (fault == FAILED_WILD && x[e] < (REAL)INFINITY) e++;
    if (fault == FAILED_WILD)
      return moe_fail(MOE_EINVAL, "router_topk: the logit of token %lld for expert %lld is %s", (long long)t + 1,
                      (long long)e + 1, x[e] == x[e] ? "infinite" : "NaN");
    for (; e < o->experts; e++) open += x[e] > -(REAL)INFINITY;
    if (fault == FAILED_MASKED)
      return moe_fail(MOE_EINVAL,
                      "router_topk: token %lld may choose among %lld of %lld experts (the others are masked), wanted %lld",
                      (long long)t + 1, (long long)open, (long long)o->experts, (long long)o->top_k);
  }
  return moe_fail(MOE_EINVAL, "router_topk: the groups chosen for a token leave fewer than top_k = %lld experts",
                  (long long)o->top_k);
}

static void R(topk_rows)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  router_job *j = arg;
  const moe_topk_options *o = j->o;
  int64_t E = o->experts, k = o->top_k, most = MOE_MAX(MOE_MAX(k, o->n_group), o->group_top);
  char *room =
      moe_scratch(SCRATCH, (E + 2 * most) * (int64_t)sizeof(REAL) + most * (int64_t)sizeof(int64_t) + 64);
  if (room == NULL) {
    atomic_store(&j->failed, FAILED_MEMORY);
    return;
  }
  int64_t *order = (int64_t *)room;
  REAL *key = (REAL *)(order + most), *value = key + E, *judge = value + most;
  for (int64_t t = begin; t < end; t++) {
    REAL *score = (REAL *)j->score + t * E, *weight = (REAL *)j->weight + t * k;
    int64_t *index = j->index + t * k;
    const REAL *x = (const REAL *)j->logits + t * E;
    if (j->mask && !j->mask[t]) {
      for (int64_t e = 0; e < E; e++) score[e] = 0;
      for (int64_t i = 0; i < k; i++) {
        weight[i] = 0;
        index[i] = j->base - 1;
      }
      continue;
    }
    int fault = R(row_fault)(x, E, o->forced ? 1 : k);
    if (fault) {
      atomic_store(&j->failed, fault);
      return;
    }
    R(score_row)(score, x, E, o->score);
    const REAL *from = o->score_after ? x : score;
    if (o->forced == NULL) {
      if (j->bias)
        for (int64_t e = 0; e < E; e++) key[e] = from[e] + ((const REAL *)j->bias)[e];
      else
        memcpy(key, from, (size_t)E * sizeof *key);
      if (o->n_group > 1) R(mask_groups)(key, o, order, value, judge);
      R(choose)(order, value, key, E, k);
    }
    for (int64_t i = 0; i < k; i++) {
      if (o->forced) order[i] = o->forced[t * k + i] - j->base;
      if (order[i] < 0 || order[i] >= E) {
        atomic_store(&j->failed, FAILED_RANGE);
        return;
      }
      if (!o->forced && !(x[order[i]] > -(REAL)INFINITY)) {
        atomic_store(&j->failed, FAILED_MASKED);
        return;
      }
      index[i] = order[i] + j->base;
      weight[i] = from[order[i]];
    }
    if (o->score_after) {
      memcpy(value, weight, (size_t)k * sizeof *value);
      R(score_row)(weight, value, k, o->score);
    }
    if (o->normalise) {
      REAL sum = 0;
      for (int64_t i = 0; i < k; i++) sum += weight[i];
      sum = 1 / (sum + TINY);
      for (int64_t i = 0; i < k; i++) weight[i] *= sum;
    }
    if (o->scale != 1)
      for (int64_t i = 0; i < k; i++) weight[i] *= (REAL)o->scale;
  }
}

/* g <- gradient of the logits behind scores s, from the scores' gradient g, in place */
static void R(score_row_bwd)(REAL *restrict g, const REAL *restrict s, int64_t n, int score) {
  if (score == MOE_SCORE_SOFTMAX) {
    REAL dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t e = 0; e < n; e++) dot += g[e] * s[e];
    for (int64_t e = 0; e < n; e++) g[e] = s[e] * (g[e] - dot);
  } else if (score == MOE_SCORE_SIGMOID) {
    for (int64_t e = 0; e < n; e++) g[e] *= s[e] * (1 - s[e]);
  } else if (score == MOE_SCORE_SQRTSOFTPLUS) {
    /* s^2 = softplus(x), so sigmoid(x) = 1 - exp(-s^2); its ratio to s tends to s as s does to 0 */
    for (int64_t e = 0; e < n; e++)
      g[e] *= s[e] > (REAL)1e-18 ? -VM1(expm1)(-s[e] * s[e]) / (2 * s[e]) : s[e] / 2;
  } else {
    for (int64_t e = 0; e < n; e++) g[e] = s[e] > 0 ? g[e] : 0;
  }
}

static void R(topk_rows_bwd)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  router_job *j = arg;
  const moe_topk_options *o = j->o;
  int64_t E = o->experts, k = o->top_k;
  REAL *u = moe_scratch(SCRATCH, 2 * k * (int64_t)sizeof(REAL)), *gu = u + k;
  if (u == NULL) {
    atomic_store(&j->failed, FAILED_MEMORY);
    return;
  }
  for (int64_t t = begin; t < end; t++) {
    REAL *g = (REAL *)j->glogits + t * E;
    const REAL *score = (const REAL *)j->saved_score + t * E;
    if (j->mask && !j->mask[t]) {
      for (int64_t e = 0; e < E; e++) g[e] = 0;
      continue;
    }
    if (j->gscore)
      memcpy(g, (const REAL *)j->gscore + t * E, (size_t)E * sizeof *g);
    else
      for (int64_t e = 0; e < E; e++) g[e] = 0;
    const int64_t *index = j->saved_index + t * k;
    bool after = false;
    if (j->gweight) {
      const REAL *gw = (const REAL *)j->gweight + t * k, *w = (const REAL *)j->saved_weight + t * k;
      after = o->score_after && o->score == MOE_SCORE_SOFTMAX;
      /* u: the chosen scores before they were normalised; a softmax over the chosen is normal already */
      for (int64_t i = 0; i < k; i++)
        u[i] = after ? (o->scale != 0 ? w[i] / (REAL)o->scale : 0) : score[index[i] - j->base];
      for (int64_t i = 0; i < k; i++) gu[i] = (REAL)o->scale * gw[i];
      if (o->normalise && !after) {
        REAL sum = TINY, dot = 0;
        for (int64_t i = 0; i < k; i++) sum += u[i];
        for (int64_t i = 0; i < k; i++) dot += gu[i] * u[i];
        for (int64_t i = 0; i < k; i++) gu[i] = (gu[i] - dot / sum) / sum;
      }
      if (after)
        R(score_row_bwd)(gu, u, k, MOE_SCORE_SOFTMAX);
      else
        for (int64_t i = 0; i < k; i++) g[index[i] - j->base] += gu[i];
    }
    R(score_row_bwd)(g, score, E, o->score);
    if (after)
      for (int64_t i = 0; i < k; i++) g[index[i] - j->base] += gu[i];
  }
}
#undef TINY
