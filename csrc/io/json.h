/* A small strict JSON reader (RFC 8259) and the pieces of a writer.
**
** The reader takes hostile text: depth and the number of values are bounded, strings are valid UTF-8, keys of an
** object are distinct, nothing follows the value. It makes a flat array of nodes; children follow their parent.
*/
#ifndef MOE_IO_JSON_H
#define MOE_IO_JSON_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

typedef enum moe_json_kind {
  MOE_JSON_NULL,
  MOE_JSON_BOOL,
  MOE_JSON_INT,   /* a number without fraction and exponent that fits int64_t */
  MOE_JSON_FLOAT,
  MOE_JSON_STRING,
  MOE_JSON_ARRAY,
  MOE_JSON_OBJECT
} moe_json_kind;

typedef struct moe_json_node {
  moe_json_kind kind;
  int32_t next;      /* the next sibling's place, 0 = last */
  int32_t count;     /* children */
  const char *key;   /* members of objects; may hold zero bytes */
  int64_t key_len;
  union {
    int64_t i;
    double f;
    struct {
      const char *s;
      int64_t len;
    };
  };
} moe_json_node;

typedef struct moe_json {
  moe_json_node *node; /* node[0] is the value; the first child of node k is k + 1 */
  int32_t n, capacity;
  char *text;          /* unescaped strings, each ended by a zero byte */
} moe_json;

enum { MOE_JSON_DEPTH = 64, MOE_JSON_NODES = 1 << 22 };

/* Starts from a zeroed struct; on failure everything is freed. Error code MOE_EIO. */
moe_status moe_json_parse(moe_json *j, const char *text, int64_t len);
void moe_json_free(moe_json *j);
/* Place of a member, or -1. */
int32_t moe_json_member(const moe_json *j, int32_t object, const char *key);

/* True for valid UTF-8 (no overlong forms, no surrogates). */
bool moe_utf8_valid(const char *s, int64_t len);
/* Decodes one code point of valid UTF-8 at s; returns the bytes taken. */
int moe_utf8_decode(const char *s, int64_t left, uint32_t *code);
int moe_utf8_encode(uint32_t code, char *out); /* bytes written, at most 4 */

/* Growing text. A failed allocation is remembered in `failed`; later calls do nothing. */
typedef struct moe_text {
  char *s;
  int64_t n, capacity;
  bool failed;
} moe_text;

void moe_text_add(moe_text *b, const char *s, int64_t n);
void moe_text_addf(moe_text *b, const char *fmt, ...) MOE_PRINTF(2, 3); /* up to 255 bytes */
void moe_text_quote(moe_text *b, const char *s, int64_t n); /* a JSON string; s is valid UTF-8 */
void moe_text_number(moe_text *b, double v);                /* finite; read back to the same bits, in any locale */
void moe_text_free(moe_text *b);

#endif
