/* Keys or values that grow with the sequence. */
#ifndef MOE_NN_KV_CACHE_H
#define MOE_NN_KV_CACHE_H

#include "op/op.h"

/* past [batch, heads, time, dim] (NULL or of no time: none) followed by now [batch, heads, times, dim], scoped. Without
** recording it costs the new rows alone; `past` stays as it is. Not `stateful`: now itself. */
moe_tensor *moe_kv_extend(moe_tensor *past, moe_tensor *now, bool stateful);

#endif
