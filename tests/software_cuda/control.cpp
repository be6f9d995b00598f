// What tests turn and read, and the table of functions that the driver serves.

#include <algorithm>
#include <cstdio>

#include "state.h"

using namespace swcuda;

extern "C" {

// Set one thing for all devices; 0, or -1 where the key is unknown.
int swcuda_configure(const char* key, long long value) {
    Lock lock(state().lock);
    Config& c = state().config;
    std::string k(key);
    if (k == "devices") c.devices = std::clamp<int>(value, 0, max_devices);
    else if (k == "compute_major") c.compute_major = value;
    else if (k == "compute_minor") c.compute_minor = value;
    else if (k == "driver_version") c.driver_version = value;
    else if (k == "init_error") c.init_error = value, state().initialised = value == 0 && state().initialised;
    else if (k == "peer_access") c.peer_access = value;
    else if (k == "lazy") c.lazy = value;
    else if (k == "multiprocessors") c.multiprocessors = value;
    else if (k == "memory") c.memory = value;
    else if (k == "patience_s") c.patience_s = value;
    else return -1;
    state().changed.notify_all();
    return 0;
}

long long swcuda_modules();

// How much there is of something now, or has been made so far; -1 where the key is unknown.
long long swcuda_count(const char* key) {
    std::string k(key);
    if (k == "modules") return swcuda_modules();
    Lock lock(state().lock);
    State& s = state();
    const Counters& c = s.counters;
    if (k == "device_bytes") {
        long long sum = 0;
        for (long long bytes : c.device_bytes) sum += bytes;
        return sum;
    }
    if (k == "device_blocks") return c.device_blocks;
    if (k == "pinned_bytes") return c.pinned_bytes;
    if (k == "pinned_blocks") return c.pinned_blocks;
    if (k == "allocations") return c.allocations;
    if (k == "copies") return c.copies;
    if (k == "memsets") return c.memsets;
    if (k == "launches") return c.launches;
    if (k == "graph_launches") return c.graph_launches;
    if (k == "host_functions") return c.host_functions;
    if (k == "streams") return s.streams.size();
    if (k == "events") return s.events.size();
    if (k == "graphs") return s.graphs.size();
    if (k == "graph_execs") return s.graph_execs.size();
    if (k == "streams_created") return c.streams_created;
    if (k == "events_created") return c.events_created;
    if (k == "graphs_instantiated") return c.graphs_instantiated;
    if (k == "lost_contexts") {
        long long lost = 0;
        for (Context& context : s.contexts) lost += context.sticky != CUDA_SUCCESS;
        return lost;
    }
    if (k == "context_references") {
        long long references = 0;
        for (Context& context : s.contexts) references += context.references;
        return references;
    }
    if (k == "captures") {
        long long capturing = 0;
        for (auto& [handle, stream] : s.streams) capturing += stream->capture != nullptr;
        return capturing;
    }
    return -1;
}

// Let a stream (0: the legacy stream of `device`) start nothing new from now on, or go on; -1 where there is none.
int swcuda_hold(unsigned long long handle, int device, int held) {
    Lock lock(state().lock);
    StreamPtr stream;
    if (device < 0 || device >= max_devices) return -1;
    if (find_stream(reinterpret_cast<CUstream>(handle), &state().contexts[device], stream)) return -1;
    stream->held = held;
    state().changed.notify_all();
    return 0;
}

// Pieces of work on a stream that are not finished; -1 where there is no such stream.
long long swcuda_pending(unsigned long long handle, int device) {
    Lock lock(state().lock);
    StreamPtr stream;
    if (device < 0 || device >= max_devices) return -1;
    if (find_stream(reinterpret_cast<CUstream>(handle), &state().contexts[device], stream)) return -1;
    return stream->items.size();
}

// Move the oldest report to `text`; its length, 0 where there is none.
int swcuda_take_report(char* text, int length) {
    Lock lock(state().lock);
    if (state().reports.empty()) return 0;
    std::snprintf(text, length, "%s", state().reports.front().c_str());
    state().reports.erase(state().reports.begin());
    return int(std::strlen(text));
}

// Let everything go on that was held or kept for later, and wait for the end of all work: 0, or -1 if it does not end.
// What goes wrong in it then belongs to who issued it, and not to who comes next.
int swcuda_settle() {
    Lock lock(state().lock);
    State& s = state();
    s.config.lazy = 0;
    for (auto& [handle, stream] : s.streams) stream->held = false;
    for (Context& context : s.contexts)
        if (context.legacy) context.legacy->held = false;
    s.changed.notify_all();
    bool ended = s.changed.wait_for(lock, std::chrono::seconds(60), [&] { return s.unfinished == 0; });
    return ended ? 0 : -1;
}

// Bring everything that a test may have turned back: holds, configuration, lost contexts.
// A lost context is ended for good, as CUDA's would be: its memory, streams and events are gone.
void swcuda_reset() {
    Lock lock(state().lock);
    State& s = state();
    s.config = Config{};
    s.initialised = true;
    for (auto& [handle, stream] : s.streams) stream->held = false;
    for (Context& context : s.contexts) {
        if (context.legacy) context.legacy->held = false;
        if (context.sticky) {
            end_context(context);
            context.active = context.references > 0;
        }
    }
    s.changed.notify_all();
}

// The functions served ---------------------------------------------------------------------------------------------------

CUresult cuGetProcAddress_v2(const char*, void**, int, cuuint64_t, CUdriverProcAddressQueryResult*);
CUresult cuStreamGetCaptureInfo_v2(CUstream, CUstreamCaptureStatus*, cuuint64_t*, CUgraph*, const CUgraphNode**, size_t*);

// Nothing of the driver's private tables is served: a CUDA runtime that asks for them says that there is no usable
// driver, which is what libraries with one linked into them (TensorRT) are to find on a machine without a GPU.
CUresult cuGetExportTable(const void** table, const CUuuid*) {
    if (table) *table = nullptr;
    return CUDA_ERROR_NOT_FOUND;
}

struct Served {
    const char* name;
    int since;  // the CUDA version in which this form of the function came
    void* function;
};

// The first argument is the name as callers ask for it; cuda.h's macros make the newest form of it.
#define SW_SERVE(name, since) {#name, since, reinterpret_cast<void*>(name)},
static const Served served[] = {
#include "served.inc"
    {"cuGetProcAddress", 12000, reinterpret_cast<void*>(cuGetProcAddress_v2)},
    {"cuGetProcAddress_v2", 12000, reinterpret_cast<void*>(cuGetProcAddress_v2)},
    {"cuStreamGetCaptureInfo", 11030, reinterpret_cast<void*>(cuStreamGetCaptureInfo_v2)},
    {"cuCtxGetDevice", 13000, reinterpret_cast<void*>(cuCtxGetDevice_v2)},
    {"cuCtxSynchronize", 13000, reinterpret_cast<void*>(cuCtxSynchronize_v2)},
    {"cuStreamGetCtx", 12050, reinterpret_cast<void*>(cuStreamGetCtx_v2)},
    {"cuGetExportTable", 3000, reinterpret_cast<void*>(cuGetExportTable)},
    {"cuGraphInstantiate", 12000, reinterpret_cast<void*>(cuGraphInstantiateWithFlags)},
};

CUresult cuGetProcAddress_v2(const char* name, void** function, int version, cuuint64_t,
                             CUdriverProcAddressQueryResult* status) {
    *function = nullptr;
    int since = -1;
    bool known = false;
    for (const Served& s : served) {
        if (std::strcmp(s.name, name)) continue;
        known = true;
        // A form is asked for by the version in which it came: a newer one than ours is another function.
        if (s.since <= version && s.since > since && version <= state().config.driver_version) {
            since = s.since;
            *function = s.function;
        }
    }
    if (status)
        *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS
                  : known   ? CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT
                            : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

}  // extern "C"
