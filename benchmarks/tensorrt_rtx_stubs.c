/* What benchmarks/tensorrt_rtx.py puts in the place of a GPU and its driver, so that TensorRT-RTX's plug-in compiles
 * without them. With CUDA_RUNTIME: of the CUDA runtime, the functions that must do more than return 0; device memory is
 * host memory. Without: a plug-in around the plug-in (PLUGIN), which shows it a GPU that ONNX Runtime does not find. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef CUDA_RUNTIME

static int given(void **target, void *value) { *target = value; return 0; }

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDeviceGetByPCIBusId(int *device, const char *bus) { *device = 0; return 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) { *value = 0; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13040; return 0; }
int cudaGetDeviceProperties(char *properties, int device)
{
    memset(properties, 0, 1008); /* cudaDeviceProp of CUDA 13; major and minor in it */
    ((int *)properties)[90] = MAJOR;
    ((int *)properties)[91] = MINOR;
    return 0;
}
int cudaMalloc(void **memory, size_t size) { return given(memory, malloc(size)); }
int cudaMallocHost(void **memory, size_t size) { return given(memory, malloc(size)); }
int cudaHostAlloc(void **memory, size_t size, unsigned flags) { return given(memory, malloc(size)); }
int cudaFree(void *memory) { free(memory); return 0; }
int cudaFreeHost(void *memory) { free(memory); return 0; }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { memcpy(to, from, size); return 0; }
int cudaMemPoolCreate(void **pool, const void *properties) { return given(pool, &given); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return given(stream, &given); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return given(event, &given); }
const char *cudaGetErrorString(int error) { return "there is no GPU"; }
const char *cudaGetErrorName(int error) { return "there is no GPU"; }

#else

#include <dlfcn.h>

/* Places in ONNX Runtime's tables of functions. They do not change from one version to the next. */
enum { CREATE_PAIRS = 295, ADD_PAIR = 296, GET_EP_API = 317 }; /* OrtApi */
enum { CREATE_HARDWARE_DEVICE = 16 };                           /* OrtEpApi */
enum { GET_SUPPORTED_DEVICES = 3 };                             /* OrtEpFactory */
enum { GPU = 1, NVIDIA = 0x10de };

typedef struct { void **(*get_api)(uint32_t version); } Base;
typedef void *Create(const char *name, const Base *base, const void *logger, void ***factories, size_t most, size_t *count);
typedef void *Supported(void *factory, const void *const *devices, size_t count, void **found, size_t most, size_t *found_count);

static void **api;
static Supported *asked;

static void *supported(void *factory, const void *const *devices, size_t count, void **found, size_t most, size_t *found_count)
{
    void *about = NULL, *device = NULL;
    void **ep_api = ((void **(*)(void))api[GET_EP_API])();
    ((void (*)(void **))api[CREATE_PAIRS])(&about);
    ((void (*)(void *, const char *, const char *))api[ADD_PAIR])(about, "pci_bus_id", "0000:01:00.0");
    void *status = ((void *(*)(int, uint32_t, uint32_t, const char *, void *, void **))ep_api[CREATE_HARDWARE_DEVICE])(
        GPU, NVIDIA, 0, "NVIDIA", about, &device);
    return status ? status : asked(factory, (const void *const *)&device, 1, found, most, found_count);
}

static void *of_plugin(const char *name) { return dlsym(dlopen(PLUGIN, RTLD_NOW), name); }

void *CreateEpFactories(const char *name, const Base *base, const void *logger, void ***factories, size_t most, size_t *count)
{
    void *status = ((Create *)of_plugin("CreateEpFactories"))(name, base, logger, factories, most, count);
    if (status == NULL) {
        api = base->get_api(24);
        asked = (Supported *)factories[0][GET_SUPPORTED_DEVICES];
        factories[0][GET_SUPPORTED_DEVICES] = (void *)supported;
    }
    return status;
}

void *ReleaseEpFactory(void *factory) { return ((void *(*)(void *))of_plugin("ReleaseEpFactory"))(factory); }

#endif
