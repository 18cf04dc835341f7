#include "plugin.h"

#include "driver.h"

#include <cmath>
#include <limits>
#include <utility>

namespace fastar
{

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IDimensionExpr;
using nvinfer1::PluginTensorDesc;
using Severity = nvinfer1::ILogger::Severity;

namespace
{

// Expressions over TensorRT's own, which are unknown until a profile or a run says more.
struct Symbolic
{
    Operator const& op;
    DimsExprs const* inputs;
    std::vector<double> const& known;
    nvinfer1::IExprBuilder& builder;

    IDimensionExpr const* constant(int64_t value) const
    {
        return builder.constant(value);
    }
    IDimensionExpr const* symbol(int32_t at) const
    {
        Symbol const& symbol = op.symbols[at];
        return symbol.source == Symbol::Source::kDIM ? inputs[symbol.at].d[symbol.axis]
                                                     : builder.constant(static_cast<int64_t>(known[at]));
    }
    IDimensionExpr const* apply(char op, IDimensionExpr const* first, IDimensionExpr const* second) const
    {
        using nvinfer1::DimensionOperation;
        DimensionOperation const operation = op == '+' ? DimensionOperation::kSUM
            : op == '-'                                ? DimensionOperation::kSUB
            : op == '*'                                ? DimensionOperation::kPROD
            : op == '/'                                ? DimensionOperation::kFLOOR_DIV
                                                       : DimensionOperation::kCEIL_DIV;
        return builder.operation(operation, *first, *second);
    }
};

// What TensorRT is answered: 0, or -1 and the error in its log.
template <typename Work>
int32_t guarded(Work const& work) noexcept
{
    try
    {
        work();
        return 0;
    }
    catch (std::exception const& error)
    {
        report(Severity::kERROR, error.what());
        return -1;
    }
}

} // namespace

Fields::Fields(Operator const& op, std::vector<double> const& values)
    : mIntegers(values.size())
    , mFractions(values.size())
{
    for (std::size_t at = 0; at < values.size(); ++at)
    {
        bool const fraction = op.attributes[at].type == Attribute::Type::kFLOAT;
        mIntegers[at] = fraction ? 0 : static_cast<int32_t>(values[at]);
        mFractions[at] = static_cast<float>(values[at]);
        void const* const data = fraction ? static_cast<void const*>(&mFractions[at]) : &mIntegers[at];
        mFields.emplace_back(op.attributes[at].name.c_str(), data,
            fraction ? nvinfer1::PluginFieldType::kFLOAT32 : nvinfer1::PluginFieldType::kINT32, 1);
    }
    mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
}

Plugin::Plugin(int32_t op, std::vector<double> attributes)
    : mIndex(op)
    , mOperator(operators()[op])
    , mAttributes(std::move(attributes))
    , mFields(mOperator, mAttributes)
{
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept
{
    try
    {
        auto* const copy = new Plugin(mIndex, mAttributes);
        copy->mType = mType;
        return copy;
    }
    catch (std::exception const& error)
    {
        report(Severity::kERROR, error.what());
        return nullptr;
    }
}

char const* Plugin::getPluginName() const noexcept
{
    return mOperator.name.c_str();
}

char const* Plugin::getPluginVersion() const noexcept
{
    return kVERSION;
}

char const* Plugin::getPluginNamespace() const noexcept
{
    return kNAMESPACE;
}

int32_t Plugin::getNbOutputs() const noexcept
{
    return static_cast<int32_t>(mOperator.outputs.size());
}

int32_t Plugin::getAliasedInput(int32_t output) noexcept
{
    return output >= 0 && output < getNbOutputs() ? mOperator.outputs[output].alias : -1;
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept
{
    return clone();
}

nvinfer1::PluginFieldCollection const* Plugin::getFieldsToSerialize() noexcept
{
    return mFields.get();
}

int32_t Plugin::getOutputDataTypes(
    DataType* outputs, int32_t nbOutputs, DataType const* inputs, int32_t nbInputs) const noexcept
{
    return guarded([&] {
        mType = checkTypes({inputs, inputs + nbInputs});
        for (int32_t at = 0; at < nbOutputs; ++at)
        {
            Kind const kind = mOperator.outputs.at(at).kind;
            outputs[at] = kind == Kind::kF32 ? DataType::kFLOAT
                : kind == Kind::kI32         ? DataType::kINT32
                                             : kTYPES[mType];
        }
    });
}

int32_t Plugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
    DimsExprs* outputs, int32_t nbOutputs, nvinfer1::IExprBuilder& builder) noexcept
{
    return guarded([&] {
        Shapes shapes(nbInputs);
        for (int32_t at = 0; at < nbInputs; ++at)
        {
            for (int32_t axis = 0; axis < inputs[at].nbDims; ++axis)
            {
                IDimensionExpr const& dim = *inputs[at].d[axis];
                bool const known = dim.isConstant() && dim.getConstantValue() >= 0;
                shapes[at].push_back(known ? static_cast<double>(dim.getConstantValue()) : kUNKNOWN);
            }
        }
        if (shapes.size() != mOperator.inputs.size())
        {
            throw error(std::to_string(nbInputs) + " inputs", std::to_string(mOperator.inputs.size()));
        }
        std::vector<double> const values = checkShapes(shapes, mType);
        choose(mType, 0, values);
        Symbolic const symbolic{mOperator, inputs, values, builder};
        for (int32_t at = 0; at < nbOutputs; ++at)
        {
            std::vector<Expression> const& dims = mOperator.outputs.at(at).dims;
            outputs[at].nbDims = static_cast<int32_t>(dims.size());
            for (std::size_t axis = 0; axis < dims.size(); ++axis)
            {
                outputs[at].d[axis] = evaluate(dims[axis], symbolic);
            }
        }
    });
}

bool Plugin::supportsFormatCombination(
    int32_t at, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept
{
    auto const inputs = static_cast<int32_t>(mOperator.inputs.size());
    if (nbInputs != inputs || nbOutputs != getNbOutputs() || inOut[at].desc.format != nvinfer1::TensorFormat::kLINEAR)
    {
        return false;
    }
    Argument const& argument = at < inputs ? mOperator.inputs[at] : mOperator.outputs[at - inputs];
    DataType const type = inOut[at].desc.type;
    if (argument.kind != Kind::kHALF)
    {
        return type == (argument.kind == Kind::kF32 ? DataType::kFLOAT : DataType::kINT32);
    }
    for (int32_t before = 0; before < at && before < inputs; ++before)
    {
        if (mOperator.inputs[before].kind == Kind::kHALF)
        {
            return type == inOut[before].desc.type;
        }
    }
    for (Kernel const& kernel : kernels())
    {
        if (kernel.op == mIndex && kTYPES[kernel.type] == type)
        {
            return true;
        }
    }
    return false;
}

int32_t Plugin::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs,
    DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept
{
    return guarded([&] {
        std::vector<PluginTensorDesc> inputs, outputs;
        for (int32_t at = 0; at < nbInputs; ++at)
        {
            inputs.push_back(in[at].desc);
        }
        for (int32_t at = 0; at < nbOutputs; ++at)
        {
            outputs.push_back(out[at].desc);
        }
        std::vector<double> values;
        prepare(inputs.data(), nbInputs, outputs.data(), nbOutputs, 0, values);
    });
}

int32_t Plugin::onShapeChange(
    PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const* out, int32_t nbOutputs) noexcept
{
    return guarded([&] {
        std::vector<double> values;
        int32_t const arch = currentArch();
        Kernel const& kernel = prepare(in, nbInputs, out, nbOutputs, arch, values);
        if (arch != 0) // here, as modules cannot be loaded while a graph is captured
        {
            std::string const wrong = load(kernel);
            if (!wrong.empty())
            {
                throw error(wrong, "a GPU that runs its kernel");
            }
        }
    });
}

int32_t Plugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* outputDesc,
    void const* const* inputs, void* const* outputs, void*, cudaStream_t stream) noexcept
{
    return guarded([&] {
        std::vector<double> values;
        auto const nbInputs = static_cast<int32_t>(mOperator.inputs.size());
        Kernel const& kernel
            = prepare(inputDesc, nbInputs, outputDesc, getNbOutputs(), currentArch(), values);
        std::vector<void const*> pointers(inputs, inputs + nbInputs);
        std::vector<int32_t> extras;
        for (Expression const& expression : mOperator.extras)
        {
            double const value = evaluate(expression, Numbers{values});
            if (std::abs(value) > std::numeric_limits<int32_t>::max())
            {
                throw error("a size of " + text(value), "what fits 32 bits");
            }
            extras.push_back(static_cast<int32_t>(value));
        }
        for (int32_t at = 0; at < getNbOutputs(); ++at)
        {
            Argument const& argument = mOperator.outputs[at];
            if (argument.alias >= 0 && outputs[at] != inputs[argument.alias])
            {
                throw error(argument.name + ": another address than that of " + mOperator.inputs[argument.alias].name,
                    "the same, as it is changed in place (PreviewFeature ALIASED_PLUGIN_IO_10_03)");
            }
            pointers.push_back(outputs[at]);
        }
        std::vector<void*> arguments;
        for (std::size_t at = 0; at < pointers.size(); ++at)
        {
            if (reinterpret_cast<uintptr_t>(pointers[at]) % 16 != 0)
            {
                bool const input = at < mOperator.inputs.size();
                throw error((input ? mOperator.inputs[at] : mOperator.outputs[at - nbInputs]).name
                        + ": an address that is not aligned",
                    "multiples of 16 bytes");
            }
            if (at == mOperator.inputs.size())
            {
                for (int32_t& extra : extras)
                {
                    arguments.push_back(&extra);
                }
            }
            arguments.push_back(&pointers[at]);
        }
        double const x = evaluate(mOperator.grid[0], Numbers{values});
        double const y = evaluate(mOperator.grid[1], Numbers{values});
        if (x > std::numeric_limits<int32_t>::max() || y > 65535)
        {
            throw error("a grid of " + text(x) + " x " + text(y), "up to 2147483647 x 65535");
        }
        if (x < 1 || y < 1) // nothing to do
        {
            return;
        }
        std::string const wrong
            = launch(kernel, static_cast<uint32_t>(x), static_cast<uint32_t>(y), arguments.data(), stream);
        if (!wrong.empty())
        {
            throw error(wrong, "a GPU that runs its kernel");
        }
    });
}

} // namespace fastar
