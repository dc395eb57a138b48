/* Token streams: see tokens.h. */
#include "io/tokens.h"

#include <stdlib.h>
#include <string.h>

#include "io/json.h"

enum { CODES = 0x110000 };

void moe_tokens_free(moe_tokens *t) {
  free(t->data);
  memset(t, 0, sizeof *t);
}

static moe_status not_utf8(const char *text, int64_t at) {
  return moe_fail(MOE_EIO, "the text is not UTF-8: byte %lld is 0x%02x (level = \"bytes\" takes any text)", (long long)at + 1,
                  (unsigned char)text[at]);
}

moe_status moe_tokens_bytes(moe_tokens *t, const char *text, int64_t len) {
  t->data = malloc((size_t)len + 1);
  if (t->data == NULL) return moe_fail(MOE_ENOMEM, "no memory for %lld tokens", (long long)len);
  if (len > 0) memcpy(t->data, text, (size_t)len);
  t->width = 1;
  t->n = len;
  return MOE_OK;
}

moe_status moe_tokens_vocab(const char *text, int64_t len, uint32_t **vocab, int64_t *n) {
  uint8_t *seen = calloc(CODES, 1);
  *vocab = NULL;
  *n = 0;
  if (seen == NULL) return moe_fail(MOE_ENOMEM, "no memory for a vocabulary");
  for (int64_t i = 0; i < len;) {
    uint32_t c;
    int k = moe_utf8_decode(text + i, len - i, &c);
    if (k == 0) {
      free(seen);
      return not_utf8(text, i);
    }
    *n += !seen[c];
    seen[c] = 1;
    i += k;
  }
  *vocab = malloc((size_t)*n * sizeof **vocab + 1);
  if (*vocab != NULL)
    for (uint32_t c = 0, k = 0; c < CODES; c++)
      if (seen[c]) (*vocab)[k++] = c;
  free(seen);
  return *vocab ? MOE_OK : moe_fail(MOE_ENOMEM, "no memory for a vocabulary");
}

moe_status moe_tokens_chars(moe_tokens *t, const char *text, int64_t len, const uint32_t *vocab, int64_t nvocab) {
  int width = nvocab <= 256 ? 1 : nvocab <= 65536 ? 2 : 4;
  int32_t *place = malloc(CODES * sizeof *place); /* of a code point, or -1 */
  t->data = malloc((size_t)len * (size_t)width + 1); /* no more code points than bytes */
  if (place == NULL || t->data == NULL) {
    free(place);
    moe_tokens_free(t);
    return moe_fail(MOE_ENOMEM, "no memory for the tokens of %lld bytes", (long long)len);
  }
  memset(place, 0xFF, CODES * sizeof *place);
  for (int64_t k = 0; k < nvocab; k++) place[vocab[k]] = (int32_t)k;
  t->width = width;
  t->n = 0;
  moe_status st = MOE_OK;
  for (int64_t i = 0; i < len && st == MOE_OK;) {
    uint32_t c;
    int k = moe_utf8_decode(text + i, len - i, &c);
    if (k == 0) st = not_utf8(text, i);
    else if (place[c] < 0) st = moe_fail(MOE_EIO, "the character '%.*s' is not in the vocabulary", k, text + i);
    if (st != MOE_OK) break;
    int32_t v = place[c];
    if (width == 1) ((uint8_t *)t->data)[t->n++] = (uint8_t)v;
    else if (width == 2) ((uint16_t *)t->data)[t->n++] = (uint16_t)v;
    else ((uint32_t *)t->data)[t->n++] = (uint32_t)v;
    i += k;
  }
  free(place);
  if (st != MOE_OK) moe_tokens_free(t);
  return st;
}

void moe_tokens_copy(const moe_tokens *t, int64_t begin, int64_t n, int64_t base, int64_t *out) {
  if (t->width == 1) {
    const uint8_t *p = (const uint8_t *)t->data + begin;
    for (int64_t i = 0; i < n; i++) out[i] = p[i] + base;
  } else if (t->width == 2) {
    const uint16_t *p = (const uint16_t *)t->data + begin;
    for (int64_t i = 0; i < n; i++) out[i] = p[i] + base;
  } else {
    const uint32_t *p = (const uint32_t *)t->data + begin;
    for (int64_t i = 0; i < n; i++) out[i] = p[i] + base;
  }
}
