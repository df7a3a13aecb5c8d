#ifndef GODWIT_PAGEHASH_H
#define GODWIT_PAGEHASH_H
/*
 * The hash of a page's contents (Host/PageHash.swift has the same in Swift, and says what it is). A build for all x86-64 processors has
 * vectors of 16 bytes; C can compile one function for those with more, which Swift cannot.
 */
#include <stdint.h>

typedef uint64_t gw_lanes __attribute__((vector_size(64), aligned(8), may_alias));

/* The widest of the loops below that this processor, and the kernel, can run: vectors of so many bits; 128: none of them. */
static inline int gw_vector_bits(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    /* Processors with VBMI2 are new enough not to slow down as a whole when they multiply 512 bits. */
    if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512dq")) return 512;
    if (__builtin_cpu_supports("avx2")) return 256;
#endif
    return 128;
}

#if defined(__x86_64__)
#define GW_TARGET(features) __attribute__((target(features)))
#else
#define GW_TARGET(features)
#endif
/* Of 4096 bytes at `page` under the 520 words at `key`. What stands `ahead` bytes further is fetched meanwhile, if it is memory. */
#define GW_PAGE_HASH(name, features)                                                                 \
    GW_TARGET(features)                                                                              \
    static inline uint64_t name(const void *_Nonnull page, const void *_Nonnull key, long ahead) {   \
        const gw_lanes *words = (const gw_lanes *)page, *keys = (const gw_lanes *)key;               \
        gw_lanes products = {0}, sums = {0};                                                         \
        for (int i = 0; i < 64; i++) {                                                               \
            const gw_lanes word = words[i], mixed = word ^ keys[i];                                  \
            __builtin_prefetch((const char *)&words[i] + ahead);                                     \
            products += (mixed & 0xffffffff) * (mixed >> 32);                                        \
            sums += word;                                                                            \
        }                                                                                            \
        gw_lanes lanes = (products ^ keys[64]) * 0x9FB21C651E98DF25u + sums;                         \
        lanes = (lanes ^ (lanes >> 30)) * 0xBF58476D1CE4E5B9u;                                       \
        lanes = (lanes ^ (lanes >> 27)) * 0x94D049BB133111EBu;                                       \
        lanes ^= lanes >> 31;                                                                        \
        uint64_t hash = 0;                                                                           \
        for (int i = 0; i < 8; i++) hash += lanes[i];                                                \
        return hash;                                                                                 \
    }
GW_PAGE_HASH(gw_page_hash_256, "avx2")
GW_PAGE_HASH(gw_page_hash_512, "avx512f,avx512dq")

/* Of `count` pages one behind the other, into `hashes`; each but the last has those behind it fetched, so far ahead and no further. */
#define GW_PAGE_HASHES(name, one, features)                                                          \
    GW_TARGET(features)                                                                              \
    static inline void name(const void *_Nonnull pages, const void *_Nonnull key, uint64_t *_Nonnull hashes, long count, \
                            long ahead) {                                                            \
        for (long i = 0; i < count; i++)                                                             \
            hashes[i] = one((const char *)pages + 4096 * i, key, (i + 1) * 4096 + ahead <= count * 4096 ? ahead : 0); \
    }
GW_PAGE_HASHES(gw_page_hashes_256, gw_page_hash_256, "avx2")
GW_PAGE_HASHES(gw_page_hashes_512, gw_page_hash_512, "avx512f,avx512dq")
#endif
