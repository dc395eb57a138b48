#include "base/pool.h"

#include "base/err.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

/* Workers spin this many rounds (some 50 us) for the next job before they sleep: jobs of a training step follow each
** other within microseconds, a wake-up costs about 5 of them. */
enum { SPIN_ROUNDS = 3000 };

/* The gate of the current job: (number << 16) | workers inside. An odd number is an open job. A worker enters by adding
** one while the job is open; the caller closes it by adding one to the number, and waits for those inside alone: a
** worker that the system has not scheduled costs nothing. */
enum { GATE_BITS = 16 };
#define GATE_INSIDE(g) ((g) & ((1u << GATE_BITS) - 1))
#define GATE_OPEN(g) ((g) >> GATE_BITS & 1)

static struct {
  pthread_mutex_t lock;    /* guards the settings, and the sleep of workers */
  pthread_cond_t wake;
  pthread_mutex_t busy;    /* held by the thread whose job runs */
  int threads;             /* wanted, the caller included; 0 = not yet decided */
  int started;             /* workers alive */
  int sleeping;
  _Atomic uint64_t gate;
  _Atomic int64_t next;    /* next task of the current job */
  /* the current job: written while the gate is closed and nobody is inside */
  int limit;               /* workers with a number below this take part */
  int64_t ntasks;
  moe_task_fn *fn;
  void *arg;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .busy = PTHREAD_MUTEX_INITIALIZER};

static MOE_HOT_TLS bool inside; /* this thread is running a task ... */
static MOE_HOT_TLS int self_worker; /* ... as this worker */

static inline void cpu_relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static void run_tasks(int worker) {
  inside = true;
  self_worker = worker;
  int64_t i;
  while ((i = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed)) < pool.ntasks)
    pool.fn(pool.arg, i, worker);
  inside = false;
  self_worker = 0;
}

/* Waits for an open job that is not `seen`; returns its gate. */
static uint64_t wait_for_job(uint64_t seen) {
  uint64_t g;
  for (int s = 0; s < SPIN_ROUNDS; s++) {
    g = atomic_load_explicit(&pool.gate, memory_order_acquire);
    if (GATE_OPEN(g) && g >> GATE_BITS != seen) return g;
    cpu_relax();
  }
  pthread_mutex_lock(&pool.lock);
  pool.sleeping++;
  while (g = atomic_load_explicit(&pool.gate, memory_order_acquire), !GATE_OPEN(g) || g >> GATE_BITS == seen)
    pthread_cond_wait(&pool.wake, &pool.lock);
  pool.sleeping--;
  pthread_mutex_unlock(&pool.lock);
  return g;
}

static void *worker_main(void *p) {
  int self = (int)(intptr_t)p;
  uint64_t seen = 0;
  for (;;) {
    uint64_t g = wait_for_job(seen);
    bool entered = false;
    while (!entered && GATE_OPEN(g) && g >> GATE_BITS != seen)
      entered = atomic_compare_exchange_weak_explicit(&pool.gate, &g, g + 1, memory_order_acq_rel, memory_order_acquire);
    if (!entered) continue;
    seen = g >> GATE_BITS;
    if (self < pool.limit) run_tasks(self);
    atomic_fetch_sub_explicit(&pool.gate, 1, memory_order_release);
  }
  return NULL;
}

/* In a child of fork() no worker lives: start again from nothing. */
static void after_fork_in_child(void) {
  pthread_mutex_init(&pool.lock, NULL);
  pthread_mutex_init(&pool.busy, NULL);
  pthread_cond_init(&pool.wake, NULL);
  pool.started = pool.sleeping = 0;
  atomic_store(&pool.gate, 0);
  inside = false;
}

static int default_threads(void) {
  const char *env = getenv("MOE_THREADS");
  long n = env ? strtol(env, NULL, 10) : 0;
  if (n < 1) n = sysconf(_SC_NPROCESSORS_ONLN);
  return n < 1 ? 1 : n > MOE_MAX_THREADS ? MOE_MAX_THREADS : (int)n;
}

static int wanted_threads(void) { /* with the lock held */
  if (pool.threads == 0) {
    pool.threads = default_threads();
    pthread_atfork(NULL, NULL, after_fork_in_child);
  }
  return pool.threads;
}

int moe_pool_threads(void) {
  pthread_mutex_lock(&pool.lock);
  int n = wanted_threads();
  pthread_mutex_unlock(&pool.lock);
  return n;
}

void moe_pool_set_threads(int n) {
  pthread_mutex_lock(&pool.lock);
  wanted_threads();
  pool.threads = n < 1 ? default_threads() : n > MOE_MAX_THREADS ? MOE_MAX_THREADS : n;
  pthread_mutex_unlock(&pool.lock);
}

/* Starts missing workers; a machine that gives no more threads simply has fewer. */
static void start_workers(int want) { /* with the lock held */
  pthread_attr_t attr;
  if (pthread_attr_init(&attr) != 0) return;
  pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
  while (pool.started < want - 1) {
    pthread_t t;
    if (pthread_create(&t, &attr, worker_main, (void *)(intptr_t)(pool.started + 1)) != 0) break;
    pool.started++;
  }
  pthread_attr_destroy(&attr);
}

static void run_inline(int64_t ntasks, moe_task_fn *fn, void *arg) {
  for (int64_t i = 0; i < ntasks; i++) fn(arg, i, self_worker);
}

void moe_parallel(int64_t ntasks, moe_task_fn *fn, void *arg) {
  if (ntasks <= 1 || inside || pthread_mutex_trylock(&pool.busy) != 0) {
    run_inline(ntasks, fn, arg);
    return;
  }
  pthread_mutex_lock(&pool.lock);
  int want = wanted_threads();
  if (pool.started < want - 1) start_workers(want);
  if (want <= 1 || pool.started == 0) {
    pthread_mutex_unlock(&pool.lock);
    run_inline(ntasks, fn, arg);
    pthread_mutex_unlock(&pool.busy);
    return;
  }
  pool.ntasks = ntasks;
  pool.fn = fn;
  pool.arg = arg;
  pool.limit = want;
  atomic_store_explicit(&pool.next, 0, memory_order_relaxed);
  atomic_fetch_add_explicit(&pool.gate, (uint64_t)1 << GATE_BITS, memory_order_release); /* open */
  if (pool.sleeping > 0) pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.lock);
  run_tasks(0);
  uint64_t g = atomic_fetch_add_explicit(&pool.gate, (uint64_t)1 << GATE_BITS, memory_order_acq_rel); /* close */
  for (int s = 0; GATE_INSIDE(g) > 0; s++) {
    if (s < SPIN_ROUNDS) cpu_relax();
    else sched_yield();
    g = atomic_load_explicit(&pool.gate, memory_order_acquire);
  }
  pthread_mutex_unlock(&pool.busy);
}

typedef struct range_job {
  int64_t n, grain;
  moe_range_fn *fn;
  void *arg;
} range_job;

static void range_task(void *arg, int64_t i, int worker) {
  const range_job *j = arg;
  int64_t begin = i * j->grain, end = begin + j->grain;
  j->fn(j->arg, begin, end < j->n ? end : j->n, worker);
}

void moe_parallel_range(int64_t n, int64_t grain, moe_range_fn *fn, void *arg) {
  if (n <= 0) return;
  if (grain < 1) grain = 1;
  range_job j = {n, grain, fn, arg};
  moe_parallel((n + grain - 1) / grain, range_task, &j);
}

typedef struct scratch_block {
  void *p;
  int64_t bytes;
} scratch_block;

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

static void scratch_free(void *p) {
  scratch_block *b = p;
  for (int i = 0; i < MOE_SCRATCH_SLOTS; i++) free(b[i].p);
  free(b);
}

static void scratch_init(void) { pthread_key_create(&scratch_key, scratch_free); }

void *moe_scratch(int slot, int64_t bytes) {
  pthread_once(&scratch_once, scratch_init);
  scratch_block *b = pthread_getspecific(scratch_key);
  if (b == NULL) {
    b = calloc(MOE_SCRATCH_SLOTS, sizeof *b);
    if (b == NULL) return NULL;
    if (pthread_setspecific(scratch_key, b) != 0) {
      free(b);
      return NULL;
    }
  }
  b += slot;
  if (b->bytes < bytes) {
    int64_t want = (bytes + bytes / 4 + 63) & ~(int64_t)63;
    free(b->p);
    b->bytes = 0;
    b->p = aligned_alloc(64, (size_t)want);
    if (b->p == NULL) return NULL;
    b->bytes = want;
  }
  return b->p;
}
