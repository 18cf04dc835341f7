// The operators and their compiled kernels as data. plugins/build.py writes table.cpp from plugins/table.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastar
{

// An expression in reverse Polish notation. op: '#' a number, '$' a symbol, else + - * / (floor) ^ (ceiling) of two.
struct Token
{
    char op;
    int32_t value;
};
using Expression = std::vector<Token>;

enum class Kind
{
    kHALF, // the network's type: float16, bfloat16 or float32
    kF32,
    kI32
};

struct Argument
{
    std::string name;
    Kind kind;
    std::vector<Expression> dims;
    std::string text; // the same, to be read
    int32_t alias; // of an output: the input that it is, else -1
};

// What an expression may name.
struct Symbol
{
    enum class Source
    {
        kDIM,       // dimension `axis` of input `at`
        kATTRIBUTE, // attribute `at`
        kTILE       // block size `at`, which follows from type and GPU
    };
    std::string name;
    Source source;
    int32_t at;
    int32_t axis;
};

struct Attribute
{
    enum class Type
    {
        kINT,
        kBOOL,
        kFLOAT
    };
    std::string name;
    Type type;
    double initial;
};

// What sizes must fulfil: `value` is a multiple of `other`, or at most that.
struct Bound
{
    bool divides;
    Expression value, other;
    std::string valueText, otherText;
};

struct Operator
{
    std::string name;
    std::vector<Argument> inputs, outputs;
    Expression grid[2];
    std::vector<Expression> extras;
    std::vector<std::string> constantNames;
    std::vector<Expression> constants; // of which a kernel is chosen
    std::vector<Attribute> attributes;
    std::vector<Symbol> symbols;
    std::vector<Bound> bounds;
    std::vector<int32_t> tiles[2]; // of a half type, of float32: as far as shapes of outputs depend on them
};

// A kernel, compiled for one GPU. type: 0 float16, 1 bfloat16, 2 float32, -1 for an operator without the network's type.
struct Kernel
{
    int32_t op; // into operators()
    int32_t type;
    int32_t arch; // compute capability, two digits or three
    std::vector<double> constants;
    std::vector<int32_t> tiles;
    char const* name;
    int32_t warps;
    int32_t shared; // bytes
    unsigned char const* cubin;
};

std::vector<Operator> const& operators();
std::vector<Kernel> const& kernels();

// Value of an expression. Values has constant(int64_t), symbol(int32_t) and apply(char, value, value).
template <class Values>
auto evaluate(Expression const& expression, Values&& values)
{
    std::vector<decltype(values.constant(0))> stack;
    for (Token const& token : expression)
    {
        if (token.op == '#')
        {
            stack.push_back(values.constant(token.value));
        }
        else if (token.op == '$')
        {
            stack.push_back(values.symbol(token.value));
        }
        else
        {
            auto const second = stack.back();
            stack.pop_back();
            stack.back() = values.apply(token.op, stack.back(), second);
        }
    }
    return stack.back();
}

// Numbers, by symbol. Whole numbers below 2^53 are exact, and attributes may be fractions.
struct Numbers
{
    std::vector<double> const& values;

    double constant(int64_t value) const
    {
        return static_cast<double>(value);
    }
    double symbol(int32_t at) const
    {
        return values[at];
    }
    double apply(char op, double first, double second) const;
};

} // namespace fastar
