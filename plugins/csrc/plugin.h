// One plugin class for all operators of the table, and its creators.
#pragma once

#include "table.h"

#include <NvInferRuntime.h>

#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastar
{

constexpr char const* kNAMESPACE = "fastar";
constexpr char const* kVERSION = "1";

constexpr double kUNKNOWN = std::numeric_limits<double>::quiet_NaN(); // a dimension
constexpr nvinfer1::DataType kTYPES[]
    = {nvinfer1::DataType::kHALF, nvinfer1::DataType::kBF16, nvinfer1::DataType::kFLOAT}; // by Kernel::type
constexpr int32_t kWIDE = 2;                                                             // float32 among them

std::string text(double value);

// Where messages go; nullptr: standard error.
void setFinder(nvinfer1::ILoggerFinder* finder);
void report(nvinfer1::ILogger::Severity severity, std::string const& message) noexcept;

// A plugin's fields: its operator's attributes, int32 or float32.
class Fields
{
public:
    Fields(Operator const& op, std::vector<double> const& values);
    Fields(Fields const&) = delete;
    Fields& operator=(Fields const&) = delete;
    nvinfer1::PluginFieldCollection const* get() const
    {
        return &mCollection;
    }

private:
    std::vector<int32_t> mIntegers;
    std::vector<float> mFractions;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuildV2,
               public nvinfer1::IPluginV3OneRuntime
{
public:
    // attributes: one value for each of the operator's.
    Plugin(int32_t op, std::vector<double> attributes);

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    char const* getPluginName() const noexcept override;
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

    int32_t getNbOutputs() const noexcept override;
    int32_t getAliasedInput(int32_t output) noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t nbOutputs, nvinfer1::DataType const* inputs,
        int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const* shapeInputs,
        int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
        nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t at, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept override;

    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::PluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    using Shapes = std::vector<std::vector<double>>; // NaN: not known yet

    // Each throws std::invalid_argument, which names operator, argument, what it is, and what is allowed.
    int32_t checkTypes(std::vector<nvinfer1::DataType> const& inputs) const;
    std::vector<double> checkShapes(Shapes const& inputs, int32_t type) const;
    Kernel const& choose(int32_t type, int32_t arch, std::vector<double> const& values) const;
    Kernel const& prepare(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::PluginTensorDesc const* out, int32_t nbOutputs, int32_t arch, std::vector<double>& values) const;
    std::invalid_argument error(std::string const& what, std::string const& allowed) const;
    std::vector<double> unknowns(int32_t type) const;

    int32_t mIndex;
    Operator const& mOperator;
    std::vector<double> mAttributes;
    Fields mFields;
    mutable int32_t mType{-1}; // the network's, once getOutputDataTypes was told: block sizes follow from it
};

class Creator : public nvinfer1::IPluginCreatorV3One
{
public:
    explicit Creator(int32_t op);
    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
        nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    char const* getPluginName() const noexcept override;
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

private:
    int32_t mIndex;
    Fields mFields;
};

// One for each operator; they live as long as the library.
std::vector<nvinfer1::IPluginCreatorInterface*>& creators();

} // namespace fastar
