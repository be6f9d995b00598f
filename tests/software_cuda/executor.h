// Runs kernels that were compiled for the host: a block's threads are fibres of one thread of ours.
#pragma once

#include <cuda.h>

#include <string>

#include "kernel_abi.h"

namespace swcuda {

struct Launch {
    const swk::Kernel* kernel;
    swk::Index grid, block;
    size_t shared_bytes;
    void** arguments;
};

// Run every block, one after the other.
// Returns CUDA_SUCCESS, or what the GPU would report, with a sentence in `message`: an access outside of any block, a
// barrier that not all threads reached, a trap.
CUresult run_kernel(const Launch& launch, std::string& message);

}  // namespace swcuda
