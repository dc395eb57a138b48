/* What the operations around matrix products share. */
#ifndef MOE_OP_PRODUCT_H
#define MOE_OP_PRODUCT_H

#include "op/op.h"

/* Fails, naming the argument and its type, unless t is of a floating-point type. */
moe_status moe_want_float(moe_ctx *c, const char *name, const moe_tensor *t);
/* t seen with another shape of as many elements; recorded only where calls are recorded. NULL passes through. */
moe_tensor *moe_reshaped(moe_tensor *t, int ndim, const int64_t *shape);

#endif
