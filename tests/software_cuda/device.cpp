// Starting the driver, its devices, contexts and errors.

#include <algorithm>
#include <cstdio>

#include "state.h"

namespace swcuda {

State& state() {
    static auto& only = *new State;
    return only;
}

thread_local bool in_host_function = false;
thread_local std::vector<Context*> current_contexts;
thread_local CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

Context* current_context() { return current_contexts.empty() ? nullptr : current_contexts.back(); }

CUresult enter_release() { return state().initialised ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED; }

CUresult enter_any() {
    // CUDA forbids calls from host functions; with one lock they would work here, which would hide the mistake.
    SW_REQUIRE(!in_host_function, CUDA_ERROR_NOT_PERMITTED)
    return enter_release();
}

CUresult enter(Context*& context) {
    if (CUresult e = enter_any()) return e;
    context = current_context();
    return usable(context);
}

CUresult usable(const Context* context) {
    SW_REQUIRE(context, CUDA_ERROR_INVALID_CONTEXT)
    SW_REQUIRE(context->active, CUDA_ERROR_CONTEXT_IS_DESTROYED)
    return context->sticky;
}

void report(const std::string& what) { state().reports.push_back(what); }

void lose(Context& context, CUresult error, const std::string& what) {
    if (!context.sticky) context.sticky = error;
    report(what);
    state().changed.notify_all();
}

// What ends with a context: its memory, streams and events.
void end_context(Context& context) {
    State& s = state();
    for (auto it = s.streams.begin(); it != s.streams.end();) {
        Stream& stream = *it->second;
        if (stream.context != &context) {
            ++it;
            continue;
        }
        if (stream.capture) forget_capturing_stream(stream);
        stream.closed = true;
        stream.held = false;
        stream.demanded = stream.submitted;
        it = s.streams.erase(it);
    }
    for (auto it = s.events.begin(); it != s.events.end();)
        it = it->second->context == &context ? s.events.erase(it) : std::next(it);
    free_all_of(context);
    context.peers.assign(max_devices, false);
    for (Context& other : s.contexts)
        if (!other.peers.empty()) other.peers[context.device] = false;
    context.active = false;
    context.sticky = CUDA_SUCCESS;
    s.changed.notify_all();
}

namespace {

bool is_device(CUdevice device) { return device >= 0 && device < state().config.devices; }

Context* find_context(CUcontext handle) {
    for (Context& context : state().contexts)
        if (context.handle && context.handle == handle) return &context;
    return nullptr;
}

int attribute(CUdevice_attribute which, int device) {
    const Config& c = state().config;
    switch (which) {
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: return 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 0x7fffffff;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: return 65535;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 48 * 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return 227 * 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return 228 * 1024;
        case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: return 64 * 1024;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: return 65536;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1000000;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return c.multiprocessors;
        case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY: return 1;
        case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS: return 1;
        case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID: return device + 1;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 32;
        case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: return 3;
        case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: return 1;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return c.compute_major;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return c.compute_minor;
        case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED: return 1;
        default: return 0;
    }
}

CUresult retain(Context*& context, CUdevice device) {
    SW_REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE)
    context = &state().contexts[device];
    if (!context->handle) {
        context->handle = static_cast<CUcontext>(state().fresh_handle());
        context->device = device;
        context->peers.assign(max_devices, false);
    }
    context->active = true;
    context->references++;
    return CUDA_SUCCESS;
}

}  // namespace

}  // namespace swcuda

using namespace swcuda;

extern "C" {

CUresult cuInit(unsigned flags) {
    Lock lock(state().lock);
    SW_REQUIRE(!in_host_function, CUDA_ERROR_NOT_PERMITTED)
    SW_REQUIRE(flags == 0, CUDA_ERROR_INVALID_VALUE)
    if (state().config.init_error) return static_cast<CUresult>(state().config.init_error);
    SW_REQUIRE(state().config.devices > 0, CUDA_ERROR_NO_DEVICE)
    state().initialised = true;
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
    Lock lock(state().lock);
    SW_REQUIRE(version, CUDA_ERROR_INVALID_VALUE)
    *version = state().config.driver_version;
    return CUDA_SUCCESS;
}

#define SW_ERRORS(X)                                                                                             \
    X(CUDA_SUCCESS, "no error")                                                                                  \
    X(CUDA_ERROR_INVALID_VALUE, "invalid argument")                                                              \
    X(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")                                                                 \
    X(CUDA_ERROR_NOT_INITIALIZED, "initialization error")                                                        \
    X(CUDA_ERROR_DEINITIALIZED, "driver shutting down")                                                          \
    X(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected")                                                \
    X(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal")                                                       \
    X(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid")                                                \
    X(CUDA_ERROR_INVALID_CONTEXT, "invalid device context")                                                      \
    X(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device")                  \
    X(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED, "peer access is not supported between these two devices")              \
    X(CUDA_ERROR_JIT_COMPILER_NOT_FOUND, "PTX JIT compiler library not found")                                   \
    X(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle")                                                      \
    X(CUDA_ERROR_ILLEGAL_STATE, "the operation cannot be performed in the present state")                        \
    X(CUDA_ERROR_NOT_FOUND, "named symbol not found")                                                            \
    X(CUDA_ERROR_NOT_READY, "device not ready")                                                                  \
    X(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered")                                    \
    X(CUDA_ERROR_LAUNCH_TIMEOUT, "the launch timed out and was terminated")                                      \
    X(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED, "peer access is already enabled")                                  \
    X(CUDA_ERROR_PEER_ACCESS_NOT_ENABLED, "peer access has not been enabled")                                    \
    X(CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed")                                                   \
    X(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure")                                                    \
    X(CUDA_ERROR_NOT_PERMITTED, "operation not permitted")                                                       \
    X(CUDA_ERROR_NOT_SUPPORTED, "operation not supported")                                                       \
    X(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "system has unsupported display driver / cuda driver combination")      \
    X(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing")                 \
    X(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture")          \
    X(CUDA_ERROR_STREAM_CAPTURE_MERGE, "operation would result in a merge of separate capture sequences")        \
    X(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "capture was not ended in the same stream as it began")               \
    X(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "capturing stream has unjoined work")                                  \
    X(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "dependency created on uncaptured work in another stream")            \
    X(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "operation would make the legacy stream depend on a capturing stream") \
    X(CUDA_ERROR_CAPTURED_EVENT, "operation not permitted on an event last recorded in a capturing stream")      \
    X(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "attempt to terminate a thread-local capture from another thread")  \
    X(CUDA_ERROR_UNKNOWN, "unknown error")

CUresult cuGetErrorName(CUresult error, const char** name) {
    switch (error) {
#define SW_CASE(code, text) \
    case code: *name = #code; return CUDA_SUCCESS;
        SW_ERRORS(SW_CASE)
#undef SW_CASE
        default: *name = nullptr; return CUDA_ERROR_INVALID_VALUE;
    }
}

CUresult cuGetErrorString(CUresult error, const char** text) {
    switch (error) {
#define SW_CASE(code, meaning) \
    case code: *text = meaning; return CUDA_SUCCESS;
        SW_ERRORS(SW_CASE)
#undef SW_CASE
        default: *text = nullptr; return CUDA_ERROR_INVALID_VALUE;
    }
}

CUresult cuDeviceGetCount(int* count) {
    SW_ENTER_ANY
    *count = state().config.devices;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    SW_ENTER_ANY
    SW_REQUIRE(is_device(ordinal), CUDA_ERROR_INVALID_DEVICE)
    *device = ordinal;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
    SW_ENTER_ANY
    SW_REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE)
    std::snprintf(name, length, "Software CUDA %d", device);
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
    SW_ENTER_ANY
    SW_REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE)
    std::memset(uuid, 0, sizeof *uuid);
    std::memcpy(uuid, "software cuda ", 14);
    reinterpret_cast<char*>(uuid)[15] = char(device);
    return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem(size_t* bytes, CUdevice device) {
    SW_ENTER_ANY
    SW_REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE)
    *bytes = state().config.memory;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
    SW_ENTER_ANY
    SW_REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE)
    *value = attribute(which, device);
    return CUDA_SUCCESS;
}
CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice device) {
    SW_ENTER_ANY
    SW_REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE)
    *major = state().config.compute_major;
    *minor = state().config.compute_minor;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetPCIBusId(char* id, int length, CUdevice device) {
    SW_ENTER_ANY
    SW_REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE)
    std::snprintf(id, length, "0000:%02x:00.0", device + 1);
    return CUDA_SUCCESS;
}
CUresult cuDeviceCanAccessPeer(int* can, CUdevice device, CUdevice peer) {
    SW_ENTER_ANY
    SW_REQUIRE(is_device(device) && is_device(peer), CUDA_ERROR_INVALID_DEVICE)
    *can = device != peer && state().config.peer_access;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetP2PAttribute(int* value, CUdevice_P2PAttribute which, CUdevice device, CUdevice peer) {
    SW_ENTER_ANY
    SW_REQUIRE(is_device(device) && is_device(peer) && device != peer, CUDA_ERROR_INVALID_DEVICE)
    *value = which == CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED && state().config.peer_access;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* handle, CUdevice device) {
    SW_ENTER_ANY
    SW_REQUIRE(handle, CUDA_ERROR_INVALID_VALUE)
    Context* context;
    if (CUresult e = retain(context, device)) return e;
    *handle = context->handle;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
    SW_ENTER_RELEASE
    SW_REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE)
    Context& context = state().contexts[device];
    SW_REQUIRE(context.references > 0, CUDA_ERROR_INVALID_CONTEXT)
    if (--context.references == 0) {
        drain(lock, context);
        end_context(context);
    }
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxReset(CUdevice device) {
    SW_ENTER_ANY
    SW_REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE)
    Context& context = state().contexts[device];
    end_context(context);
    // Its users keep their references: the next call of any of them finds it anew.
    context.active = context.references > 0;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxSetFlags(CUdevice device, unsigned flags) {
    SW_ENTER_ANY
    SW_REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE)
    state().contexts[device].flags = flags;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
    SW_ENTER_ANY
    SW_REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE)
    *flags = state().contexts[device].flags;
    *active = state().contexts[device].active;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* handle) {
    SW_ENTER_RELEASE
    SW_REQUIRE(handle, CUDA_ERROR_INVALID_VALUE)
    *handle = current_context() ? current_context()->handle : nullptr;
    return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext handle) {
    SW_ENTER_RELEASE
    Context* context = find_context(handle);
    SW_REQUIRE(!handle || context, CUDA_ERROR_INVALID_CONTEXT)
    if (!current_contexts.empty()) current_contexts.pop_back();
    if (context) current_contexts.push_back(context);
    return CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent(CUcontext handle) {
    SW_ENTER_ANY
    Context* context = find_context(handle);
    SW_REQUIRE(context, CUDA_ERROR_INVALID_CONTEXT)
    current_contexts.push_back(context);
    return CUDA_SUCCESS;
}
CUresult cuCtxPopCurrent(CUcontext* handle) {
    SW_ENTER_ANY
    SW_REQUIRE(current_context(), CUDA_ERROR_INVALID_CONTEXT)
    if (handle) *handle = current_context()->handle;
    current_contexts.pop_back();
    return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) {
    SW_ENTER_ANY
    SW_REQUIRE(current_context(), CUDA_ERROR_INVALID_CONTEXT)
    *device = current_context()->device;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice_v2(CUdevice* device, CUcontext handle) {
    if (!handle) return cuCtxGetDevice(device);
    SW_ENTER_ANY
    Context* context = find_context(handle);
    SW_REQUIRE(context, CUDA_ERROR_INVALID_CONTEXT)
    *device = context->device;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetFlags(unsigned* flags) {
    SW_ENTER
    *flags = context->flags;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetId(CUcontext handle, unsigned long long* id) {
    SW_ENTER_ANY
    Context* context = handle ? find_context(handle) : current_context();
    SW_REQUIRE(context && id, CUDA_ERROR_CONTEXT_IS_DESTROYED)
    *id = reinterpret_cast<uintptr_t>(context->handle);
    return CUDA_SUCCESS;
}
CUresult cuCtxGetApiVersion(CUcontext, unsigned* version) {
    SW_ENTER_ANY
    *version = 3020;
    return CUDA_SUCCESS;
}
static CUresult synchronize(Lock& lock, Context* context) {
    for (auto& [handle, stream] : state().streams)
        if (stream->context == context && stream->capture) {
            invalidate(*stream->capture);
            return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        }
    SW_UNSAFE_IN_CAPTURE
    CUresult error = drain(lock, *context);
    return error ? error : context->sticky;
}
CUresult cuCtxSynchronize() {
    SW_ENTER
    return synchronize(lock, context);
}
CUresult cuCtxSynchronize_v2(CUcontext handle) {
    SW_ENTER
    if (handle) context = find_context(handle);
    SW_REQUIRE(context, CUDA_ERROR_INVALID_CONTEXT)
    return synchronize(lock, context);
}
CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    SW_ENTER
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return CUDA_SUCCESS;
}
CUresult cuCtxEnablePeerAccess(CUcontext handle, unsigned flags) {
    SW_ENTER
    Context* peer = find_context(handle);
    SW_REQUIRE(peer && peer != context, CUDA_ERROR_INVALID_CONTEXT)
    SW_REQUIRE(flags == 0, CUDA_ERROR_INVALID_VALUE)
    SW_REQUIRE(state().config.peer_access, CUDA_ERROR_PEER_ACCESS_UNSUPPORTED)
    SW_REQUIRE(!context->peers[peer->device], CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED)
    context->peers[peer->device] = true;
    return CUDA_SUCCESS;
}
CUresult cuCtxDisablePeerAccess(CUcontext handle) {
    SW_ENTER
    Context* peer = find_context(handle);
    SW_REQUIRE(peer, CUDA_ERROR_INVALID_CONTEXT)
    SW_REQUIRE(context->peers[peer->device], CUDA_ERROR_PEER_ACCESS_NOT_ENABLED)
    context->peers[peer->device] = false;
    return CUDA_SUCCESS;
}

}  // extern "C"
