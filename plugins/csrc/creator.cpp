#include "plugin.h"

#include <cmath>
#include <memory>
#include <stdexcept>

namespace fastar
{

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using Severity = nvinfer1::ILogger::Severity;

namespace
{

std::vector<double> defaults(Operator const& op)
{
    std::vector<double> values;
    for (Attribute const& attribute : op.attributes)
    {
        values.push_back(attribute.initial);
    }
    return values;
}

double numberOf(Operator const& op, PluginField const& field)
{
    if (field.length == 1 && field.data != nullptr)
    {
        switch (field.type)
        {
        case PluginFieldType::kINT32: return *static_cast<int32_t const*>(field.data);
        case PluginFieldType::kINT64: return static_cast<double>(*static_cast<int64_t const*>(field.data));
        case PluginFieldType::kFLOAT32: return *static_cast<float const*>(field.data);
        case PluginFieldType::kFLOAT64: return *static_cast<double const*>(field.data);
        default: break;
        }
    }
    throw std::invalid_argument(op.name + ": " + field.name + ": not one number; allowed: one int32, int64 or float32");
}

} // namespace

Creator::Creator(int32_t op)
    : mIndex(op)
    , mFields(operators()[op], defaults(operators()[op]))
{
}

nvinfer1::IPluginV3* Creator::createPlugin(
    char const*, nvinfer1::PluginFieldCollection const* fields, nvinfer1::TensorRTPhase) noexcept
{
    try
    {
        Operator const& op = operators()[mIndex];
        std::vector<double> values = defaults(op);
        for (int32_t at = 0; fields != nullptr && at < fields->nbFields; ++at)
        {
            PluginField const& field = fields->fields[at];
            std::size_t found = 0;
            std::string names;
            for (; found < op.attributes.size() && op.attributes[found].name != field.name; ++found)
            {
                names += (found > 0 ? ", " : "") + op.attributes[found].name;
            }
            if (found == op.attributes.size())
            {
                throw std::invalid_argument(
                    op.name + ": " + field.name + ": not an attribute; allowed: " + (names.empty() ? "none" : names));
            }
            double const value = numberOf(op, field);
            Attribute const& attribute = op.attributes[found];
            bool const whole = value == std::floor(value) && std::abs(value) < 2147483648.;
            bool const fits = attribute.type == Attribute::Type::kFLOAT ? std::isfinite(value)
                : attribute.type == Attribute::Type::kBOOL              ? value == 0 || value == 1
                                                                        : whole;
            if (!fits)
            {
                throw std::invalid_argument(op.name + ": " + field.name + ": " + std::to_string(value) + "; allowed: "
                    + (attribute.type == Attribute::Type::kBOOL        ? "0 or 1"
                            : attribute.type == Attribute::Type::kINT ? "whole numbers of 32 bits"
                                                                      : "finite numbers"));
            }
            values[found] = value;
        }
        return new Plugin(mIndex, values);
    }
    catch (std::exception const& error)
    {
        report(Severity::kERROR, error.what());
        return nullptr;
    }
}

nvinfer1::PluginFieldCollection const* Creator::getFieldNames() noexcept
{
    return mFields.get();
}

char const* Creator::getPluginName() const noexcept
{
    return operators()[mIndex].name.c_str();
}

char const* Creator::getPluginVersion() const noexcept
{
    return kVERSION;
}

char const* Creator::getPluginNamespace() const noexcept
{
    return kNAMESPACE;
}

std::vector<nvinfer1::IPluginCreatorInterface*>& creators()
{
    static std::vector<nvinfer1::IPluginCreatorInterface*> all = [] {
        static std::vector<std::unique_ptr<Creator>> owned;
        std::vector<nvinfer1::IPluginCreatorInterface*> found;
        for (std::size_t op = 0; op < operators().size(); ++op)
        {
            owned.push_back(std::make_unique<Creator>(static_cast<int32_t>(op)));
            found.push_back(owned.back().get());
        }
        return found;
    }();
    return all;
}

} // namespace fastar
