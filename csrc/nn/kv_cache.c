/* Without recording, a state's tensors are views [batch, heads, time, dim] of blocks with room for more times, so
** that a step writes its own rows alone. Behind its rows a block says how many of them are taken: whoever continues a
** state that is not the newest view of its block (a branch) gets a copy.
*/
#include "nn/kv_cache.h"

#include <string.h>

#include "autograd/graph.h"

typedef struct cache_tail {
  uint64_t magic;
  int64_t taken;
} cache_tail;

static const uint64_t cache_magic = 0x6b65797376616c73u;

static int64_t cache_bytes(const moe_tensor *t, int64_t room) {
  return t->shape[0] * t->shape[1] * room * t->shape[3] * moe_dtype_size(t->dtype);
}

static void *tail_of(const moe_tensor *t, int64_t room) { return (char *)t->storage->data + cache_bytes(t, room); }

/* The times that t's block has room for, when t is the newest view of a block; else 0. */
static int64_t room_of(const moe_tensor *t) {
  int64_t d = t->shape[3], room = t->stride[2] == d && t->stride[3] == 1 ? t->stride[1] / d : 0;
  if (room < t->shape[2] || t->offset != 0 || t->stride[1] != room * d || t->stride[0] != t->shape[1] * room * d) return 0;
  if (t->storage->bytes != cache_bytes(t, room) + (int64_t)sizeof(cache_tail)) return 0;
  cache_tail tail;
  memcpy(&tail, tail_of(t, room), sizeof tail);
  return tail.magic == cache_magic && tail.taken == t->shape[2] ? room : 0;
}

/* `length` times of the block that t views, from `start`. */
static moe_tensor *block_view(moe_tensor *t, const moe_tensor *like, int64_t room, int64_t start, int64_t length) {
  int64_t heads = like->shape[1], d = like->shape[3];
  return moe_view_of(t, 4, (const int64_t[]){like->shape[0], heads, length, d},
                     (const int64_t[]){heads * room * d, room * d, d, 1}, start * d);
}

static moe_tensor *append_in_place(moe_tensor *past, moe_tensor *now) {
  int64_t length = past ? past->shape[2] : 0, all = length + now->shape[2];
  int64_t room = past ? room_of(past) : 0, size = moe_dtype_size(now->dtype);
  moe_tensor *block = past;
  if (room < all) {
    int64_t extra = (int64_t)sizeof(cache_tail) / size, total;
    room = all + all / 2 + 32;
    MOE_ASSERT(extra * size == (int64_t)sizeof(cache_tail));
    if (moe_shape_numel("attention", 4, (const int64_t[]){now->shape[0], now->shape[1], room, now->shape[3]}, &total)) return NULL;
    total += extra;
    block = moe_empty(1, &total, now->dtype, moe_dev(now));
    if (block == NULL) return NULL;
    if (length > 0) {
      moe_tensor *old = block_view(block, now, room, 0, length);
      if (old == NULL || moe_copy(old, past) != MOE_OK) return NULL;
    }
  }
  moe_tensor *fresh = block_view(block, now, room, length, now->shape[2]), *view = block_view(block, now, room, 0, all);
  if (fresh == NULL || view == NULL || moe_copy(fresh, now) != MOE_OK) return NULL;
  cache_tail tail = {cache_magic, all};
  memcpy(tail_of(view, room), &tail, sizeof tail);
  return view;
}

moe_tensor *moe_kv_extend(moe_tensor *past, moe_tensor *now, bool stateful) {
  if (now == NULL || !stateful) return now;
  bool recorded = moe_grad_enabled() && (now->requires_grad || (past && past->requires_grad));
  bool host = moe_dev(now)->host_memory && moe_numel(now) > 0;
  if (!recorded && host && (past == NULL || (past->dtype == now->dtype && moe_dev(past) == moe_dev(now))))
    return append_in_place(past && past->shape[2] > 0 ? past : NULL, now);
  if (past == NULL || past->shape[2] == 0) return now;
  moe_tensor *both[2] = {past, now};
  return MOE_CALL(cat, TS(both, 2), I(2));
}
