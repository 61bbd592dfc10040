/* What Triton's launcher (triton/backends/nvidia/driver.c, 3.7) needs of CUDA's driver, without a GPU: modules and functions
   are numbers, a launch is written down, and a tensor map is made only where the driver's documentation allows it.

   Source of the rules: CUDA driver API, cuTensorMapEncodeTiled. */
#include <cuda.h>
#include <string.h>

static long handles, launches;
static unsigned grid;
static CUfunction launched;
static unsigned long long arguments[2];

long stub_launches(void) { return launches; }
unsigned stub_grid(void) { return grid; }
unsigned long long stub_function(void) { return (unsigned long long)launched; }
/* The first 8 bytes of the first two arguments, of all kernels pointers or tensor maps: an address in either case. */
unsigned long long stub_argument(int i) { return arguments[i]; }

static const char *broken = "";
const char *stub_broken_rule(void) { return broken; }
static CUresult no(const char *rule) {
  broken = rule;
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const unsigned bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4}, span[] = {0, 32, 64, 128};
  if ((unsigned long long)map % 64) return no("the map's own alignment is 64 bytes");
  if (rank < 1 || rank > 5) return no("rank 1 to 5");
  if ((unsigned long long)address % 16) return no("the address is a multiple of 16 bytes");
  if (type >= sizeof bytes / sizeof *bytes || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || swizzle > 3)
    return no("something this stub doesn't know");
  for (unsigned i = 0; i < rank; i++) {
    if (sizes[i] < 1 || sizes[i] > 1ull << 32) return no("sizes from 1 to 2^32");
    if (box[i] < 1 || box[i] > 256) return no("a box of 1 to 256 in each dimension");
    if (steps[i] < 1 || steps[i] > 8) return no("steps from 1 to 8");
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40))
      return no("strides are multiples of 16 bytes below 2^40");
  }
  if (box[0] * bytes[type] % 16) return no("the box's inner dimension is a multiple of 16 bytes");
  if (swizzle && box[0] * bytes[type] > span[swizzle]) return no("the box's inner dimension is no longer than the swizzle");
  memset(map, 0, sizeof *map);
  memcpy(map, &address, sizeof address);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  launches++;
  grid = config->gridDimX;
  launched = function;
  for (int i = 0; i < 2; i++) memcpy(&arguments[i], parameters[i], sizeof arguments[i]);
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
  *value = attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 132 : 232448; /* bytes of shared memory */
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
