/* CUDA's runtime without a GPU, for cuda_without_gpu.py: device memory is memory of the host, kernels do nothing, and
   what is asked for is counted. Numbers of attributes and places in cudaDeviceProp are those of CUDA 12 and 13. */
#include <stdlib.h>
#include <string.h>

typedef void *handle;

long stub_kernels, stub_captures, stub_graph_launches, stub_copies, stub_device_waits, stub_pinned;
static long next = 0x1000;
static int capturing;

static int new_handle(handle *made) { *made = (handle)(next += 16); return 0; }

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
const char *cudaGetErrorString(int error) { return error ? "a stub's error" : "no error"; }
const char *cudaGetErrorName(int error) { return cudaGetErrorString(error); }

int cudaGetDeviceProperties(char *properties, int device) {
  memset(properties, 0, 512);
  strcpy(properties, "stub");
  *(size_t *)(properties + 288) = 8ul << 30; /* totalGlobalMem */
  *(size_t *)(properties + 296) = 49152;     /* sharedMemPerBlock */
  *(int *)(properties + 308) = 32;           /* warpSize */
  *(int *)(properties + 320) = 1024;         /* maxThreadsPerBlock */
  *(int *)(properties + 360) = 8;            /* major */
  *(int *)(properties + 364) = 6;            /* minor */
  *(int *)(properties + 384) = 16;           /* multiProcessorCount */
  return 0;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 8 : attribute == 76 ? 6 : attribute == 16 ? 16 : attribute == 10 ? 32 : 1024;
  return 0;
}

int cudaMemGetInfo(size_t *free_bytes, size_t *total) { *free_bytes = 6ul << 30; *total = 8ul << 30; return 0; }
int cudaMalloc(void **memory, size_t size) { *memory = aligned_alloc(512, (size + 511) / 512 * 512); return *memory ? 0 : 2; }
int cudaFree(void *memory) { free(memory); return 0; }
int cudaHostAlloc(void **memory, size_t size, unsigned flags) { stub_pinned++; return cudaMalloc(memory, size); }
int cudaMallocHost(void **memory, size_t size) { return cudaHostAlloc(memory, size, 0); }
int cudaFreeHost(void *memory) { stub_pinned--; free(memory); return 0; }
int cudaMemPoolCreate(void *pool, void *properties) { return 801; } /* not supported */

int cudaMemcpy(void *to, const void *from, size_t size, int kind) { stub_copies++; memmove(to, from, size); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, handle stream) {
  return cudaMemcpy(to, from, size, kind);
}
int cudaMemset(void *to, int value, size_t size) { memset(to, value, size); return 0; }
int cudaMemsetAsync(void *to, int value, size_t size, handle stream) { return cudaMemset(to, value, size); }

int cudaStreamCreate(handle *stream) { return new_handle(stream); }
int cudaStreamCreateWithFlags(handle *stream, unsigned flags) { return new_handle(stream); }
int cudaEventCreate(handle *event) { return new_handle(event); }
int cudaEventCreateWithFlags(handle *event, unsigned flags) { return new_handle(event); }
int cudaDeviceSynchronize(void) { stub_device_waits++; return 0; }

int cudaStreamBeginCapture(handle stream, int mode) { capturing = 1; stub_captures++; return 0; }
int cudaStreamEndCapture(handle stream, handle *graph) { capturing = 0; return new_handle(graph); }
int cudaStreamIsCapturing(handle stream, int *status) { *status = capturing; return 0; }
int cudaGraphInstantiate(handle *made, handle graph, void *node, void *log, size_t size) { *made = graph; return 0; }
int cudaGraphLaunch(handle graph, handle stream) { stub_graph_launches++; return 0; }

int cudaLaunchKernel(void) { stub_kernels++; return 0; }
int __cudaLaunchKernel(void) { stub_kernels++; return 0; }
int cudaLaunchKernelExC(void) { stub_kernels++; return 0; }
void **__cudaRegisterFatBinary(void *binary) { static void *registered[4]; return registered; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, void *f, int threads, size_t n, unsigned flags) {
  *blocks = 2;
  return 0;
}
int cudaGetDriverEntryPointByVersion(const char *name, void **entry, unsigned version, unsigned long flags, int *found) {
  *entry = 0;
  if (found) *found = 1;
  return 0;
}
