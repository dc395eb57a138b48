/* The kernels of select.c for one element type; it includes this once with REAL = float, once with double. */

/* Whether expert a comes before b: the higher score, of equals the lower number. NaN counts as the least. */
static inline bool R(before)(const REAL *key, int32_t a, int32_t b) {
  return key[a] > key[b] || (key[a] == key[b] && a < b);
}

static inline void R(sift)(int32_t *heap, const REAL *key, int64_t n, int64_t i) {
  int32_t v = heap[i];
  for (int64_t j; (j = 2 * i + 1) < n; i = j) {
    if (j + 1 < n && R(before)(key, heap[j + 1], heap[j])) j++;
    if (!R(before)(key, heap[j], v)) break;
    heap[i] = heap[j];
  }
  heap[i] = v;
}

/* gate <- the `least` best scores of x [n], and after them the next best while there are fewer than `most` and those
** taken hold less than `mass`; 0 elsewhere. A heap: n + taken log n steps, however many are taken. */
static void R(take_best)(REAL *restrict gate, REAL *restrict key, int32_t *restrict heap, const REAL *restrict x,
                         int64_t n, int64_t least, int64_t most, double mass) {
  for (int64_t e = 0; e < n; e++) {
    gate[e] = 0;
    key[e] = x[e] == x[e] ? x[e] : -(REAL)INFINITY;
    heap[e] = (int32_t)e;
  }
  for (int64_t i = n / 2; i-- > 0;) R(sift)(heap, key, n, i);
  double held = 0;
  for (int64_t taken = 0; taken < most && (taken < least || held < mass); taken++) {
    int32_t e = heap[0];
    gate[e] = x[e];
    held += (double)key[e];
    heap[0] = heap[n - taken - 1];
    R(sift)(heap, key, n - taken - 1, 0);
  }
}

static void R(gates_rows)(void *arg, int64_t begin, int64_t end, int worker) {
  (void)worker;
  gates_job *j = arg;
  int64_t E = j->experts;
  REAL *key = moe_scratch(SCRATCH, E * (int64_t)(sizeof(REAL) + sizeof(int32_t)));
  if (key == NULL) {
    atomic_store(&j->no_memory, true);
    return;
  }
  int32_t *heap = (int32_t *)(key + E);
  for (int64_t t = begin; t < end; t++) {
    const REAL *restrict x = (const REAL *)j->score + t * E;
    REAL *restrict gate = (REAL *)j->gate + t * E;
    int64_t least = j->min_k ? count_of(j->min_k[t], E) : MOE_MIN(1, E);
    int64_t most = MOE_MAX(least, j->max_k ? count_of(j->max_k[t], E) : E);
    int64_t above = E;
    REAL bound = j->threshold ? (REAL)j->threshold[t] : -(REAL)INFINITY;
    if (j->threshold) {
      above = 0;
#pragma omp simd reduction(+ : above)
      for (int64_t e = 0; e < E; e++) above += x[e] > bound;
    }
    double share = j->mass ? j->mass[t] : 1, mass = (double)INFINITY;
    if (share < 1) {
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t e = 0; e < E; e++) sum += (double)x[e];
      mass = share * sum;
    } else if (above >= least && above <= most && j->threshold) { /* no order is needed */
      for (int64_t e = 0; e < E; e++) gate[e] = x[e] > bound ? x[e] : 0;
      continue;
    } else if (least == E || (most == E && above == E)) {
      memcpy(gate, x, (size_t)E * sizeof *gate);
      continue;
    }
    R(take_best)(gate, key, heap, x, E, least, MOE_MAX(least, MOE_MIN(most, above)), mass);
  }
}
