/* Which devices there are. The GPU part registers itself here when it is loaded. */
#include "tensor/device.h"

#include <string.h>

moe_device *moe_device_find(const char *name) {
  if (strcmp(name, "cpu") == 0) return moe_cpu();
  if (strncmp(name, "cuda", 4) == 0 && (name[4] == '\0' || name[4] == ':')) {
    moe_fail(MOE_EDEVICE, "device '%s' is not available: this build of moe has no CUDA part", name);
    return NULL;
  }
  moe_fail(MOE_EINVAL, "unknown device '%s' (known: cpu, cuda, cuda:<n>)", name);
  return NULL;
}
