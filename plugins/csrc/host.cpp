// A thin host: what TensorRT does with a plugin, without TensorRT, as functions of C for plugins/host.py. One thread.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::IDimensionExpr;
using nvinfer1::IPluginV3;
using nvinfer1::PluginField;
using nvinfer1::PluginTensorDesc;

namespace
{

std::string gMessage; // of the last failure

class Logger : public nvinfer1::ILogger
{
    void log(Severity, char const* message) noexcept override
    {
        gMessage = message;
    }
} gLogger;

class Finder : public nvinfer1::ILoggerFinder
{
public:
    nvinfer1::ILogger* findLogger() override
    {
        return &gLogger;
    }
} gFinder;

// A dimension: a number, or unknown (below 0).
class Dimension : public IDimensionExpr, public nvinfer1::apiv::VDimensionExpr
{
public:
    explicit Dimension(int64_t value)
        : mValue(value)
    {
        mImpl = this;
    }
    bool isConstant() const noexcept override
    {
        return mValue >= 0;
    }
    int64_t getConstantValue() const noexcept override
    {
        return mValue >= 0 ? mValue : std::numeric_limits<int64_t>::min();
    }
    bool isSizeTensor() const noexcept override
    {
        return false;
    }

private:
    int64_t mValue;
};

class Builder : public nvinfer1::IExprBuilder, public nvinfer1::apiv::VExprBuilder
{
public:
    Builder()
    {
        mImpl = this;
    }
    IDimensionExpr const* constant(int64_t value) noexcept override
    {
        mOwned.push_back(std::make_unique<Dimension>(value));
        return mOwned.back().get();
    }
    IDimensionExpr const* operation(
        nvinfer1::DimensionOperation op, IDimensionExpr const& first, IDimensionExpr const& second) noexcept override
    {
        using nvinfer1::DimensionOperation;
        if (!first.isConstant() || !second.isConstant())
        {
            return constant(-1);
        }
        int64_t const a = first.getConstantValue(), b = second.getConstantValue();
        switch (op)
        {
        case DimensionOperation::kSUM: return constant(a + b);
        case DimensionOperation::kSUB: return constant(a - b);
        case DimensionOperation::kPROD: return constant(a * b);
        case DimensionOperation::kFLOOR_DIV: return constant(a / b);
        case DimensionOperation::kCEIL_DIV: return constant((a + b - 1) / b);
        default: return nullptr;
        }
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override
    {
        return nullptr;
    }

private:
    std::vector<std::unique_ptr<Dimension>> mOwned;
};

// TensorRT's registry, as far as the library that registers itself needs one.
class Registry : public nvinfer1::IPluginRegistry
{
public:
    bool registerCreator(nvinfer1::IPluginCreatorInterface& creator, char const* space) noexcept override
    {
        mCreators.push_back(&creator);
        return std::strcmp(space, "fastar") == 0;
    }
    nvinfer1::IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept override
    {
        *count = static_cast<int32_t>(mCreators.size());
        return mCreators.data();
    }
    bool registerCreator(nvinfer1::IPluginCreator&, char const*) noexcept override
    {
        return false;
    }
    nvinfer1::IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override
    {
        return nullptr;
    }
    nvinfer1::IPluginCreator* getPluginCreator(char const*, char const*, char const*) noexcept override
    {
        return nullptr;
    }
    void setErrorRecorder(nvinfer1::IErrorRecorder*) noexcept override {}
    nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override
    {
        return nullptr;
    }
    bool deregisterCreator(nvinfer1::IPluginCreator const&) noexcept override
    {
        return false;
    }
    bool isParentSearchEnabled() const override
    {
        return false;
    }
    void setParentSearchEnabled(bool) override {}
    PluginLibraryHandle loadLibrary(char const*) noexcept override
    {
        return nullptr;
    }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}
    nvinfer1::IPluginCreatorInterface* getCreator(char const*, char const*, char const*) noexcept override
    {
        return nullptr;
    }
    bool deregisterCreator(nvinfer1::IPluginCreatorInterface const&) noexcept override
    {
        return false;
    }
    nvinfer1::IPluginResource* acquirePluginResource(char const*, nvinfer1::IPluginResource*) noexcept override
    {
        return nullptr;
    }
    int32_t releasePluginResource(char const*) noexcept override
    {
        return 0;
    }
    nvinfer1::IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* count) noexcept override
    {
        return getAllCreators(count);
    }

private:
    std::vector<nvinfer1::IPluginCreatorInterface*> mCreators;
} gRegistry;

nvinfer1::IPluginV3OneBuildV2* buildOf(IPluginV3* plugin)
{
    return static_cast<nvinfer1::IPluginV3OneBuildV2*>(
        plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
}

nvinfer1::IPluginV3OneRuntime* runtimeOf(IPluginV3* plugin)
{
    return static_cast<nvinfer1::IPluginV3OneRuntime*>(
        plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
}

std::vector<PluginTensorDesc> describe(
    int32_t count, int32_t const* types, int32_t const* formats, int32_t const* ranks, int64_t const* dims)
{
    std::vector<PluginTensorDesc> all(count);
    for (int32_t at = 0; at < count; ++at)
    {
        all[at].type = static_cast<DataType>(types[at]);
        all[at].format = static_cast<nvinfer1::TensorFormat>(formats == nullptr ? 0 : formats[at]);
        all[at].dims.nbDims = ranks[at];
        for (int32_t axis = 0; axis < ranks[at]; ++axis)
        {
            all[at].dims.d[axis] = *dims++;
        }
    }
    return all;
}

} // namespace

#define API extern "C" __attribute__((visibility("default")))

using Creators = nvinfer1::IPluginCreatorInterface* const*;

// The last message of a plugin, or of this file.
API char const* host_message()
{
    return gMessage.c_str();
}

// TensorRT's two functions that the library which registers itself calls, where this one is loaded globally.
API nvinfer1::IPluginRegistry* getPluginRegistry() noexcept
{
    return &gRegistry;
}

API int32_t getInferLibVersion() noexcept
{
    return NV_TENSORRT_MAJOR * 10000;
}

// What has registered itself.
API Creators host_registered(int32_t* count)
{
    return gRegistry.getAllCreators(count);
}

// Opens a plugin library: its creators, and how many; nullptr where that fails.
API Creators host_open(char const* path, int32_t* count)
{
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
    {
        gMessage = dlerror();
        return nullptr;
    }
    auto const get = reinterpret_cast<Creators (*)(int32_t&)>(dlsym(library, "getCreators"));
    auto const set = reinterpret_cast<void (*)(nvinfer1::ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    if (get == nullptr || set == nullptr)
    {
        gMessage = std::string(path) + " has no getCreators or no setLoggerFinder";
        return nullptr;
    }
    set(&gFinder);
    return get(*count);
}

API void host_creator(Creators creators, int32_t at, char const** name, char const** version, char const** space,
    PluginField const** fields, int32_t* nbFields)
{
    auto* const creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[at]);
    *name = creator->getPluginName();
    *version = creator->getPluginVersion();
    *space = creator->getPluginNamespace();
    *fields = creator->getFieldNames()->fields;
    *nbFields = creator->getFieldNames()->nbFields;
}

// phase: 0 build, 1 runtime. nullptr where the creator refuses.
API IPluginV3* host_create(Creators creators, int32_t at, PluginField const* fields, int32_t nbFields, int32_t phase)
{
    auto* const creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[at]);
    nvinfer1::PluginFieldCollection const collection{nbFields, fields};
    return creator->createPlugin(creator->getPluginName(), &collection, static_cast<nvinfer1::TensorRTPhase>(phase));
}

API IPluginV3* host_clone(IPluginV3* plugin)
{
    return plugin->clone();
}

API void host_destroy(IPluginV3* plugin)
{
    delete plugin;
}

API int32_t host_outputs(IPluginV3* plugin)
{
    return buildOf(plugin)->getNbOutputs();
}

API int32_t host_alias(IPluginV3* plugin, int32_t output)
{
    return buildOf(plugin)->getAliasedInput(output);
}

API int32_t host_fields(IPluginV3* plugin, PluginField const** fields)
{
    nvinfer1::PluginFieldCollection const* const all = runtimeOf(plugin)->getFieldsToSerialize();
    *fields = all->fields;
    return all->nbFields;
}

API int32_t host_types(IPluginV3* plugin, int32_t const* in, int32_t nbInputs, int32_t* out, int32_t nbOutputs)
{
    std::vector<DataType> inputs(nbInputs), outputs(nbOutputs);
    for (int32_t at = 0; at < nbInputs; ++at)
    {
        inputs[at] = static_cast<DataType>(in[at]);
    }
    int32_t const result = buildOf(plugin)->getOutputDataTypes(outputs.data(), nbOutputs, inputs.data(), nbInputs);
    for (int32_t at = 0; at < nbOutputs; ++at)
    {
        out[at] = static_cast<int32_t>(outputs[at]);
    }
    return result;
}

// dims: of all inputs, one after the other; below 0: unknown. outRanks, outDims (8 for each output): written.
API int32_t host_shapes(IPluginV3* plugin, int32_t const* ranks, int64_t const* dims, int32_t nbInputs,
    int32_t* outRanks, int64_t* outDims, int32_t nbOutputs)
{
    Builder builder;
    nvinfer1::IExprBuilder& base = builder;
    std::vector<DimsExprs> inputs(nbInputs), outputs(nbOutputs);
    for (int32_t at = 0; at < nbInputs; ++at)
    {
        inputs[at].nbDims = ranks[at];
        for (int32_t axis = 0; axis < ranks[at]; ++axis)
        {
            inputs[at].d[axis] = base.constant(*dims++);
        }
    }
    int32_t const result
        = buildOf(plugin)->getOutputShapes(inputs.data(), nbInputs, nullptr, 0, outputs.data(), nbOutputs, base);
    for (int32_t at = 0; result == 0 && at < nbOutputs; ++at)
    {
        outRanks[at] = outputs[at].nbDims;
        for (int32_t axis = 0; axis < outputs[at].nbDims; ++axis)
        {
            IDimensionExpr const& dim = *outputs[at].d[axis];
            outDims[at * 8 + axis] = dim.isConstant() ? dim.getConstantValue() : -1;
        }
    }
    return result;
}

// Of inputs and outputs together; ranks and dims may be nullptr where `count` descriptions need none.
API int32_t host_supports(
    IPluginV3* plugin, int32_t at, int32_t const* types, int32_t const* formats, int32_t nbInputs, int32_t nbOutputs)
{
    std::vector<nvinfer1::DynamicPluginTensorDesc> all(nbInputs + nbOutputs);
    for (std::size_t each = 0; each < all.size(); ++each)
    {
        all[each].desc.type = static_cast<DataType>(types[each]);
        all[each].desc.format = static_cast<nvinfer1::TensorFormat>(formats[each]);
    }
    return buildOf(plugin)->supportsFormatCombination(at, all.data(), nbInputs, nbOutputs) ? 1 : 0;
}

API int32_t host_configure(IPluginV3* plugin, int32_t const* types, int32_t const* ranks, int64_t const* dims,
    int32_t nbInputs, int32_t nbOutputs)
{
    std::vector<PluginTensorDesc> const all = describe(nbInputs + nbOutputs, types, nullptr, ranks, dims);
    std::vector<nvinfer1::DynamicPluginTensorDesc> dynamic(all.size());
    for (std::size_t at = 0; at < all.size(); ++at)
    {
        dynamic[at] = {all[at], all[at].dims, all[at].dims, all[at].dims};
    }
    return buildOf(plugin)->configurePlugin(dynamic.data(), nbInputs, dynamic.data() + nbInputs, nbOutputs);
}

// onShapeChange, which loads the kernel; then, if `pointers` is not nullptr, enqueue: of inputs, then outputs.
API int32_t host_run(IPluginV3* plugin, int32_t const* types, int32_t const* ranks, int64_t const* dims,
    int32_t nbInputs, int32_t nbOutputs, void* const* pointers, void* stream)
{
    std::vector<PluginTensorDesc> const all = describe(nbInputs + nbOutputs, types, nullptr, ranks, dims);
    PluginTensorDesc const* const out = all.data() + nbInputs;
    if (pointers == nullptr)
    {
        return runtimeOf(plugin)->onShapeChange(all.data(), nbInputs, out, nbOutputs);
    }
    return runtimeOf(plugin)->enqueue(
        all.data(), out, pointers, pointers + nbInputs, nullptr, static_cast<cudaStream_t>(stream));
}
