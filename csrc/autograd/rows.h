/* Row-sparse gradients: of a leaf of many rows, of which a step touches few, the touched rows alone.
**
** Such a gradient is a tensor of values [U, ..] whose field `rows` lists the rows of the leaf that they belong to: i64 [U], counting
** from 0, ascending, each once. It exists in two places: where a backward function hands it to the engine (moe_give_rows), and
** as the grad of a leaf. In between the engine makes it dense: for the result of a recorded call, a hook, moe.grad, second
** derivatives, a leaf whose grad is dense already. Nothing of the leaf's size is touched, and the values of a row are added up in
** the order of positions, then of backward passes: the same bits for any number of threads.
*/
#ifndef MOE_AUTOGRAD_ROWS_H
#define MOE_AUTOGRAD_ROWS_H

#include "op/op.h"

static inline bool moe_is_rows(const moe_tensor *g) { return g != NULL && g->rows != NULL; }

/* Whether a backward may hand out rows: not while it is recorded itself. */
bool moe_rows_wanted(void);
/* gin[i] <- the row-sparse gradient of input i, a tensor of at least one dimension: position p of `index` (i64, counting from c->base) adds
** weight[p] (NULL: 1) times row p / (numel(index) / M) of src [M, ..] to its row. Positions of row `skip` (from 0) and those that
** name none (base - 1) add nothing. Sums of bf16 and f16 are taken in f32. */
moe_status moe_give_rows(moe_ctx *c, int i, moe_tensor *index, moe_tensor *src, moe_tensor *weight, int64_t skip);
/* The gradient of a leaf `like` as a dense tensor, scoped: g itself where it is dense already. */
moe_tensor *moe_rows_dense(moe_tensor *g, const moe_meta *like);
moe_tensor *moe_grad_dense(const moe_tensor *leaf); /* leaf->grad so; NULL where there is none (or on an error) */
/* *grad += g, g row-sparse; *grad is not NULL. Both belong to `leaf`. */
moe_status moe_rows_add(moe_tensor *leaf, moe_tensor *g);

#endif
