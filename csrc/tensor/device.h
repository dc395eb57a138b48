/* The device table: what a device must be able to do. An op reaches a kernel only through
** the table of its tensors' device; an empty slot is an error that names op and device.
*/
#ifndef MOE_TENSOR_DEVICE_H
#define MOE_TENSOR_DEVICE_H

#include "base/err.h"
#include "base/rng.h"
#include "tensor/dtype.h"
#include "tensor/iter.h"
#include "tensor/plan.h"
#include "tensor/recurrence.h"
#include "tensor/attention.h"
#include "tensor/selective.h"

typedef struct moe_device moe_device;

/* One typed slot a kernel; the list is tensor/kernels.def. */
typedef struct moe_kernels {
#define KERNEL(name, params) moe_status(*name) params;
#include "tensor/kernels.def"
#undef KERNEL
} moe_kernels;

struct moe_device {
  const char *type;  /* "cpu", "cuda" */
  char name[16];     /* "cpu", "cuda:0" */
  int index;
  moe_kernels k;
  /* Plain memory, 64-byte aligned; the caching layer of base/mem.c lies above. */
  void *(*alloc)(moe_device *d, int64_t bytes);
  void (*release)(moe_device *d, void *p, int64_t bytes);
  /* Copies between host memory and this device's (NULL where they are the same). */
  moe_status (*to_host)(moe_device *d, void *dst, const void *src, int64_t bytes);
  moe_status (*from_host)(moe_device *d, void *dst, const void *src, int64_t bytes);
  bool host_memory;  /* the host may read and write this device's memory */
  struct moe_cache *cache;
};

moe_device *moe_cpu(void);
/* "cpu", "cuda", "cuda:1"; NULL with an error for a device that is not there. */
moe_device *moe_device_find(const char *name);

/* Calls a kernel: MOE_RUN(dev, "exp", unary, fn, dt, &it); an empty slot fails naming operation and device. */
#define MOE_RUN(dev, opname, slot, ...) \
  ((dev)->k.slot ? (dev)->k.slot(__VA_ARGS__) \
                 : moe_fail(MOE_EDEVICE, "%s: no kernel '%s' on device %s", (opname), #slot, (dev)->name))

/* Memory accounting of a device, bytes. */
typedef struct moe_memory_info {
  int64_t live, peak, cached, allocations, system_allocations;
} moe_memory_info;
void moe_memory(moe_device *d, moe_memory_info *info);
int64_t moe_memory_live(moe_device *d); /* without the lock: cheap, for pressure checks */
void moe_memory_reset_peak(moe_device *d);
void moe_memory_trim(moe_device *d); /* gives the cache back to the system */
/* For tests: the n-th allocation from now fails (0: off). Counts down over all devices. */
void moe_memory_fail_after(int64_t n);

/* Cached, accounted blocks (base of every storage). NULL with MOE_ENOMEM. */
void *moe_mem_alloc(moe_device *d, int64_t bytes);
void moe_mem_free(moe_device *d, void *p, int64_t bytes);

#endif
