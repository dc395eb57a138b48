/* Philox4x32-10 counter-based random numbers (Salmon et al., "Parallel random numbers: as
** easy as 1, 2, 3", SC 2011). Element i of a draw depends on (seed, offset, i) alone, so the
** stream is the same for any number of threads and on every device.
*/
#ifndef MOE_BASE_RNG_H
#define MOE_BASE_RNG_H

#include <stdint.h>

typedef struct moe_rng {
  uint64_t seed;   /* the key */
  uint64_t offset; /* the next unused block of four 32-bit words */
} moe_rng;

typedef struct moe_philox4 {
  uint32_t v[4];
} moe_philox4;

static inline moe_philox4 moe_philox(uint64_t seed, uint64_t block) {
  uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    uint32_t h0 = (uint32_t)(p0 >> 32), l0 = (uint32_t)p0;
    uint32_t h1 = (uint32_t)(p1 >> 32), l1 = (uint32_t)p1;
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (moe_philox4){{c0, c1, c2, c3}};
}

/* [0, 1) with 24 bits, exact in f32. */
static inline float moe_u32_to_unit(uint32_t x) { return (float)(x >> 8) * (1.0f / 16777216.0f); }

/* Reserves `blocks` blocks of the stream and returns the first one. */
static inline uint64_t moe_rng_take(moe_rng *r, uint64_t blocks) {
  uint64_t first = r->offset;
  r->offset += blocks;
  return first;
}

/* One 64-bit draw, for host-side decisions (seeds, permutations). */
static inline uint64_t moe_rng_u64(moe_rng *r) {
  moe_philox4 p = moe_philox(r->seed, moe_rng_take(r, 1));
  return (uint64_t)p.v[0] << 32 | p.v[1];
}

#endif
