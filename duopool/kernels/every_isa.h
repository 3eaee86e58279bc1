// Compiles the file named by DUOPOOL_KERNEL_BODY once per instruction set, each in a namespace of its own.
//
// Owns the list of instruction sets. The caller includes this once, outside any namespace, then picks a namespace at run
// time by the Isa value that Python passes; cpu_library.py decides which one the machine has.

#include "library.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define DUOPOOL_WIDTH 4
#define DUOPOOL_MAX_ROWS 6
#define DUOPOOL_TARGET
namespace {
namespace portable {
#include "vectors.h"
#include "word_products.h"
#include "byte_products.h"
#include DUOPOOL_KERNEL_BODY
}  // namespace portable
}  // namespace
#undef DUOPOOL_WIDTH
#undef DUOPOOL_MAX_ROWS
#undef DUOPOOL_TARGET
#undef DUOPOOL_INLINE

#if defined(__x86_64__)

#define DUOPOOL_WIDTH 8
#define DUOPOOL_MAX_ROWS 6
#define DUOPOOL_TARGET __attribute__((target("avx2,fma")))
namespace {
namespace avx2 {
#include "vectors.h"
#include "word_products.h"
#include "byte_products.h"
#include DUOPOOL_KERNEL_BODY
}  // namespace avx2
}  // namespace
#undef DUOPOOL_WIDTH
#undef DUOPOOL_MAX_ROWS
#undef DUOPOOL_TARGET
#undef DUOPOOL_INLINE

#define DUOPOOL_WIDTH 16
#define DUOPOOL_MAX_ROWS 12
#define DUOPOOL_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
namespace {
namespace avx512 {
#include "vectors.h"
#include "word_products.h"
#include "byte_products.h"
#include DUOPOOL_KERNEL_BODY
}  // namespace avx512
}  // namespace
#undef DUOPOOL_WIDTH
#undef DUOPOOL_MAX_ROWS
#undef DUOPOOL_TARGET
#undef DUOPOOL_INLINE

#define DUOPOOL_WIDTH 16
#define DUOPOOL_MAX_ROWS 12
#define DUOPOOL_DOTS
#define DUOPOOL_TARGET                                                                                        \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,"                \
                          "prefer-vector-width=512")))
namespace {
namespace avx512_dots {
#include "vectors.h"
#include "word_products.h"
#include "byte_products.h"
#include DUOPOOL_KERNEL_BODY
}  // namespace avx512_dots
}  // namespace
#undef DUOPOOL_WIDTH
#undef DUOPOOL_MAX_ROWS
#undef DUOPOOL_DOTS
#undef DUOPOOL_TARGET
#undef DUOPOOL_INLINE

#define DUOPOOL_CALL(isa, call)                       \
    ((isa) == AVX512_DOTS ? avx512_dots::call         \
     : (isa) == AVX512    ? avx512::call              \
     : (isa) == AVX2      ? avx2::call                \
                          : portable::call)
#define DUOPOOL_CONSTANT(isa, name) DUOPOOL_CALL(isa, name)

#else

#define DUOPOOL_CALL(isa, call) (portable::call)
#define DUOPOOL_CONSTANT(isa, name) (portable::name)

#endif
