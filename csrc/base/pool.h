/* The one thread pool. Work is cut into tasks by shape alone, never by the number of
** threads, and each task owns its outputs: results are the same to the bit for any number
** of threads.
*/
#ifndef MOE_BASE_POOL_H
#define MOE_BASE_POOL_H

#include <stdint.h>

/* One task: `i` in [0, ntasks). `worker` in [0, moe_pool_threads()) tells scratch memory apart. */
typedef void moe_task_fn(void *arg, int64_t i, int worker);

/* Runs all tasks and returns when they are done. Called from inside a task, or while another
** thread uses the pool, it runs them inline, in order. */
void moe_parallel(int64_t ntasks, moe_task_fn *fn, void *arg);

/* The same over a range [0, n) cut into pieces of `grain` (the last may be shorter). */
typedef void moe_range_fn(void *arg, int64_t begin, int64_t end, int worker);
void moe_parallel_range(int64_t n, int64_t grain, moe_range_fn *fn, void *arg);

int moe_pool_threads(void);          /* at least 1 */
void moe_pool_set_threads(int n);    /* n < 1: the default (MOE_THREADS or the machine's cores) */
enum { MOE_MAX_THREADS = 256 };

/* Per-worker scratch of at least `bytes`, 64-byte aligned, kept between calls; NULL when memory is
** short. Valid until the same worker asks again for the same slot. */
enum { MOE_SCRATCH_SLOTS = 8 };
void *moe_scratch(int slot, int64_t bytes);

#endif
