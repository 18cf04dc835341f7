#include "driver.h"

#include <cuda.h>
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <utility>

namespace fastar
{
namespace
{

struct Driver
{
    decltype(&::cuGetErrorString) getErrorString{};
    decltype(&::cuInit) init{};
    decltype(&::cuCtxGetCurrent) ctxGetCurrent{};
    decltype(&::cuCtxGetDevice) ctxGetDevice{};
    decltype(&::cuDeviceGetAttribute) deviceGetAttribute{};
    decltype(&::cuModuleLoadData) moduleLoadData{};
    decltype(&::cuModuleGetFunction) moduleGetFunction{};
    decltype(&::cuFuncSetAttribute) funcSetAttribute{};
    decltype(&::cuLaunchKernel) launchKernel{};
    std::string missing;

    Driver()
    {
        void* const library = dlopen("libcuda.so.1", RTLD_NOW);
        if (library == nullptr)
        {
            missing = "no CUDA driver: libcuda.so.1 cannot be loaded";
            return;
        }
        auto const find = [&](auto& function, char const* name) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
            if (function == nullptr)
            {
                missing = std::string("the CUDA driver has no ") + name;
            }
        };
        find(getErrorString, "cuGetErrorString");
        find(init, "cuInit");
        find(ctxGetCurrent, "cuCtxGetCurrent");
        find(ctxGetDevice, "cuCtxGetDevice");
        find(deviceGetAttribute, "cuDeviceGetAttribute");
        find(moduleLoadData, "cuModuleLoadData");
        find(moduleGetFunction, "cuModuleGetFunction");
        find(funcSetAttribute, "cuFuncSetAttribute");
        find(launchKernel, "cuLaunchKernel");
        if (missing.empty() && init(0) != CUDA_SUCCESS)
        {
            missing = "the CUDA driver finds no device";
        }
    }

    std::string failure(char const* what, CUresult result) const
    {
        char const* text = nullptr;
        getErrorString(result, &text);
        return std::string(what) + ": " + (text != nullptr ? text : "unknown error");
    }
};

Driver const& driver()
{
    static Driver const found;
    return found;
}

// The kernel in the current context, loaded there once.
std::string functionOf(Kernel const& kernel, CUfunction& function)
{
    static std::mutex mutex;
    static std::map<std::pair<CUcontext, Kernel const*>, CUfunction> loaded;

    Driver const& cuda = driver();
    if (!cuda.missing.empty())
    {
        return cuda.missing;
    }
    CUcontext context{};
    CUresult result = cuda.ctxGetCurrent(&context);
    if (result != CUDA_SUCCESS || context == nullptr)
    {
        return "no CUDA context is current";
    }
    std::lock_guard<std::mutex> const lock(mutex);
    auto const found = loaded.find({context, &kernel});
    if (found != loaded.end())
    {
        function = found->second;
        return "";
    }
    CUmodule module{};
    result = cuda.moduleLoadData(&module, kernel.cubin);
    if (result != CUDA_SUCCESS)
    {
        return cuda.failure("cuModuleLoadData", result);
    }
    result = cuda.moduleGetFunction(&function, module, kernel.name);
    if (result != CUDA_SUCCESS)
    {
        return cuda.failure("cuModuleGetFunction", result);
    }
    if (kernel.shared > 48 * 1024) // more than a launch gets unasked
    {
        result = cuda.funcSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.shared);
        if (result != CUDA_SUCCESS)
        {
            return cuda.failure("cuFuncSetAttribute (shared memory)", result);
        }
    }
    loaded[{context, &kernel}] = function;
    return "";
}

} // namespace

int32_t currentArch()
{
    Driver const& cuda = driver();
    CUcontext context{};
    CUdevice device{};
    int major = 0, minor = 0;
    if (!cuda.missing.empty() || cuda.ctxGetCurrent(&context) != CUDA_SUCCESS || context == nullptr
        || cuda.ctxGetDevice(&device) != CUDA_SUCCESS
        || cuda.deviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device) != CUDA_SUCCESS
        || cuda.deviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device) != CUDA_SUCCESS)
    {
        return 0;
    }
    return major * 10 + minor;
}

std::string load(Kernel const& kernel)
{
    CUfunction function{};
    return functionOf(kernel, function);
}

std::string launch(Kernel const& kernel, uint32_t x, uint32_t y, void** arguments, CUstream_st* stream)
{
    CUfunction function{};
    std::string const wrong = functionOf(kernel, function);
    if (!wrong.empty())
    {
        return wrong;
    }
    CUresult const result = driver().launchKernel(
        function, x, y, 1, 32 * kernel.warps, 1, 1, kernel.shared, stream, arguments, nullptr);
    return result == CUDA_SUCCESS ? "" : driver().failure("cuLaunchKernel", result);
}

} // namespace fastar
