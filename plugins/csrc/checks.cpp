// What a plugin checks, of which messages name operator, argument, what it is and what is allowed.
#include "plugin.h"

#include <cmath>
#include <cstdio>
#include <set>

namespace fastar
{

using nvinfer1::DataType;
using nvinfer1::PluginTensorDesc;

namespace
{

char const* nameOf(DataType type)
{
    switch (type)
    {
    case DataType::kHALF: return "float16";
    case DataType::kBF16: return "bfloat16";
    case DataType::kFLOAT: return "float32";
    case DataType::kINT32: return "int32";
    case DataType::kINT64: return "int64";
    case DataType::kINT8: return "int8";
    case DataType::kBOOL: return "bool";
    default: return "another type";
    }
}

template <class Items>
std::string listed(Items const& items)
{
    std::string all;
    for (auto const& item : items)
    {
        all += (all.empty() ? "" : ", ") + item;
    }
    return all.empty() ? "none" : all;
}

std::string capability(int32_t arch)
{
    return std::to_string(arch / 10) + "." + std::to_string(arch % 10);
}

std::vector<double> shapeOf(nvinfer1::Dims const& dims)
{
    std::vector<double> shape;
    for (int32_t axis = 0; axis < dims.nbDims; ++axis)
    {
        shape.push_back(dims.d[axis] < 0 ? kUNKNOWN : static_cast<double>(dims.d[axis]));
    }
    return shape;
}

} // namespace

double Numbers::apply(char op, double first, double second) const
{
    switch (op)
    {
    case '+': return first + second;
    case '-': return first - second;
    case '*': return first * second;
    case '/': return std::floor(first / second);
    default: return std::ceil(first / second);
    }
}

std::string text(double value)
{
    char digits[32];
    std::snprintf(digits, sizeof digits, "%.9g", value);
    return digits;
}

std::invalid_argument Plugin::error(std::string const& what, std::string const& allowed) const
{
    return std::invalid_argument(mOperator.name + ": " + what + "; allowed: " + allowed);
}

// Values by symbol, of which only attributes and block sizes are known.
std::vector<double> Plugin::unknowns(int32_t type) const
{
    std::vector<double> values;
    for (Symbol const& symbol : mOperator.symbols)
    {
        values.push_back(symbol.source == Symbol::Source::kDIM ? kUNKNOWN
                : symbol.source == Symbol::Source::kATTRIBUTE  ? mAttributes[symbol.at]
                                                               : mOperator.tiles[type == kWIDE][symbol.at]);
    }
    return values;
}

// The network's type, as in Kernel.
int32_t Plugin::checkTypes(std::vector<DataType> const& inputs) const
{
    if (inputs.size() != mOperator.inputs.size())
    {
        std::vector<std::string> names;
        for (Argument const& argument : mOperator.inputs)
        {
            names.push_back(argument.name);
        }
        throw error(std::to_string(inputs.size()) + " inputs", std::to_string(names.size()) + ": " + listed(names));
    }
    std::set<int32_t> compiled;
    std::set<std::string> compiledNames;
    for (Kernel const& kernel : kernels())
    {
        if (kernel.op == mIndex && kernel.type >= 0)
        {
            compiled.insert(kernel.type);
            compiledNames.insert(nameOf(kTYPES[kernel.type]));
        }
    }
    int32_t type = -1;
    std::string first;
    for (std::size_t at = 0; at < inputs.size(); ++at)
    {
        Argument const& argument = mOperator.inputs[at];
        std::string const is = argument.name + ": type " + nameOf(inputs[at]);
        if (argument.kind != Kind::kHALF)
        {
            DataType const wanted = argument.kind == Kind::kF32 ? DataType::kFLOAT : DataType::kINT32;
            if (inputs[at] != wanted)
            {
                throw error(is, nameOf(wanted));
            }
        }
        else if (type >= 0)
        {
            if (inputs[at] != kTYPES[type])
            {
                throw error(is, std::string(nameOf(kTYPES[type])) + ", the type of " + first);
            }
        }
        else
        {
            for (int32_t const each : compiled)
            {
                type = inputs[at] == kTYPES[each] ? each : type;
            }
            if (type < 0)
            {
                throw error(is, listed(compiledNames) + ", as compiled into this library");
            }
            first = argument.name;
        }
    }
    return type;
}

// Values by symbol, with the table's block sizes for `type`.
std::vector<double> Plugin::checkShapes(Shapes const& inputs, int32_t type) const
{
    for (std::size_t at = 0; at < inputs.size(); ++at)
    {
        Argument const& argument = mOperator.inputs[at];
        if (inputs[at].size() != argument.dims.size())
        {
            throw error(argument.name + ": rank " + std::to_string(inputs[at].size()),
                std::to_string(argument.dims.size()) + " [" + argument.text + "]");
        }
    }
    std::vector<double> values = unknowns(type);
    for (std::size_t at = 0; at < values.size(); ++at)
    {
        Symbol const& symbol = mOperator.symbols[at];
        if (symbol.source == Symbol::Source::kDIM)
        {
            values[at] = inputs[symbol.at][symbol.axis];
        }
    }
    for (std::size_t at = 0; at < inputs.size(); ++at)
    {
        Argument const& argument = mOperator.inputs[at];
        for (std::size_t axis = 0; axis < argument.dims.size(); ++axis)
        {
            double const is = inputs[at][axis], wanted = evaluate(argument.dims[axis], Numbers{values});
            if (!std::isnan(is) && !std::isnan(wanted) && is != wanted)
            {
                throw error(argument.name + ": dimension " + std::to_string(axis) + " is " + text(is),
                    text(wanted) + ", for [" + argument.text + "]");
            }
        }
    }
    for (Bound const& bound : mOperator.bounds)
    {
        double const is = evaluate(bound.value, Numbers{values}), other = evaluate(bound.other, Numbers{values});
        if (bound.divides ? std::fmod(is, other) != 0 && !std::isnan(is) && !std::isnan(other) : is > other)
        {
            throw error(bound.valueText + " is " + text(is),
                (bound.divides ? "a multiple of " : "at most ") + text(other) + ", which is " + bound.otherText);
        }
    }
    return values;
}

// A kernel for `type` and `arch` (-1, 0: any) and constants that follow from `values`.
Kernel const& Plugin::choose(int32_t type, int32_t arch, std::vector<double> const& values) const
{
    std::vector<double> constants;
    for (Expression const& expression : mOperator.constants)
    {
        constants.push_back(evaluate(expression, Numbers{values}));
    }
    std::set<std::string> made, archs;
    for (Kernel const& kernel : kernels())
    {
        if (kernel.op != mIndex || (type >= 0 && kernel.type >= 0 && kernel.type != type))
        {
            continue;
        }
        bool fits = true;
        std::string wording;
        for (std::size_t at = 0; at < constants.size(); ++at)
        {
            auto const is = static_cast<float>(constants[at]), has = static_cast<float>(kernel.constants[at]);
            fits = fits && (std::isnan(is) || is == has);
            wording += (at > 0 ? " " : "") + mOperator.constantNames[at] + "=" + text(kernel.constants[at]);
        }
        made.insert(wording);
        if (fits && (arch == 0 || kernel.arch == arch))
        {
            return kernel;
        }
        if (fits)
        {
            archs.insert(capability(kernel.arch));
        }
    }
    if (!archs.empty())
    {
        throw error("no kernel for a GPU of compute capability " + capability(arch),
            listed(archs) + ", as compiled into this library");
    }
    std::string wording;
    for (std::size_t at = 0; at < constants.size(); ++at)
    {
        wording += (at > 0 ? " " : "") + mOperator.constantNames[at] + "=" + text(constants[at]);
    }
    throw error("no kernel with " + wording, listed(made) + ", as compiled into this library");
}

// What is checked before a launch; `values` then has all symbols' values.
Kernel const& Plugin::prepare(PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const* out,
    int32_t nbOutputs, int32_t arch, std::vector<double>& values) const
{
    std::vector<DataType> types;
    Shapes shapes;
    for (int32_t at = 0; at < nbInputs; ++at)
    {
        types.push_back(in[at].type);
        shapes.push_back(shapeOf(in[at].dims));
    }
    int32_t const type = checkTypes(types);
    values = checkShapes(shapes, type);
    Kernel const& kernel = choose(type, arch, values);
    for (std::size_t at = 0; at < values.size(); ++at)
    {
        Symbol const& symbol = mOperator.symbols[at];
        if (symbol.source == Symbol::Source::kTILE)
        {
            values[at] = kernel.tiles[symbol.at];
        }
    }
    for (int32_t at = 0; at < nbOutputs; ++at)
    {
        Argument const& argument = mOperator.outputs.at(at);
        std::vector<double> const shape = shapeOf(out[at].dims);
        for (std::size_t axis = 0; axis < argument.dims.size(); ++axis)
        {
            double const wanted = evaluate(argument.dims[axis], Numbers{values});
            if (shape.size() != argument.dims.size()
                || (!std::isnan(shape[axis]) && !std::isnan(wanted) && shape[axis] != wanted))
            {
                throw error(argument.name + ": not of the shape that follows from the inputs", "[" + argument.text + "]");
            }
        }
    }
    return kernel;
}

} // namespace fastar
