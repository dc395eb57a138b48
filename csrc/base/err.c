#include "base/err.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char message[1024];
static MOE_HOT_TLS moe_status last_code;

moe_status moe_fail(moe_status code, const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(message, sizeof message, fmt, ap);
  va_end(ap);
  last_code = code;
  return code;
}

moe_status moe_fail_prefix(const char *prefix) {
  char old[sizeof message];
  memcpy(old, message, sizeof old);
  int n = snprintf(message, sizeof message, "%s: ", prefix);
  if (n > 0 && n < (int)sizeof message) {
    size_t room = sizeof message - (size_t)n, len = strlen(old);
    if (len >= room) len = room - 1;
    memcpy(message + n, old, len);
    message[n + (int)len] = '\0';
  }
  return last_code;
}

moe_status moe_fail_name(const char *name) {
  size_t n = strspn(message, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.");
  if (last_code == MOE_ECALLBACK || (n > 0 && message[n] == ':')) return last_code;
  return moe_fail_prefix(name);
}

const char *moe_error(void) { return message; }
moe_status moe_error_code(void) { return last_code; }

void moe_error_clear(void) {
  message[0] = '\0';
  last_code = MOE_OK;
}
