// Stands in for CUDA's driver, libcuda.so.1: keeps what was launched last, for tests on machines without a GPU.
// FAKE_ARCH: the compute capability of its device, as 90. One thread.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char* kinds = ""; // of the parameters of the next launch: P a pointer, I an int32
static char launched[4096];
static int loads;

struct function
{
    const char* name;
    int shared; // that it may have
};

void fake_expect(const char* parameters) { kinds = strdup(parameters); }
const char* fake_launched(void) { return launched; }
int fake_loads(void) { return loads; }

int cuInit(unsigned flags) { return flags; }
int cuGetErrorString(int error, const char** text) { *text = error == 999 ? "made up" : "other"; return 0; }
int cuCtxGetCurrent(void** context) { *context = &loads; return 0; }
int cuCtxGetDevice(int* device) { *device = 0; return 0; }

int cuDeviceGetAttribute(int* value, int attribute, int device)
{
    int arch = atoi(getenv("FAKE_ARCH"));
    *value = attribute == 75 ? arch / 10 : arch % 10; // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
    return device;
}

int cuModuleLoadData(void** module, const void* image)
{
    ++loads;
    *module = (void*)image;
    return memcmp(image, "\177ELF", 4) ? 200 : 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name)
{
    struct function* made = malloc(sizeof *made);
    made->name = strdup(name);
    made->shared = 48 * 1024;
    *function = made;
    return module == 0;
}

int cuFuncSetAttribute(struct function* function, int attribute, int value)
{
    if (attribute == 8) // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        function->shared = value;
    return 0;
}

int cuLaunchKernel(struct function* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz,
    unsigned shared, void* stream, void** parameters, void** extra)
{
    if (getenv("FAKE_FAILURE"))
        return 999;
    int at = sprintf(launched, "%s %u %u %u %u %u %u %u %d %d %p", function->name, x, y, z, threads, ty, tz, shared,
        shared <= (unsigned)function->shared, extra == 0, stream);
    for (int i = 0; kinds[i]; ++i)
        at += kinds[i] == 'P' ? sprintf(launched + at, " %ld", *(long*)parameters[i])
                              : sprintf(launched + at, " %d", *(int*)parameters[i]);
    return 0;
}
