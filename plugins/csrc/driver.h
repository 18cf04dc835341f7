// CUDA's driver, found when it is first needed: the library loads on a machine without a GPU.
#pragma once

#include "table.h"

#include <string>

struct CUstream_st;

namespace fastar
{

// Compute capability of the current context's device, as 90 or 120; 0 where no driver or no device is.
int32_t currentArch();

// Loads a kernel into the current context unless it is there; not to be done first while a graph is captured. Returns
// what went wrong, "" for nothing.
std::string load(Kernel const& kernel);

// Enqueues a kernel. arguments: the addresses of its parameters. Returns what went wrong.
std::string launch(Kernel const& kernel, uint32_t x, uint32_t y, void** arguments, CUstream_st* stream);

} // namespace fastar
