/* How creating operations make their result: arguments at, at+1, at+2 are dtype, device, requires_grad. */
#ifndef MOE_OP_MAKE_H
#define MOE_OP_MAKE_H

#include "op/op.h"

/* Sets and returns result 0. Without a device: that of a tensor in argument 0, else the CPU. */
moe_tensor *moe_make(moe_ctx *c, int ndim, const int64_t *shape, moe_dtype dtype, int at);
moe_tensor *moe_make_shaped(moe_ctx *c, int at); /* argument 0 is the shape; f32 unless told */
moe_tensor *moe_make_like(moe_ctx *c, int at);   /* argument 0 is a tensor whose shape and type are taken */

#endif
