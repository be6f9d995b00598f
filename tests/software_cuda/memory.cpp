// Memory: device and pinned blocks, who may touch them, and the copies between them.
//
// Every block is a mapping of its own with a page on either side that nobody may touch. A device block's end lies at
// the end of its last page (up to 256 bytes of alignment), so that a kernel that leaves it is stopped by the machine;
// the bytes between are filled with a pattern that is looked at when the block is freed. Freed device blocks keep their
// addresses, without access, for a while.

#include <sys/mman.h>

#include <algorithm>

#include "state.h"

namespace swcuda {

namespace {

constexpr size_t page = 4096, alignment = 256;
// Fresh memory reads as NaN in float16 and float32, and as -1.
constexpr unsigned char fresh = 0xff;
constexpr unsigned char canary = 0xc5;
constexpr size_t quarantine_blocks = 512;

struct Freed {
    void* map;
    size_t map_bytes;
    uintptr_t base;
    size_t size;
};

std::deque<Freed>& quarantine() {
    static auto& freed = *new std::deque<Freed>;
    return freed;
}

size_t rounded(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

CUresult allocate(Block::Kind kind, size_t size, Context& context, uintptr_t& address) {
    State& s = state();
    SW_REQUIRE(size > 0, CUDA_ERROR_INVALID_VALUE)
    bool on_device = kind == Block::Kind::device;
    if (on_device && (size > s.config.memory ||
                      size_t(s.counters.device_bytes[context.device]) + size > s.config.memory))
        return CUDA_ERROR_OUT_OF_MEMORY;
    Block block;
    block.kind = kind;
    block.size = size;
    block.device = context.device;
    block.context = &context;
    size_t body = rounded(size, page);
    block.map_bytes = body + 2 * page;
    block.map = mmap(nullptr, block.map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    SW_REQUIRE(block.map != MAP_FAILED, CUDA_ERROR_OUT_OF_MEMORY)
    auto* start = static_cast<unsigned char*>(block.map) + page;
    if (mprotect(start, body, PROT_READ | PROT_WRITE)) {
        munmap(block.map, block.map_bytes);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    block.base = reinterpret_cast<uintptr_t>(start) + body - rounded(size, alignment);
    auto* base = reinterpret_cast<unsigned char*>(block.base);
    std::memset(start, canary, base - start);
    std::memset(base, fresh, size);
    std::memset(base + size, canary, start + body - (base + size));
    block.id = s.next_number++;
    s.blocks.emplace(block.base, block);
    s.counters.allocations++;
    if (on_device) {
        s.counters.device_bytes[context.device] += size;
        s.counters.device_blocks++;
    } else {
        s.counters.pinned_bytes += size;
        s.counters.pinned_blocks++;
    }
    address = block.base;
    return CUDA_SUCCESS;
}

void release(Block block) {
    State& s = state();
    auto* start = static_cast<unsigned char*>(block.map) + page;
    auto* base = reinterpret_cast<unsigned char*>(block.base);
    auto* end = start + rounded(block.size, page);
    auto touched = [](unsigned char byte) { return byte != canary; };
    const char* kind = block.kind == Block::Kind::device ? "device" : "pinned";
    if (std::any_of(start, base, touched))
        report("a " + std::string(kind) + " block of " + std::to_string(block.size) + " bytes was written before its start");
    if (std::any_of(base + block.size, end, touched))
        report("a " + std::string(kind) + " block of " + std::to_string(block.size) + " bytes was written past its end");
    s.blocks.erase(block.base);
    if (block.kind == Block::Kind::device) {
        s.counters.device_bytes[block.device] -= block.size;
        s.counters.device_blocks--;
        // The same addresses without access and without memory behind them.
        mmap(block.map, block.map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    } else {
        s.counters.pinned_bytes -= block.size;
        s.counters.pinned_blocks--;
        // Left readable: a NumPy array that looks there later sees rubbish, and the tests go on.
        std::memset(base, fresh, block.size);
    }
    quarantine().push_back({block.map, block.map_bytes, block.base, block.size});
    while (quarantine().size() > quarantine_blocks) {
        munmap(quarantine().front().map, quarantine().front().map_bytes);
        quarantine().pop_front();
    }
}

CUresult free_block(Lock& lock, uintptr_t address, Block::Kind kind) {
    State& s = state();
    if (address == 0) return CUDA_SUCCESS;
    auto found = s.blocks.find(address);
    SW_REQUIRE(found != s.blocks.end() && found->second.kind == kind, CUDA_ERROR_INVALID_VALUE)
    uint64_t id = found->second.id;
    if (found->second.users > 0)
        report("a block of " + std::to_string(found->second.size) + " bytes was freed while work was using it");
    s.changed.wait(lock, [&] {
        auto now = s.blocks.find(address);
        return now == s.blocks.end() || now->second.id != id || now->second.users == 0;
    });
    found = s.blocks.find(address);
    if (found != s.blocks.end() && found->second.id == id) release(found->second);
    return CUDA_SUCCESS;
}

enum class Side { host, device, any };

struct Place {
    Range range;
    enum class Kind { pageable, pinned, device } kind = Kind::pageable;
};

CUresult resolve(uintptr_t address, size_t bytes, Side side, Place& place) {
    SW_REQUIRE(address != 0, CUDA_ERROR_INVALID_VALUE)
    place.range = {address, bytes, 0};
    Block* block = find_block(address);
    if (!block) {
        SW_REQUIRE(side != Side::device && !was_freed(address), CUDA_ERROR_INVALID_VALUE)
        return CUDA_SUCCESS;
    }
    SW_REQUIRE(bytes <= block->size && address - block->base <= block->size - bytes, CUDA_ERROR_INVALID_VALUE)
    bool on_device = block->kind == Block::Kind::device;
    SW_REQUIRE(!(side == Side::host && on_device), CUDA_ERROR_INVALID_VALUE)
    place.range.block = block->id;
    place.kind = on_device ? Place::Kind::device : Place::Kind::pinned;
    return CUDA_SUCCESS;
}

// A rectangle of rows; a plain copy is one row.
struct Shape {
    size_t width = 0, height = 1, destination_pitch = 0, source_pitch = 0;
    size_t span(size_t pitch) const { return height ? (height - 1) * pitch + width : 0; }
};

void move(uintptr_t destination, uintptr_t source, const Shape& shape) {
    for (size_t row = 0; row < shape.height; ++row)
        std::memmove(reinterpret_cast<void*>(destination + row * shape.destination_pitch),
                     reinterpret_cast<const void*>(source + row * shape.source_pitch), shape.width);
}

CUresult copy(Lock& lock, Context& context, uintptr_t destination, Side to, uintptr_t source, Side from, Shape shape,
              CUstream handle, bool wait) {
    StreamPtr stream;
    if (CUresult e = find_stream(handle, &context, stream)) return e;
    if (wait) {
        if (CUresult e = forbid_unsafe()) return e;
    }
    if (stream->legacy) {
        if (CUresult e = forbid_legacy(context)) return e;
    }
    if (shape.width == 0 || shape.height == 0) return CUDA_SUCCESS;
    Place target, origin;
    if (CUresult e = resolve(destination, shape.span(shape.destination_pitch), to, target)) return e;
    if (CUresult e = resolve(source, shape.span(shape.source_pitch), from, origin)) return e;
    state().counters.copies++;
    bool captured = stream->capture != nullptr;
    Work work;
    work.type = CU_GRAPH_NODE_TYPE_MEMCPY;
    work.context = stream->context;
    work.destination = destination;
    work.source = source;
    work.bytes = shape.width * shape.height;
    Context* where = stream->context;
    if (origin.kind == Place::Kind::pageable && !captured) {
        // CUDA stages pageable memory before it returns; the copy to the device itself may come later.
        if (wait) {
            if (stream->last) {
                if (CUresult e = wait_for(lock, stream->last)) return e;
            }
        }
        auto staged = std::make_shared<std::vector<unsigned char>>(shape.width * shape.height);
        Shape packed = shape;
        packed.destination_pitch = shape.width;
        move(reinterpret_cast<uintptr_t>(staged->data()), source, packed);
        Shape unpacked = shape;
        unpacked.source_pitch = shape.width;
        Range range = target.range;
        work.keep = staged;
        work.run = [range, staged, unpacked, where] {
            if (CUresult e = begin_use({range}, *where, "a copy")) return e;
            move(range.address, reinterpret_cast<uintptr_t>(staged->data()), unpacked);
            end_use({range});
            return CUDA_SUCCESS;
        };
    } else {
        std::vector<Range> ranges{target.range, origin.range};
        work.run = [ranges, shape, where] {
            if (CUresult e = begin_use(ranges, *where, "a copy")) return e;
            move(ranges[0].address, ranges[1].address, shape);
            end_use(ranges);
            return CUDA_SUCCESS;
        };
    }
    PointPtr point;
    if (CUresult e = issue(stream, std::move(work), &point)) return e;
    if (captured) return CUDA_SUCCESS;
    bool to_pageable = target.kind == Place::Kind::pageable;
    bool device_to_device = target.kind == Place::Kind::device && origin.kind == Place::Kind::device;
    bool from_pageable = origin.kind == Place::Kind::pageable;
    // CUDA's own table ("API synchronization behavior"): a synchronous call returns early for copies within the
    // device and for pageable memory that has been staged; an asynchronous one waits where it ends in pageable memory.
    bool returns_early = wait ? device_to_device || (from_pageable && target.kind == Place::Kind::device) : !to_pageable;
    return returns_early ? CUDA_SUCCESS : wait_for(lock, point);
}

CUresult copy_row(Lock& lock, Context& context, uintptr_t destination, Side to, uintptr_t source, Side from,
                  size_t bytes, CUstream stream, bool wait) {
    return copy(lock, context, destination, to, source, from, {bytes, 1, bytes, bytes}, stream, wait);
}

CUresult copy_rows(Lock& lock, Context& context, const CUDA_MEMCPY2D* request, CUstream stream, bool wait) {
    SW_REQUIRE(request, CUDA_ERROR_INVALID_VALUE)
    const CUDA_MEMCPY2D& r = *request;
    auto side = [](CUmemorytype type, const void* host, CUdeviceptr device, Side& s, uintptr_t& address) {
        if (type == CU_MEMORYTYPE_ARRAY) return CUDA_ERROR_NOT_SUPPORTED;
        s = type == CU_MEMORYTYPE_HOST ? Side::host : type == CU_MEMORYTYPE_DEVICE ? Side::device : Side::any;
        address = type == CU_MEMORYTYPE_HOST ? reinterpret_cast<uintptr_t>(host) : uintptr_t(device);
        return CUDA_SUCCESS;
    };
    Side to, from;
    uintptr_t destination, source;
    if (CUresult e = side(r.dstMemoryType, r.dstHost, r.dstDevice, to, destination)) return e;
    if (CUresult e = side(r.srcMemoryType, r.srcHost, r.srcDevice, from, source)) return e;
    Shape shape{r.WidthInBytes, r.Height, r.dstPitch ? r.dstPitch : r.WidthInBytes, r.srcPitch ? r.srcPitch : r.WidthInBytes};
    SW_REQUIRE(shape.destination_pitch >= r.WidthInBytes && shape.source_pitch >= r.WidthInBytes, CUDA_ERROR_INVALID_VALUE)
    destination += r.dstY * shape.destination_pitch + r.dstXInBytes;
    source += r.srcY * shape.source_pitch + r.srcXInBytes;
    return copy(lock, context, destination, to, source, from, shape, stream, wait);
}

template <typename T>
CUresult fill(Lock& lock, Context& context, CUdeviceptr address, T value, size_t count, CUstream handle, bool wait) {
    StreamPtr stream;
    if (CUresult e = find_stream(handle, &context, stream)) return e;
    if (wait) {
        if (CUresult e = forbid_unsafe()) return e;
    }
    if (stream->legacy) {
        if (CUresult e = forbid_legacy(context)) return e;
    }
    if (count == 0) return CUDA_SUCCESS;
    SW_REQUIRE(address % sizeof(T) == 0, CUDA_ERROR_INVALID_VALUE)
    Place place;
    if (CUresult e = resolve(address, count * sizeof(T), Side::device, place)) return e;
    state().counters.memsets++;
    bool captured = stream->capture != nullptr;
    Work work;
    work.type = CU_GRAPH_NODE_TYPE_MEMSET;
    work.context = stream->context;
    work.destination = address;
    work.bytes = count * sizeof(T);
    Range range = place.range;
    Context* where = stream->context;
    work.run = [range, value, count, where] {
        if (CUresult e = begin_use({range}, *where, "a memset")) return e;
        std::fill_n(reinterpret_cast<T*>(range.address), count, value);
        end_use({range});
        return CUDA_SUCCESS;
    };
    PointPtr point;
    if (CUresult e = issue(stream, std::move(work), &point)) return e;
    // As CUDA has it, even the synchronous memset only waits where the memory is the host's.
    return wait && !captured && place.kind == Place::Kind::pinned ? wait_for(lock, point) : CUDA_SUCCESS;
}

uintptr_t number(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

}  // namespace

Block* find_block(uintptr_t address) {
    auto& blocks = state().blocks;
    auto after = blocks.upper_bound(address);
    if (after == blocks.begin()) return nullptr;
    Block& block = std::prev(after)->second;
    // One past the end still belongs to the block: an empty view may lie there.
    return address - block.base <= block.size ? &block : nullptr;
}

bool was_freed(uintptr_t address) {
    return std::any_of(quarantine().begin(), quarantine().end(),
                       [&](const Freed& f) { return address - f.base < f.size; });
}

CUresult begin_use(const std::vector<Range>& ranges, Context& context, const char* what) {
    Lock lock(state().lock);
    for (const Range& range : ranges) {
        if (!range.block) continue;
        Block* block = find_block(range.address);
        if (block && block->id == range.block) continue;
        lose(context, CUDA_ERROR_ILLEGAL_ADDRESS, std::string(what) + " used memory that had been freed");
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    for (const Range& range : ranges)
        if (range.block) find_block(range.address)->users++;
    return CUDA_SUCCESS;
}

void end_use(const std::vector<Range>& ranges) {
    Lock lock(state().lock);
    for (const Range& range : ranges)
        if (range.block) find_block(range.address)->users--;
    state().changed.notify_all();
}

void free_all_of(Context& context) {
    std::vector<Block> owned;
    for (auto& [base, block] : state().blocks)
        if (block.context == &context && block.users == 0) owned.push_back(block);
    for (auto& block : owned) release(block);
}

}  // namespace swcuda

using namespace swcuda;

extern "C" {

CUresult cuMemAlloc(CUdeviceptr* pointer, size_t size) {
    SW_ENTER
    SW_REQUIRE(pointer, CUDA_ERROR_INVALID_VALUE)
    SW_UNSAFE_IN_CAPTURE
    uintptr_t address = 0;
    CUresult result = allocate(Block::Kind::device, size, *context, address);
    *pointer = address;
    return result;
}

CUresult cuMemAllocPitch(CUdeviceptr* pointer, size_t* pitch, size_t width, size_t height, unsigned) {
    SW_ENTER
    SW_REQUIRE(pointer && pitch, CUDA_ERROR_INVALID_VALUE)
    SW_UNSAFE_IN_CAPTURE
    uintptr_t address = 0;
    *pitch = rounded(width, 512);
    CUresult result = allocate(Block::Kind::device, *pitch * height, *context, address);
    *pointer = address;
    return result;
}

CUresult cuMemFree(CUdeviceptr pointer) {
    SW_ENTER_RELEASE
    if (CUresult e = usable(current_context())) return e;
    SW_UNSAFE_IN_CAPTURE
    return free_block(lock, pointer, Block::Kind::device);
}

CUresult cuMemHostAlloc(void** pointer, size_t size, unsigned) {
    SW_ENTER
    SW_REQUIRE(pointer, CUDA_ERROR_INVALID_VALUE)
    SW_UNSAFE_IN_CAPTURE
    uintptr_t address = 0;
    CUresult result = allocate(Block::Kind::pinned, size, *context, address);
    *pointer = reinterpret_cast<void*>(address);
    return result;
}

CUresult cuMemAllocHost(void** pointer, size_t size) { return cuMemHostAlloc(pointer, size, 0); }

CUresult cuMemFreeHost(void* pointer) {
    SW_ENTER_RELEASE
    if (CUresult e = usable(current_context())) return e;
    SW_UNSAFE_IN_CAPTURE
    return free_block(lock, number(pointer), Block::Kind::pinned);
}

CUresult cuMemHostGetDevicePointer(CUdeviceptr* device, void* host, unsigned) {
    SW_ENTER
    Block* block = find_block(number(host));
    SW_REQUIRE(device && block && block->kind == Block::Kind::pinned, CUDA_ERROR_INVALID_VALUE)
    *device = number(host);
    return CUDA_SUCCESS;
}

CUresult cuMemGetInfo(size_t* available, size_t* total) {
    SW_ENTER
    SW_REQUIRE(available && total, CUDA_ERROR_INVALID_VALUE)
    *total = state().config.memory;
    size_t used = state().counters.device_bytes[context->device];
    *available = used < *total ? *total - used : 0;
    return CUDA_SUCCESS;
}

CUresult cuMemGetAddressRange(CUdeviceptr* base, size_t* size, CUdeviceptr pointer) {
    SW_ENTER
    Block* block = find_block(pointer);
    SW_REQUIRE(block, CUDA_ERROR_NOT_FOUND)
    if (base) *base = block->base;
    if (size) *size = block->size;
    return CUDA_SUCCESS;
}

CUresult cuMemcpy(CUdeviceptr d, CUdeviceptr s, size_t n) {
    SW_ENTER
    return copy_row(lock, *context, d, Side::any, s, Side::any, n, nullptr, true);
}
CUresult cuMemcpyAsync(CUdeviceptr d, CUdeviceptr s, size_t n, CUstream stream) {
    SW_ENTER
    return copy_row(lock, *context, d, Side::any, s, Side::any, n, stream, false);
}
CUresult cuMemcpyHtoD(CUdeviceptr d, const void* s, size_t n) {
    SW_ENTER
    return copy_row(lock, *context, d, Side::device, number(s), Side::host, n, nullptr, true);
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr d, const void* s, size_t n, CUstream stream) {
    SW_ENTER
    return copy_row(lock, *context, d, Side::device, number(s), Side::host, n, stream, false);
}
CUresult cuMemcpyDtoH(void* d, CUdeviceptr s, size_t n) {
    SW_ENTER
    return copy_row(lock, *context, number(d), Side::host, s, Side::device, n, nullptr, true);
}
CUresult cuMemcpyDtoHAsync(void* d, CUdeviceptr s, size_t n, CUstream stream) {
    SW_ENTER
    return copy_row(lock, *context, number(d), Side::host, s, Side::device, n, stream, false);
}
CUresult cuMemcpyDtoD(CUdeviceptr d, CUdeviceptr s, size_t n) {
    SW_ENTER
    return copy_row(lock, *context, d, Side::device, s, Side::device, n, nullptr, true);
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr d, CUdeviceptr s, size_t n, CUstream stream) {
    SW_ENTER
    return copy_row(lock, *context, d, Side::device, s, Side::device, n, stream, false);
}

static CUresult require_peers(CUdeviceptr d, CUcontext dc, CUdeviceptr s, CUcontext sc) {
    Block *to = find_block(d), *from = find_block(s);
    SW_REQUIRE(to && from && to->context->handle == dc && from->context->handle == sc, CUDA_ERROR_INVALID_VALUE)
    return CUDA_SUCCESS;
}
CUresult cuMemcpyPeer(CUdeviceptr d, CUcontext dc, CUdeviceptr s, CUcontext sc, size_t n) {
    SW_ENTER
    if (CUresult e = require_peers(d, dc, s, sc)) return e;
    return copy_row(lock, *context, d, Side::device, s, Side::device, n, nullptr, true);
}
CUresult cuMemcpyPeerAsync(CUdeviceptr d, CUcontext dc, CUdeviceptr s, CUcontext sc, size_t n, CUstream stream) {
    SW_ENTER
    if (CUresult e = require_peers(d, dc, s, sc)) return e;
    return copy_row(lock, *context, d, Side::device, s, Side::device, n, stream, false);
}

CUresult cuMemcpy2D(const CUDA_MEMCPY2D* request) {
    SW_ENTER
    return copy_rows(lock, *context, request, nullptr, true);
}
CUresult cuMemcpy2DUnaligned(const CUDA_MEMCPY2D* request) { return cuMemcpy2D(request); }
CUresult cuMemcpy2DAsync(const CUDA_MEMCPY2D* request, CUstream stream) {
    SW_ENTER
    return copy_rows(lock, *context, request, stream, false);
}

CUresult cuMemsetD8(CUdeviceptr p, unsigned char value, size_t n) {
    SW_ENTER
    return fill<uint8_t>(lock, *context, p, value, n, nullptr, true);
}
CUresult cuMemsetD16(CUdeviceptr p, unsigned short value, size_t n) {
    SW_ENTER
    return fill<uint16_t>(lock, *context, p, value, n, nullptr, true);
}
CUresult cuMemsetD32(CUdeviceptr p, unsigned value, size_t n) {
    SW_ENTER
    return fill<uint32_t>(lock, *context, p, value, n, nullptr, true);
}
CUresult cuMemsetD8Async(CUdeviceptr p, unsigned char value, size_t n, CUstream stream) {
    SW_ENTER
    return fill<uint8_t>(lock, *context, p, value, n, stream, false);
}
CUresult cuMemsetD16Async(CUdeviceptr p, unsigned short value, size_t n, CUstream stream) {
    SW_ENTER
    return fill<uint16_t>(lock, *context, p, value, n, stream, false);
}
CUresult cuMemsetD32Async(CUdeviceptr p, unsigned value, size_t n, CUstream stream) {
    SW_ENTER
    return fill<uint32_t>(lock, *context, p, value, n, stream, false);
}

static CUresult attribute_of(CUpointer_attribute which, Block& block, void* data) {
    bool on_device = block.kind == Block::Kind::device;
    switch (which) {
        case CU_POINTER_ATTRIBUTE_CONTEXT: *static_cast<CUcontext*>(data) = block.context->handle; break;
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
            *static_cast<unsigned*>(data) = on_device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
            break;
        case CU_POINTER_ATTRIBUTE_BUFFER_ID: *static_cast<unsigned long long*>(data) = block.id; break;
        case CU_POINTER_ATTRIBUTE_IS_MANAGED: *static_cast<bool*>(data) = false; break;
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *static_cast<int*>(data) = block.device; break;
        case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *static_cast<CUdeviceptr*>(data) = block.base; break;
        case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *static_cast<size_t*>(data) = block.size; break;
        case CU_POINTER_ATTRIBUTE_MAPPED: *static_cast<bool*>(data) = true; break;
        default: return CUDA_ERROR_NOT_SUPPORTED;
    }
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute which, CUdeviceptr pointer) {
    SW_ENTER_ANY
    Block* block = find_block(pointer);
    SW_REQUIRE(data && block, CUDA_ERROR_INVALID_VALUE)
    if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER || which == CU_POINTER_ATTRIBUTE_HOST_POINTER) {
        bool host = which == CU_POINTER_ATTRIBUTE_HOST_POINTER;
        SW_REQUIRE(!host || block->kind == Block::Kind::pinned, CUDA_ERROR_INVALID_VALUE)
        *static_cast<CUdeviceptr*>(data) = pointer;
        return CUDA_SUCCESS;
    }
    return attribute_of(which, *block, data);
}

CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* which, void** data, CUdeviceptr pointer) {
    SW_ENTER_ANY
    Block* block = find_block(pointer);
    for (unsigned i = 0; i < count; ++i) {
        CUpointer_attribute a = which[i];
        if (a == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
            *static_cast<CUdeviceptr*>(data[i]) = block ? pointer : 0;
        else if (a == CU_POINTER_ATTRIBUTE_HOST_POINTER)
            *static_cast<CUdeviceptr*>(data[i]) = block && block->kind == Block::Kind::device ? 0 : pointer;
        else if (block) {
            if (CUresult e = attribute_of(a, *block, data[i])) return e;
        } else {
            // What CUDA says of a pointer that it does not know: not an error, but no memory type.
            size_t bytes = a == CU_POINTER_ATTRIBUTE_IS_MANAGED || a == CU_POINTER_ATTRIBUTE_MAPPED ? 1
                           : a == CU_POINTER_ATTRIBUTE_MEMORY_TYPE || a == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL ? 4
                                                                                                              : 8;
            std::memset(data[i], 0, bytes);
            if (a == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) *static_cast<int*>(data[i]) = -2;
        }
    }
    return CUDA_SUCCESS;
}

}  // extern "C"
