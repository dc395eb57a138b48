/* Even shares for experts: the exact balanced assignment, and the prices of Sinkhorn's iteration. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "cpu/vmath.h"

/* --- the exact assignment ---
**
** Each token takes k experts, each expert as many tokens as any other (to within one), and the sum of scores is the
** largest there is: a transportation problem, solved by successive shortest paths over the experts alone. An arc
** e -> f stands for the token that gives up the least by moving from e to f; a token that comes in moves others along
** the cheapest path to an expert with room. Prices keep all reduced costs of arcs non-negative (Dijkstra); since in
** the end every expert is full (a last row of zeros takes what room there is more), any prices may start, and those
** of a quarter of the tokens start near the end. Edmonds and Karp 1972; Jonker and Volgenant 1987.
** Serial, and of sums and comparisons alone: the same on every machine. */
typedef struct solver {
  int64_t n, E, k, spare, room;  /* tokens; experts; choices of a token, of the last row n; tokens an expert takes */
  const double *score;           /* [.., E] */
  const double *zeros;           /* [E]: the scores of row n */
  int64_t *id;                   /* [n] a token's row of score */
  double *open, *column;         /* [n + 1, E], [E, n + 1] scores, -inf where chosen */
  int64_t *chosen, *count;       /* [n + 1, k], the last row longer; [n + 1] */
  int64_t *member, *load;        /* [E, room] the tokens of an expert; [E] */
  double *mine;                  /* [E, room] their scores for it */
  double *gap;                   /* [E, E] what the cheapest move costs without prices; inf: there is none */
  int64_t *mover;                /* [E, E] whose it is */
  double *price;                 /* [E] */
  double *tried, *key, *far;     /* [E] distances so far: of experts done -inf, +inf; of those done */
  int64_t *from, *done, *who;    /* [E] */
} solver;

static inline const double *score_of(const solver *s, int64_t u) {
  return u < s->n ? s->score + s->id[u] * s->E : s->zeros;
}

static inline void set_open(solver *s, int64_t u, int64_t e, double v) {
  s->open[u * s->E + e] = v;
  s->column[e * (s->n + 1) + u] = v;
}

/* gap and mover from e to f, anew */
static void look(solver *s, int64_t e, int64_t f) {
  const double *restrict mine = s->mine + e * s->room, *restrict open = s->column + f * (s->n + 1);
  const int64_t *restrict member = s->member + e * s->room;
  int64_t n = s->load[e], j = 0;
  double least = (double)INFINITY;
#pragma omp simd reduction(min : least)
  for (int64_t i = 0; i < n; i++) {
    double d = mine[i] - open[member[i]];
    least = d < least ? d : least;
  }
  s->gap[e * s->E + f] = least;
  s->mover[e * s->E + f] = -1;
  if (!(least < (double)INFINITY)) return;
  while (mine[j] - open[member[j]] != least) j++;
  s->mover[e * s->E + f] = member[j];
}

static inline void offer(solver *s, int64_t u, int64_t e, int64_t f, double d) {
  if (d < s->gap[e * s->E + f]) {
    s->gap[e * s->E + f] = d;
    s->mover[e * s->E + f] = u;
  }
}

/* Token u takes expert e; gaps are left as they are. */
static void take(solver *s, int64_t u, int64_t e) {
  int64_t at = e * s->room + s->load[e]++;
  set_open(s, u, e, -(double)INFINITY);
  s->chosen[u * s->k + s->count[u]++] = e;
  s->member[at] = u;
  s->mine[at] = score_of(s, u)[e];
}

static void join(solver *s, int64_t u, int64_t e) {
  const int64_t *chosen = s->chosen + u * s->k;
  const double *open = s->open + u * s->E;
  take(s, u, e);
  for (int64_t i = 0; i < s->count[u] - 1; i++) /* u can no longer move from its other experts to e */
    if (s->mover[chosen[i] * s->E + e] == u) look(s, chosen[i], e);
  double score = score_of(s, u)[e];
  for (int64_t f = 0; f < s->E; f++) offer(s, u, e, f, score - open[f]);
}

static void leave(solver *s, int64_t u, int64_t e) {
  const double *score = score_of(s, u);
  int64_t *chosen = s->chosen + u * s->k, at = e * s->room, i = at, last = at + --s->load[e];
  set_open(s, u, e, score[e]);
  while (s->member[i] != u) i++;
  s->member[i] = s->member[last];
  s->mine[i] = s->mine[last];
  for (i = 0; chosen[i] != e;) i++;
  chosen[i] = chosen[--s->count[u]];
  for (i = 0; i < s->count[u]; i++) /* it can move to e from its other experts again */
    offer(s, u, chosen[i], e, score[chosen[i]] - score[e]);
  for (int64_t f = 0; f < s->E; f++)
    if (s->mover[e * s->E + f] == u) look(s, e, f);
}

/* One more expert for token u, along the cheapest path; false when there is none that a number can hold. */
static bool augment(solver *s, int64_t u) {
  const double *open = s->open + u * s->E;
  double best = -(double)INFINITY;
  int64_t E = s->E, end = -1, ndone = 0;
  for (int64_t e = 0; e < E; e++) best = open[e] - s->price[e] > best ? open[e] - s->price[e] : best;
  for (int64_t e = 0; e < E; e++) {
    s->tried[e] = s->key[e] = best - (open[e] - s->price[e]);
    s->from[e] = -1;
  }
  for (;;) {
    int64_t e = 0;
    for (int64_t f = 1; f < E; f++) e = s->key[f] < s->key[e] ? f : e;
    double here = s->key[e], price = s->price[e];
    if (!(here < (double)INFINITY)) return false;
    s->far[e] = here;
    if (s->load[e] < s->room) {
      end = e;
      break;
    }
    s->done[ndone++] = e;
    s->key[e] = (double)INFINITY;
    s->tried[e] = -(double)INFINITY; /* nothing is nearer */
    const double *restrict gap = s->gap + e * E, *restrict prices = s->price;
    double *restrict tried = s->tried, *restrict key = s->key;
    int64_t *restrict from = s->from;
    for (int64_t f = 0; f < E; f++) {
      double step = gap[f] - price + prices[f], d = here + (step > 0 ? step : 0);
      bool nearer = d < tried[f];
      tried[f] = nearer ? d : tried[f];
      key[f] = nearer ? d : key[f];
      from[f] = nearer ? e : from[f];
    }
  }
  for (int64_t i = 0; i < ndone; i++) s->price[s->done[i]] += s->far[end] - s->far[s->done[i]];
  /* movers are read before anyone moves; then from the end, where there is room */
  for (int64_t f = end; s->from[f] >= 0; f = s->from[f]) s->who[f] = s->mover[s->from[f] * E + f];
  int64_t f = end;
  for (; s->from[f] >= 0; f = s->from[f]) {
    leave(s, s->who[f], s->from[f]);
    join(s, s->who[f], f);
  }
  join(s, u, f);
  return true;
}

/* The k best experts of token u at these prices, equals in order of expert, into s->done. */
static void best_of(solver *s, int64_t u) {
  const double *score = score_of(s, u);
  int64_t have = 0, k = s->k, *best = s->done;
  double *value = s->key;
  for (int64_t e = 0; e < s->E; e++) {
    double v = score[e] - s->price[e];
    if (have == k && !(v > value[k - 1])) continue;
    int64_t i = have < k ? have++ : k - 1;
    for (; i > 0 && v > value[i - 1]; i--) {
      value[i] = value[i - 1];
      best[i] = best[i - 1];
    }
    value[i] = v;
    best[i] = e;
  }
}

/* Assigns the tokens s->id[0 .. n - 1], starting from s->price. */
static bool solve(solver *s) {
  int64_t n = s->n, E = s->E, k = s->k;
  s->room = (n * k + E - 1) / E;
  s->spare = E * s->room - n * k;
  memset(s->load, 0, (size_t)E * sizeof *s->load);
  memset(s->count, 0, (size_t)(n + 1) * sizeof *s->count);
  for (int64_t u = 0; u <= n; u++) memcpy(s->open + u * E, score_of(s, u), (size_t)E * sizeof *s->open);
  for (int64_t e = 0; e < E; e++)
    for (int64_t u = 0; u <= n; u++) s->column[e * (n + 1) + u] = s->open[u * E + e];
  for (int64_t u = 0; u < n; u++) { /* wishes up to the first without room: a later one would break the order of prices */
    best_of(s, u);
    for (int64_t i = 0; i < k && s->load[s->done[i]] < s->room; i++) take(s, u, s->done[i]);
  }
  for (int64_t e = 0; e < E; e++)
    for (int64_t f = 0; f < E; f++) look(s, e, f);
  for (int64_t u = 0; u <= n; u++)
    while (s->count[u] < (u < n ? k : s->spare))
      if (!augment(s, u)) return false;
  return true;
}

enum { QUARTER = 4, SAMPLE = 8 }; /* tokens an expert that a smaller problem should have */

static bool solve_all(solver *s, int64_t n, int64_t *all) {
  int64_t stride = 1;
  while (n / (stride * QUARTER) * s->k >= SAMPLE * s->E) stride *= QUARTER;
  for (int64_t e = 0; e < s->E; e++) s->price[e] = 0;
  for (; stride >= 1; stride /= QUARTER) {
    s->n = (n + stride - 1) / stride;
    for (int64_t i = 0; i < s->n; i++) s->id[i] = all[i * stride];
    if (!solve(s)) return false;
  }
  return true;
}

moe_status MOE_CPU(assign)(int64_t *index, const double *score, const uint8_t *mask, int64_t tokens, int64_t experts,
                           int64_t top_k, int64_t base) {
  int64_t n = 0, E = experts, k = top_k;
  for (int64_t t = 0; t < tokens; t++) {
    for (int64_t i = 0; i < k; i++) index[t * k + i] = base - 1;
    if (mask && !mask[t]) continue;
    n++;
    for (int64_t e = 0; e < E; e++)
      if (score[t * E + e] - score[t * E + e] != 0)
        return moe_fail(MOE_EINVAL, "balanced_assignment: the score of token %lld for expert %lld is %s", (long long)t + 1,
                        (long long)e + 1, score[t * E + e] == score[t * E + e] ? "infinite" : "NaN");
  }
  if (n == 0) return MOE_OK;
  int64_t room = (n * k + E - 1) / E + 1;
  int64_t reals = E + 2 * (n + 1) * E + E * room + E * E + 4 * E, wholes = 2 * n + n * k + E + n + 1 + E * room + E + E * E + 3 * E;
  double *r = calloc((size_t)reals, sizeof *r);
  int64_t *w = malloc((size_t)wholes * sizeof *w), *all = w;
  if (r == NULL || w == NULL) {
    free(r);
    free(w);
    return moe_fail(MOE_ENOMEM, "out of memory for a balanced assignment");
  }
  solver s = {.E = E, .k = k, .score = score, .zeros = r, .open = r + E};
  s.column = s.open + (n + 1) * E;
  s.mine = s.column + (n + 1) * E;
  s.gap = s.mine + E * room;
  s.price = s.gap + E * E;
  s.tried = s.price + E;
  s.key = s.tried + E;
  s.far = s.key + E;
  s.id = all + n;
  s.chosen = s.id + n;
  s.count = s.chosen + n * k + E;
  s.member = s.count + n + 1;
  s.load = s.member + E * room;
  s.mover = s.load + E;
  s.from = s.mover + E * E;
  s.done = s.from + E;
  s.who = s.done + E;
  for (int64_t t = 0, i = 0; t < tokens; t++)
    if (!mask || mask[t]) all[i++] = t;
  bool found = solve_all(&s, n, all);
  for (int64_t i = 0; found && i < n; i++) { /* best first, equals in order of expert */
    int64_t *to = index + all[i] * k, *chosen = s.chosen + i * k;
    const double *x = score + all[i] * E;
    for (int64_t a = 0; a < k; a++) {
      int64_t e = chosen[a], at = a;
      for (; at > 0 && (x[to[at - 1] - base] < x[e] || (x[to[at - 1] - base] == x[e] && to[at - 1] - base > e)); at--)
        to[at] = to[at - 1];
      to[at] = e + base;
    }
  }
  free(r);
  free(w);
  return found ? MOE_OK
               : moe_fail(MOE_EINVAL, "balanced_assignment: the scores lie further apart than a number can hold");
}

/* --- Sinkhorn --- */

enum { BLOCK = 128, SCRATCH = 3 }; /* rows a task; the scratch slot, for the length of the kernel */

typedef struct sinkhorn_job {
  const void *logits;
  const uint8_t *mask;
  int64_t tokens, experts;
  const void *price;   /* [experts] in the type of logits */
  double *share;       /* [blocks, experts] */
  atomic_int failed;
} sinkhorn_job;

#define REAL float
#define R(x) x##_f32
#define VM1(name) VM(name, f32)
#include "cpu/assign_real.h"
#undef REAL
#undef R
#undef VM1

#define REAL double
#define R(x) x##_f64
#define VM1(name) VM(name, f64)
#include "cpu/assign_real.h"
#undef REAL
#undef R
#undef VM1

moe_status MOE_CPU(sinkhorn)(void *price, const void *logits, const uint8_t *mask, int64_t tokens, int64_t experts,
                             int64_t iterations, double tolerance, moe_dtype dt) {
  return dt == MOE_f64 ? sinkhorn_f64(price, logits, mask, tokens, experts, iterations, tolerance)
                       : sinkhorn_f32(price, logits, mask, tokens, experts, iterations, tolerance);
}
