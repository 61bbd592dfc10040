/* A stub of CUDA's driver for Triton's own launcher, whose launches go to a callback in Python, and an allocator that remembers
   every tensor. It is preloaded, so that each tensor lies between guards and begins as NaN.

   Source of the rules for tensor maps: CUDA driver API, cuTensorMapEncodeTiled. */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* Tensors: whatever is allocated aligned to 64 bytes, as torch does. */
enum { GUARD = 4096, SLOTS = 1 << 16 };
static struct { char *at; size_t size; } table[SLOTS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int watching;
static int (*real_memalign)(void **, size_t, size_t);
static void (*real_free)(void *);

static void find_real(void) {
  if (!real_free) {
    real_memalign = (int (*)(void **, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
    real_free = (void (*)(void *))dlsym(RTLD_NEXT, "free");
  }
}
void machine_watch(int on) { watching = on; }
static unsigned slot_of(void *p) { return (unsigned)(((unsigned long long)p >> 12) * 2654435761u) % SLOTS; }

int posix_memalign(void **out, size_t align, size_t size) {
  find_real();
  if (!watching || align != 64 || size == 0) return real_memalign(out, align, size);
  char *base;
  int error = real_memalign((void **)&base, 4096, size + 2 * GUARD);
  if (error) return error;
  memset(base, 0xFF, size + 2 * GUARD);
  *out = base + GUARD;
  pthread_mutex_lock(&lock);
  unsigned i = slot_of(*out);
  while (table[i].at && table[i].at != (char *)1) i = (i + 1) % SLOTS;
  table[i].at = *out;
  table[i].size = size;
  pthread_mutex_unlock(&lock);
  return 0;
}
void free(void *p) {
  find_real();
  if (p && ((unsigned long long)p & 4095) == 0) {
    pthread_mutex_lock(&lock);
    for (unsigned i = slot_of(p); table[i].at; i = (i + 1) % SLOTS)
      if (table[i].at == p) {
        table[i].at = (char *)1; /* once used */
        p = (char *)p - GUARD;
        break;
      }
    pthread_mutex_unlock(&lock);
  }
  real_free(p);
}
/* The tensor that an address lies in: its begin and size, or 0. */
int machine_allocation(unsigned long long address, unsigned long long *begin, unsigned long long *size) {
  for (unsigned i = 0; i < SLOTS; i++)
    if ((unsigned long long)table[i].at > 1 && (unsigned long long)table[i].at <= address &&
        address < (unsigned long long)table[i].at + table[i].size) {
      *begin = (unsigned long long)table[i].at;
      *size = table[i].size;
      return 1;
    }
  return 0;
}

/* CUDA. */
static int shared_memory = 232448; /* bytes that one CTA may have */
void machine_set_shared_memory(int bytes) { shared_memory = bytes; }
static long handles;
static int (*launched)(unsigned long long function, unsigned grid, unsigned threads, unsigned shared, void **parameters);
void machine_set_callback(void *f) { launched = (int (*)(unsigned long long, unsigned, unsigned, unsigned, void **))f; }

static const char *broken = "";
const char *machine_broken_rule(void) { return broken; }
static CUresult no(const char *rule) {
  broken = rule;
  return CUDA_ERROR_INVALID_VALUE;
}

struct map { /* read by tma.py; Triton's driver.c clears a bit of the second word of CUDA's, a bug's workaround */
  unsigned long long magic, triton_clears_a_bit, address;
  unsigned sizes[5];
  unsigned pad;
  unsigned long long strides[4];
  unsigned short box[5];
  unsigned char steps[5], rank, type, swizzle, fill;
} __attribute__((packed));

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const unsigned bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4}, span[] = {0, 32, 64, 128};
  if ((unsigned long long)map % 64) return no("the map's own alignment is 64 bytes");
  if (rank < 1 || rank > 5) return no("rank 1 to 5");
  if ((unsigned long long)address % 16) return no("the address is a multiple of 16 bytes");
  if (type >= sizeof bytes / sizeof *bytes || interleave || swizzle > 3) return no("something this stub doesn't know");
  struct map m = {0x70A85EEDull, 0, (unsigned long long)address};
  for (unsigned i = 0; i < rank; i++) {
    if (sizes[i] < 1 || sizes[i] > 1ull << 32) return no("sizes from 1 to 2^32");
    if (box[i] < 1 || box[i] > 256) return no("a box of 1 to 256 in each dimension");
    if (steps[i] < 1 || steps[i] > 8) return no("steps from 1 to 8");
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40)) return no("strides: multiples of 16 below 2^40");
    m.sizes[i] = (unsigned)(sizes[i] - 1);
    if (i + 1 < rank) m.strides[i] = strides[i];
    m.box[i] = box[i];
    m.steps[i] = steps[i];
  }
  if (box[0] * bytes[type] % 16) return no("the box's inner dimension is a multiple of 16 bytes");
  if (swizzle && box[0] * bytes[type] > span[swizzle]) return no("the box's inner dimension is longer than the swizzle");
  m.rank = rank, m.type = type, m.swizzle = swizzle, m.fill = fill;
  memset(map, 0, sizeof *map);
  memcpy(map, &m, sizeof m);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  if (config->gridDimY != 1 || config->gridDimZ != 1) return no("a grid of one dimension");
  if (launched((unsigned long long)function, config->gridDimX, config->blockDimX, config->sharedMemBytes, parameters))
    return no("the machine raised an error");
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = broken;
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) {
  *version = 12080;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 132 : shared_memory;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)++handles;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)++handles;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  memcpy(data, &pointer, sizeof pointer); /* the device's address of host memory is that itself */
  return CUDA_SUCCESS;
}
#define NOTHING(name, ...) \
  CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
NOTHING(cuCtxSetCurrent, CUcontext context)
NOTHING(cuCtxGetLimit, size_t *value, CUlimit limit)
NOTHING(cuCtxSetLimit, CUlimit limit, size_t value)
NOTHING(cuDevicePrimaryCtxRetain, CUcontext *context, CUdevice device)
NOTHING(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value)
NOTHING(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)
NOTHING(cuPointerGetAttributes, unsigned count, CUpointer_attribute *attributes, void **data, CUdeviceptr pointer)
