/* The caching allocator: blocks of a few size classes are kept for reuse, so that a steady loop asks the
** system for nothing. Every byte handed out is counted per device.
**
** Classes: powers of two with four steps each (waste <= 25 %), from 64 bytes. A cached block is linked through
** its own first bytes on host memory; device memory keeps a side list.
*/
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "tensor/device.h"

enum { STEPS = 4, FIRST_LOG2 = 6, CLASSES = (40 - FIRST_LOG2) * STEPS };

typedef struct free_block {
  struct free_block *next;
  void *p; /* where the memory is not the host's */
} free_block;

typedef struct moe_cache {
  atomic_flag lock; /* held for a few instructions, or while the system is asked */
  free_block *list[CLASSES];
  int64_t live, peak, cached, allocations, system_allocations;
} moe_cache;

static inline void cache_lock(moe_cache *c) {
  while (atomic_flag_test_and_set_explicit(&c->lock, memory_order_acquire)) sched_yield();
}

static inline void cache_unlock(moe_cache *c) { atomic_flag_clear_explicit(&c->lock, memory_order_release); }

static pthread_mutex_t create_lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic int64_t fail_after; /* > 0: counts down to a failure */

static moe_cache *cache_of(moe_device *d) {
  moe_cache *c = __atomic_load_n(&d->cache, __ATOMIC_ACQUIRE);
  if (c != NULL) return c;
  pthread_mutex_lock(&create_lock);
  c = d->cache;
  if (c == NULL && (c = calloc(1, sizeof *c)) != NULL) {
    atomic_flag_clear(&c->lock);
    __atomic_store_n(&d->cache, c, __ATOMIC_RELEASE);
  }
  pthread_mutex_unlock(&create_lock);
  return c;
}

/* The class of a size, and the size of its blocks; -1 for one too large to cache. */
static int class_of(int64_t bytes, int64_t *block) {
  if (bytes <= 1 << FIRST_LOG2) return *block = 1 << FIRST_LOG2, 0;
  int log2 = 63 - __builtin_clzll((unsigned long long)(bytes - 1)); /* 2^log2 < bytes <= 2^(log2+1) */
  int64_t step = ((int64_t)1 << log2) / STEPS;
  int64_t above = (bytes - ((int64_t)1 << log2) + step - 1) / step; /* 1..STEPS */
  *block = ((int64_t)1 << log2) + above * step;
  int c = (log2 - FIRST_LOG2) * STEPS + (int)above;
  return c < CLASSES ? c : -1;
}

static bool failure_due(void) {
  if (atomic_load_explicit(&fail_after, memory_order_relaxed) <= 0) return false;
  return atomic_fetch_sub(&fail_after, 1) == 1;
}

void moe_memory_fail_after(int64_t n) { atomic_store(&fail_after, n); }

static void *pop(moe_device *d, moe_cache *c, int cls) {
  free_block *b = c->list[cls];
  if (b == NULL) return NULL;
  c->list[cls] = b->next;
  if (d->host_memory) return b;
  void *p = b->p;
  free(b);
  return p;
}

static void trim(moe_device *d, moe_cache *c) { /* with the lock held */
  for (int cls = 0; cls < CLASSES; cls++) {
    void *p;
    while ((p = pop(d, c, cls)) != NULL) d->release(d, p, 0);
  }
  c->cached = 0;
}

void *moe_mem_alloc(moe_device *d, int64_t bytes) {
  moe_cache *c = cache_of(d);
  if (c == NULL || failure_due()) {
    moe_fail(MOE_ENOMEM, "out of memory on %s: %lld bytes wanted", d->name, (long long)bytes);
    return NULL;
  }
  int64_t block;
  int cls = class_of(bytes, &block);
  cache_lock(c);
  void *p = cls < 0 ? NULL : pop(d, c, cls);
  if (p != NULL) {
    c->cached -= block;
  } else {
    p = d->alloc(d, block);
    if (p == NULL && c->cached > 0) { /* give the cache back, once, and ask again */
      trim(d, c);
      p = d->alloc(d, block);
    }
    c->system_allocations++;
  }
  if (p != NULL) {
    c->live += block;
    c->allocations++;
    if (c->live > c->peak) c->peak = c->live;
  }
  int64_t live = c->live, cached = c->cached;
  cache_unlock(c);
  if (p == NULL)
    moe_fail(MOE_ENOMEM, "out of memory on %s: %lld bytes wanted, %lld live, %lld cached", d->name, (long long)bytes,
             (long long)live, (long long)cached);
  return p;
}

void moe_mem_free(moe_device *d, void *p, int64_t bytes) {
  if (p == NULL) return;
  moe_cache *c = cache_of(d);
  int64_t block;
  int cls = class_of(bytes, &block);
  cache_lock(c);
  c->live -= block;
  free_block *b = NULL;
  if (cls >= 0) {
    b = d->host_memory ? p : malloc(sizeof *b);
  }
  if (b != NULL) {
    b->next = c->list[cls];
    if (!d->host_memory) b->p = p;
    c->list[cls] = b;
    c->cached += block;
  }
  cache_unlock(c);
  if (b == NULL) d->release(d, p, block);
}

void moe_memory(moe_device *d, moe_memory_info *info) {
  memset(info, 0, sizeof *info);
  moe_cache *c = cache_of(d);
  if (c == NULL) return;
  cache_lock(c);
  *info = (moe_memory_info){c->live, c->peak, c->cached, c->allocations, c->system_allocations};
  cache_unlock(c);
}

int64_t moe_memory_live(moe_device *d) {
  moe_cache *c = __atomic_load_n(&d->cache, __ATOMIC_ACQUIRE);
  return c ? __atomic_load_n(&c->live, __ATOMIC_RELAXED) : 0;
}

void moe_memory_reset_peak(moe_device *d) {
  moe_cache *c = cache_of(d);
  if (c == NULL) return;
  cache_lock(c);
  c->peak = c->live;
  cache_unlock(c);
}

void moe_memory_trim(moe_device *d) {
  moe_cache *c = cache_of(d);
  if (c == NULL) return;
  cache_lock(c);
  trim(d, c);
  cache_unlock(c);
}
