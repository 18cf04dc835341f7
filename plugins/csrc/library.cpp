// What the shared library shows. Two forms, as TensorRT's loadLibrary fails on a file that is both:
// - getCreators and setLoggerFinder, for IPluginRegistry::loadLibrary and trtexec --dynamicPlugins;
// - with FASTAR_AUTO, registration as soon as it is opened (dlopen, tritonserver's tensorrt backend: `plugins`).
#include "plugin.h"

#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstdio>
#include <cstring>

namespace fastar
{
namespace
{

std::atomic<nvinfer1::ILoggerFinder*> gFinder{nullptr};

} // namespace

void setFinder(nvinfer1::ILoggerFinder* finder)
{
    gFinder = finder;
}

void report(nvinfer1::ILogger::Severity severity, std::string const& message) noexcept
{
    nvinfer1::ILoggerFinder* const finder = gFinder;
    nvinfer1::ILogger* const logger = finder != nullptr ? finder->findLogger() : nullptr;
    if (logger != nullptr)
    {
        logger->log(severity, message.c_str());
    }
    else
    {
        std::fprintf(stderr, "fastar: %s\n", message.c_str());
    }
}

} // namespace fastar

#ifdef FASTAR_AUTO

namespace
{

// A function of the TensorRT that this process has loaded, whose symbols need not be global.
void* findInTensorRT(char const* name)
{
    if (void* const found = dlsym(RTLD_DEFAULT, name))
    {
        return found;
    }
    struct Search
    {
        char const* name;
        void* found;
    } search{name, nullptr};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            auto& search = *static_cast<Search*>(data);
            char const* const slash = std::strrchr(info->dlpi_name, '/');
            char const* const file = slash != nullptr ? slash + 1 : info->dlpi_name;
            if (std::strncmp(file, "libnvinfer", 10) == 0 || std::strncmp(file, "libtensorrt_rtx", 15) == 0)
            {
                if (void* const library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD))
                {
                    search.found = dlsym(library, search.name);
                    dlclose(library);
                }
            }
            return search.found != nullptr ? 1 : 0;
        },
        &search);
    return search.found;
}

[[maybe_unused]] bool const kREGISTERED = [] {
    using GetRegistry = nvinfer1::IPluginRegistry* (*)();
    auto const getRegistry = reinterpret_cast<GetRegistry>(findInTensorRT("getPluginRegistry"));
    if (getRegistry == nullptr)
    {
        std::fprintf(stderr, "fastar: plugins are not registered: this process has no TensorRT loaded\n");
        return false;
    }
    for (nvinfer1::IPluginCreatorInterface* const creator : fastar::creators())
    {
        if (!getRegistry()->registerCreator(*creator, fastar::kNAMESPACE))
        {
            std::fprintf(stderr, "fastar: TensorRT's registry took not all plugins\n");
            return false;
        }
    }
    return true;
}();

} // namespace

#else

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& nbCreators)
{
    nbCreators = static_cast<int32_t>(fastar::creators().size());
    return fastar::creators().data();
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    fastar::setFinder(finder);
}

#endif
