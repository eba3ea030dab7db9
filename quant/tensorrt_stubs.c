/* Stand-ins for the libraries that ONNX Runtime's TensorRT provider is linked with, as far as it needs them to show what
   it gives to TensorRT's parser: handed_on.py compiles this once for each library. No CUDA and no TensorRT is here. */

#include <stdlib.h>
#include <unistd.h>

#ifdef CUDA_RUNTIME
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaMalloc(void **memory, size_t bytes) { *memory = malloc(bytes); return 0; }
#endif

#ifdef INFER
/* An object with TensorRT's layout (methods, then what these forward to), all of whose methods return it. */
static struct { void **methods; void *inner; } object;
static void *methods[512];
static void *itself(void) { return &object; }
static void *make(void) {
    for (int index = 0; index < 512; index++) methods[index] = (void *)itself;
    object.methods = methods;
    object.inner = &object;
    return &object;
}
void *createInferBuilder_INTERNAL(void *logger, int version) { return make(); }
void *createInferRuntime_INTERNAL(void *logger, int version) { return make(); }
void *createInferRefitter_INTERNAL(void *engine, void *logger, int version) { return make(); }
void *getPluginRegistry(void) { return make(); }
int getInferLibVersion(void) { return 101401; }
#endif

#ifdef PARSER
/* What the parser is for has been written by then. */
void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) { _exit(0); }
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version) { _exit(1); }
#endif
