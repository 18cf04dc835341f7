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

bool registerAll()
{
    auto const getRegistry
        = reinterpret_cast<nvinfer1::IPluginRegistry* (*) ()>(findInTensorRT("getPluginRegistry"));
    auto const getVersion = reinterpret_cast<int32_t (*)()>(findInTensorRT("getInferLibVersion"));
    if (getRegistry == nullptr || getVersion == nullptr)
    {
        std::fprintf(stderr, "fastar: plugins are not registered: this process has no TensorRT loaded\n");
        return false;
    }
    // The registry's functions are called by their places in a class of the headers, which change with the major
    // version, and TensorRT-RTX has its own (its versions count from 1).
    int32_t const version = getVersion();
    if (version / 10000 != NV_TENSORRT_MAJOR)
    {
        std::fprintf(stderr,
            "fastar: plugins are not registered: built with the headers of TensorRT %d, and this process has version "
            "%d; allowed: the same, or loadLibrary with libfastar_plugins.so\n",
            NV_TENSORRT_MAJOR, version);
        return false;
    }
    for (nvinfer1::IPluginCreatorInterface* const creator : fastar::creators())
    {
        if (!getRegistry()->registerCreator(*creator, fastar::kNAMESPACE))
        {
            std::fprintf(stderr, "fastar: TensorRT's registry refused a plugin; is the library loaded already?\n");
            return false;
        }
    }
    return true;
}

[[maybe_unused]] bool const kREGISTERED = registerAll();

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
