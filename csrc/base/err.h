/* Errors of the core: a status code and a thread-local message.
**
** The core never longjmps, prints, aborts or exits. A function that can fail returns a
** moe_status (0 = success) or a pointer (NULL = failure); the message then waits in
** moe_error() until the next failure on the same thread.
*/
#ifndef MOE_BASE_ERR_H
#define MOE_BASE_ERR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef int moe_status;

enum {
  MOE_OK = 0,
  MOE_EINVAL,    /* a wrong argument: the caller's mistake */
  MOE_ENOMEM,    /* no memory on the device */
  MOE_EDEVICE,   /* a device or a kernel that this build or machine does not have */
  MOE_EIO,       /* a file: the binding answers nil, message */
  MOE_ECALLBACK, /* a callback failed; the host keeps its own error value */
  MOE_EINTERRUPT /* the user asked to stop */
};

#if defined(__GNUC__)
#define MOE_PRINTF(f, a) __attribute__((format(printf, f, a)))
#define MOE_COLD __attribute__((cold, noinline))
#else
#define MOE_PRINTF(f, a)
#define MOE_COLD
#endif

/* A small thread-local variable of the hot path. In a module that is loaded at run time the default model calls
** a function at every access; glibc keeps some room for modules that ask for the fast one (512 bytes in all). */
#if defined(__GLIBC__) && defined(__GNUC__)
#define MOE_HOT_TLS _Thread_local __attribute__((tls_model("initial-exec")))
#else
#define MOE_HOT_TLS _Thread_local
#endif

/* Sets the message and returns `code`. */
moe_status moe_fail(moe_status code, const char *fmt, ...) MOE_PRINTF(2, 3) MOE_COLD;
/* Puts "prefix: " before the message of the last failure; returns its code. */
moe_status moe_fail_prefix(const char *prefix) MOE_COLD;
/* The same, where the message does not begin with a name and a colon already; returns its code. */
moe_status moe_fail_name(const char *name) MOE_COLD;
const char *moe_error(void);
moe_status moe_error_code(void);
void moe_error_clear(void);

#define MOE_TRY(expr)                      \
  do {                                     \
    moe_status try_status_ = (expr);       \
    if (try_status_ != MOE_OK) return try_status_; \
  } while (0)

/* Invariants of our own code, checked in debug builds only; never user input. */
#ifdef MOE_DEBUG
#include <assert.h>
#define MOE_ASSERT(x) assert(x)
#else
#define MOE_ASSERT(x) ((void)0)
#endif

#define MOE_MIN(a, b) ((a) < (b) ? (a) : (b))
#define MOE_MAX(a, b) ((a) > (b) ? (a) : (b))

#endif
