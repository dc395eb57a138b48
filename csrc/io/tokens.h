/* Token streams: text as numbers of one, two or four bytes, from which windows are cut for training.
** Tokens count from 0 here; the tensors made of them count from `base`.
*/
#ifndef MOE_IO_TOKENS_H
#define MOE_IO_TOKENS_H

#include <stdint.h>

#include "base/err.h"

typedef struct moe_tokens {
  int width; /* bytes a token: 1, 2, 4 */
  int64_t n;
  void *data; /* from malloc */
} moe_tokens;

void moe_tokens_free(moe_tokens *t);
/* Token = byte. */
moe_status moe_tokens_bytes(moe_tokens *t, const char *text, int64_t len);
/* The distinct code points of UTF-8 text in ascending order, *vocab from malloc. MOE_EIO when the text is not UTF-8. */
moe_status moe_tokens_vocab(const char *text, int64_t len, uint32_t **vocab, int64_t *n);
/* Token = place in vocab (ascending). MOE_EIO for a code point that is not there, or text that is not UTF-8. */
moe_status moe_tokens_chars(moe_tokens *t, const char *text, int64_t len, const uint32_t *vocab, int64_t nvocab);
/* out[0..n) <- tokens begin .. begin + n - 1, plus base. The range is the caller's care. */
void moe_tokens_copy(const moe_tokens *t, int64_t begin, int64_t n, int64_t base, int64_t *out);

#endif
