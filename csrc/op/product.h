/* What the operations around matrix products share. */
#ifndef MOE_OP_PRODUCT_H
#define MOE_OP_PRODUCT_H

#include "op/op.h"

/* Fails, naming the argument and its type, unless t is of a floating-point type. */
moe_status moe_want_float(moe_ctx *c, const char *name, const moe_tensor *t);
/* t seen with another shape of as many elements; recorded only where calls are recorded. NULL passes through. */
moe_tensor *moe_reshaped(moe_tensor *t, int ndim, const int64_t *shape);
/* Empty, of that shape [b, h, t, d], its memory in the order b, t, h, d where `like` has it so (the positions outside of
** the heads): a model that split heads out of [b, t, h d] gets its results back without a copy. Else contiguous. */
moe_tensor *moe_heads_like(const moe_tensor *like, const int64_t *shape, moe_dtype dt);

/* Fails unless `scaling` (NULL: none) is one that rope knows. */
moe_status moe_rope_check(const char *who, const char *scaling);

#endif
