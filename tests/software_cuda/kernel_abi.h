// What a kernel compiled for the host and the driver that runs it know of each other.
#pragma once

#include <cstddef>
#include <cstdint>

namespace swk {

struct Index {
    unsigned x, y, z;
};

// One thread of a block, as its code sees itself.
struct Lane {
    Index thread;
    Index block;
    Index block_size;
    Index grid_size;
    unsigned number;  // of the thread in its block, x fastest
    void* shared;     // dynamic shared memory
};

struct Kernel {
    const char* name;
    void (*call)(void** arguments);
    int count;
    const size_t* sizes;
    // Per argument: 0 a value, 1 a pointer.
    const unsigned char* pointers;
    int max_threads;
};

// What one lane left for the others of its warp in an exchange.
struct Slot {
    alignas(16) unsigned char bytes[16];
};

// Of every library of kernels: a table that ends with an entry without a name.
using Table = const Kernel*;

}  // namespace swk

extern "C" {
// The thread that is running; nothing outside a kernel reads it.
extern __thread swk::Lane* swk_lane;
// All threads of the block meet here; `line` tells two barriers apart.
void swk_sync_threads(int line);
// The lanes of `mask` meet here, each with up to 16 bytes; returns the 32 slots, valid until the lane's next exchange.
const swk::Slot* swk_exchange(unsigned mask, const void* value, size_t bytes);
// Static shared memory: the same for all threads of a block, fresh for every block. `key` names the variable.
void* swk_shared(const void* key, size_t bytes);
// __trap and failed assertions.
[[noreturn]] void swk_trap(const char* what, int line);
}
