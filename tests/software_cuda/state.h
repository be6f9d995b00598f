// What the parts of the software driver share: devices, contexts, memory, streams, events, graphs and one lock.
//
// To developers: every function of the driver takes `state().lock` and holds it until it returns; what a stream does
// (`Work::run`) runs without it. Handles that callers see are numbers that are never used twice, so that a stale one is
// found; they map to shared pointers, so that destroying a stream or an event that is still in use harms nobody.
#pragma once

#include <cuda.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace swcuda {

using Lock = std::unique_lock<std::mutex>;
using Clock = std::chrono::steady_clock;

struct Stream;
struct Capture;
struct Context;

// A point in a stream's work: what events record and what later work waits for.
struct Point {
    std::weak_ptr<Stream> stream;
    uint64_t index = 0;
    bool done = false;
    CUresult error = CUDA_SUCCESS;
    Clock::time_point when;
};
using PointPtr = std::shared_ptr<Point>;

// One piece of work, and one node of a graph: its parameters are held by value.
struct Work {
    CUgraphNodeType type = CU_GRAPH_NODE_TYPE_EMPTY;
    std::function<CUresult()> run;
    Context* context = nullptr;
    // Of a copy, for cuGraphMemcpyNodeGetParams: addresses as numbers.
    uintptr_t destination = 0, source = 0;
    size_t bytes = 0;
    // Of a kernel, for cuGraphKernelNodeGetParams.
    CUDA_KERNEL_NODE_PARAMS kernel{};
    std::shared_ptr<void> keep;
};

struct Item {
    Work work;
    PointPtr point;
    std::vector<PointPtr> waits;
};

// An in-order queue and the thread that empties it.
struct Stream : std::enable_shared_from_this<Stream> {
    Context* context = nullptr;
    CUstream handle = nullptr;
    uint64_t id = 0;
    unsigned flags = 0;
    int priority = 0;
    bool legacy = false;
    bool held = false;
    bool closed = false;
    bool started = false;
    uint64_t submitted = 0, demanded = 0;
    std::deque<Item> items;
    PointPtr last;
    std::shared_ptr<Capture> capture;
    std::vector<size_t> capture_dependencies;
    // Kept for cuStreamGetCaptureInfo, which lends its caller an array.
    std::vector<CUgraphNode> capture_handles;

    bool blocking() const { return !legacy && !(flags & CU_STREAM_NON_BLOCKING); }
    void serve();
};
using StreamPtr = std::shared_ptr<Stream>;

struct Event {
    Context* context = nullptr;
    unsigned flags = 0;
    PointPtr point;
    std::shared_ptr<Capture> capture;
    std::vector<size_t> capture_dependencies;
};
using EventPtr = std::shared_ptr<Event>;

struct Node {
    Work work;
    std::vector<size_t> dependencies;
    CUgraphNode handle = nullptr;
};

struct Graph {
    CUgraph handle = nullptr;
    std::vector<Node> nodes;
};
using GraphPtr = std::shared_ptr<Graph>;

struct GraphExec {
    // In the order of running: any that respects the dependencies may be taken, see `topological_order`.
    std::vector<Work> works;
    PointPtr last;
    unsigned long long flags = 0;
};
using GraphExecPtr = std::shared_ptr<GraphExec>;

struct Capture {
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
    std::thread::id thread;
    Stream* origin = nullptr;
    std::vector<Stream*> streams;
    GraphPtr graph;
    uint64_t id = 0;
    bool invalid = false;
    bool ended = false;
};

struct Block {
    enum class Kind { device, pinned };
    Kind kind = Kind::device;
    uintptr_t base = 0;
    size_t size = 0;
    uint64_t id = 0;
    int device = 0;
    Context* context = nullptr;
    void* map = nullptr;
    size_t map_bytes = 0;
    // Copies and kernels at work in it right now; it is unmapped only when there are none.
    int users = 0;
};

struct Context {
    int device = 0;
    CUcontext handle = nullptr;
    int references = 0;
    bool active = false;
    unsigned flags = 0;
    // The error that lost the context: every later call returns it.
    CUresult sticky = CUDA_SUCCESS;
    StreamPtr legacy;
    std::vector<bool> peers;
};

constexpr int max_devices = 8;

struct Config {
    int devices = 2;
    int compute_major = 9, compute_minor = 0;
    int driver_version = 13000;
    int init_error = 0;
    int peer_access = 1;
    // Work runs only when somebody waits for it, as late as CUDA's rules allow.
    int lazy = 0;
    int multiprocessors = 132;
    size_t memory = size_t(1) << 30;
    // After so long a host thread that waits is told so, instead of hanging a test run.
    int patience_s = 60;
};

struct Counters {
    std::atomic<long long> allocations{0}, copies{0}, memsets{0}, launches{0}, graph_launches{0}, host_functions{0};
    std::atomic<long long> streams_created{0}, events_created{0}, graphs_instantiated{0};
    long long device_bytes[max_devices] = {}, device_blocks = 0, pinned_bytes = 0, pinned_blocks = 0;
};

struct State {
    std::mutex lock;
    std::condition_variable changed;
    Config config;
    Counters counters;
    bool initialised = false;
    uint64_t next_number = 1;
    // Work that is queued or running, on whatever stream, also on one that has been destroyed.
    uint64_t unfinished = 0;
    Context contexts[max_devices];
    std::map<uintptr_t, Block> blocks;
    std::unordered_map<void*, StreamPtr> streams;
    std::unordered_map<void*, EventPtr> events;
    std::unordered_map<void*, GraphPtr> graphs;
    std::unordered_map<void*, GraphExecPtr> graph_execs;
    // What went wrong where no return code says it: "a kernel wrote past the end of a block".
    std::vector<std::string> reports;

    // A number nobody has seen, which looks like a pointer.
    void* fresh_handle() { return reinterpret_cast<void*>(uintptr_t(0x7000'0000'0000) + 64 * next_number++); }
};

// Never destroyed: streams' threads wait on it until the process is gone.
State& state();

// device.cpp, and control.cpp for what tests turn and read
extern thread_local bool in_host_function;
extern thread_local std::vector<Context*> current_contexts;
extern thread_local CUstreamCaptureMode capture_mode;
Context* current_context();
// What every call that needs a context begins with; the context comes back through `context`.
CUresult enter(Context*& context);
// The same for calls that need only a started driver.
CUresult enter_any();
// The same for calls that give something back, or say which context is current: Python's collector runs them on any
// thread, also on one that is in a host function, and nobody can keep it from that.
CUresult enter_release();
// Whether there is a context, it has not ended, and it is not lost.
CUresult usable(const Context* context);
// Lose `context`: `error` from now on, `what` in the reports.
void lose(Context& context, CUresult error, const std::string& what);
void report(const std::string& what);
void end_context(Context& context);

// memory.cpp
struct Range {
    uintptr_t address = 0;
    size_t bytes = 0;
    uint64_t block = 0;  // 0: pageable host memory
};
Block* find_block(uintptr_t address);
bool was_freed(uintptr_t address);
// Take the blocks of `ranges` into use, or say which is gone; both without the lock held.
CUresult begin_use(const std::vector<Range>& ranges, Context& context, const char* what);
void end_use(const std::vector<Range>& ranges);
void free_all_of(Context& context);

// stream.cpp
CUresult find_stream(CUstream handle, Context* context, StreamPtr& stream);
// Queue `work` on `stream`, or add it to what the stream captures. `point` is left empty when captured.
CUresult issue(const StreamPtr& stream, Work work, PointPtr* point = nullptr, std::vector<PointPtr> waits = {});
CUresult wait_for(Lock& lock, const PointPtr& point);
void demand(const PointPtr& point);
CUresult drain(Lock& lock, Context& context);

// capture.cpp
// Whether the calling thread may make a call that conflicts with captures under way; those are invalidated if not.
CUresult forbid_unsafe();
CUresult forbid_legacy(Context& context);
void invalidate(Capture& capture);
CUresult add_node(Stream& stream, Work work);
CUresult capture_wait(const StreamPtr& stream, Event& event);
void forget_capturing_stream(Stream& stream);

}  // namespace swcuda

// Every function of the driver opens with one of these.
#define SW_ENTER_ANY                        \
    swcuda::Lock lock(swcuda::state().lock); \
    if (CUresult entered = swcuda::enter_any()) return entered;
#define SW_ENTER                                   \
    swcuda::Lock lock(swcuda::state().lock);        \
    swcuda::Context* context = nullptr;            \
    if (CUresult entered = swcuda::enter(context)) return entered;
#define SW_ENTER_RELEASE                    \
    swcuda::Lock lock(swcuda::state().lock); \
    if (CUresult entered = swcuda::enter_release()) return entered;
#define SW_UNSAFE_IN_CAPTURE \
    if (CUresult forbidden = swcuda::forbid_unsafe()) return forbidden;
#define SW_REQUIRE(condition, error) \
    if (!(condition)) return error;
