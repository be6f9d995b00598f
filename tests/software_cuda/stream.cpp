// Streams and events. A stream is a queue with a thread; an event is a name for a point in such a queue.

#include <algorithm>

#include "state.h"

namespace swcuda {

namespace {

// Whether `stream` may run its items up to `index` now. In lazy mode that takes somebody who waits for them.
bool wanted(const Stream& stream, uint64_t index) { return !state().config.lazy || index <= stream.demanded; }

EventPtr find_event(CUevent handle) {
    auto found = state().events.find(handle);
    return found == state().events.end() ? nullptr : found->second;
}

// Everything the legacy stream and blocking streams of a context owe to each other.
void order_with_legacy(const StreamPtr& stream, std::vector<PointPtr>& waits) {
    Context& context = *stream->context;
    if (stream->legacy) {
        for (auto& [handle, other] : state().streams)
            if (other->context == &context && other->blocking() && other->last) waits.push_back(other->last);
    } else if (stream->blocking() && context.legacy && context.legacy->last) {
        waits.push_back(context.legacy->last);
    }
}

PointPtr submit(const StreamPtr& stream, Work work, std::vector<PointPtr> waits) {
    order_with_legacy(stream, waits);
    auto point = std::make_shared<Point>();
    point->stream = stream;
    point->index = ++stream->submitted;
    stream->last = point;
    state().unfinished++;
    stream->items.push_back({std::move(work), point, std::move(waits)});
    if (!stream->started) {
        stream->started = true;
        std::thread([stream] { stream->serve(); }).detach();
    }
    state().changed.notify_all();
    return point;
}

StreamPtr legacy_of(Context& context) {
    if (!context.legacy) {
        context.legacy = std::make_shared<Stream>();
        context.legacy->context = &context;
        context.legacy->legacy = true;
        context.legacy->id = state().next_number++;
    }
    return context.legacy;
}

CUresult create_stream(CUstream* handle, unsigned flags, int priority, Context& context) {
    SW_REQUIRE(handle && (flags & ~CU_STREAM_NON_BLOCKING) == 0, CUDA_ERROR_INVALID_VALUE)
    auto stream = std::make_shared<Stream>();
    stream->context = &context;
    stream->flags = flags;
    stream->priority = std::clamp(priority, -5, 0);
    stream->id = state().next_number++;
    stream->handle = *handle = static_cast<CUstream>(state().fresh_handle());
    state().streams.emplace(stream->handle, stream);
    state().counters.streams_created++;
    return CUDA_SUCCESS;
}

CUresult record(CUevent handle, CUstream stream_handle, Context& context) {
    EventPtr event = find_event(handle);
    SW_REQUIRE(event, CUDA_ERROR_INVALID_HANDLE)
    StreamPtr stream;
    if (CUresult e = find_stream(stream_handle, &context, stream)) return e;
    SW_REQUIRE(event->context == stream->context, CUDA_ERROR_INVALID_HANDLE)
    if (stream->capture) {
        if (stream->capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        event->capture = stream->capture;
        event->capture_dependencies = stream->capture_dependencies;
        return CUDA_SUCCESS;
    }
    if (stream->legacy) {
        if (CUresult e = forbid_legacy(context)) return e;
    }
    event->capture.reset();
    Work work;
    work.type = CU_GRAPH_NODE_TYPE_EVENT_RECORD;
    work.context = stream->context;
    event->point = submit(stream, std::move(work), {});
    return CUDA_SUCCESS;
}

}  // namespace

void demand(const PointPtr& point) {
    StreamPtr stream = point->stream.lock();
    if (!stream || point->done || stream->demanded >= point->index) return;
    stream->demanded = point->index;
    state().changed.notify_all();
}

void Stream::serve() {
    State& s = state();
    Lock lock(s.lock);
    for (;;) {
        if (items.empty() && closed) return;
        if (!items.empty() && !held && wanted(*this, items.front().point->index)) {
            Item& item = items.front();
            bool ready = true;
            for (auto& wait : item.waits)
                if (!wait->done) {
                    ready = false;
                    demand(wait);
                }
            if (ready) {
                CUresult error = context->sticky;
                if (!error && item.work.run) {
                    auto run = item.work.run;
                    lock.unlock();
                    error = run();
                    lock.lock();
                }
                PointPtr point = items.front().point;
                // Work is destroyed without the lock: it may hold the last reference to what a caller gave it.
                Item finished = std::move(items.front());
                items.pop_front();
                point->error = error;
                point->when = Clock::now();
                point->done = true;
                s.unfinished--;
                s.changed.notify_all();
                lock.unlock();
                { Item gone = std::move(finished); }
                lock.lock();
                continue;
            }
        }
        s.changed.wait(lock);
    }
}

CUresult find_stream(CUstream handle, Context* context, StreamPtr& stream) {
    if (handle == nullptr || handle == CU_STREAM_LEGACY) {
        SW_REQUIRE(context, CUDA_ERROR_INVALID_CONTEXT)
        stream = legacy_of(*context);
        return CUDA_SUCCESS;
    }
    // The per-thread default stream is not served: nothing of ours may use it.
    auto found = state().streams.find(handle);
    SW_REQUIRE(found != state().streams.end(), CUDA_ERROR_INVALID_HANDLE)
    stream = found->second;
    return CUDA_SUCCESS;
}

CUresult issue(const StreamPtr& stream, Work work, PointPtr* point, std::vector<PointPtr> waits) {
    if (stream->capture) return add_node(*stream, std::move(work));
    PointPtr made = submit(stream, std::move(work), std::move(waits));
    if (point) *point = made;
    return CUDA_SUCCESS;
}

CUresult wait_for(Lock& lock, const PointPtr& point) {
    State& s = state();
    demand(point);
    auto patience = std::chrono::seconds(s.config.patience_s);
    if (!s.changed.wait_for(lock, patience, [&] { return point->done; })) {
        report("a host thread waited for a stream in vain: is the stream still held?");
        return CUDA_ERROR_LAUNCH_TIMEOUT;
    }
    return point->error;
}

CUresult drain(Lock& lock, Context& context) {
    std::vector<PointPtr> points;
    if (context.legacy && context.legacy->last) points.push_back(context.legacy->last);
    for (auto& [handle, stream] : state().streams)
        if (stream->context == &context && stream->last) points.push_back(stream->last);
    for (auto& point : points) demand(point);
    for (auto& point : points)
        if (CUresult e = wait_for(lock, point)) return e;
    return CUDA_SUCCESS;
}

}  // namespace swcuda

using namespace swcuda;

extern "C" {

CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
    SW_ENTER
    return create_stream(stream, flags, 0, *context);
}

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
    SW_ENTER
    return create_stream(stream, flags, priority, *context);
}

CUresult cuStreamDestroy(CUstream handle) {
    SW_ENTER_RELEASE
    auto found = state().streams.find(handle);
    SW_REQUIRE(found != state().streams.end(), CUDA_ERROR_INVALID_HANDLE)
    StreamPtr stream = found->second;
    if (stream->capture) forget_capturing_stream(*stream);
    // What is queued still runs; nobody can ask for it any more, so lazy mode must not keep it back.
    stream->closed = true;
    stream->held = false;
    stream->demanded = stream->submitted;
    state().streams.erase(found);
    state().changed.notify_all();
    return CUDA_SUCCESS;
}

static CUresult plain_stream(CUstream handle, StreamPtr& stream) {
    return find_stream(handle, current_context(), stream);
}

CUresult cuStreamGetPriority(CUstream handle, int* priority) {
    SW_ENTER_ANY
    StreamPtr stream;
    if (CUresult e = plain_stream(handle, stream)) return e;
    *priority = stream->priority;
    return CUDA_SUCCESS;
}

CUresult cuStreamGetFlags(CUstream handle, unsigned* flags) {
    SW_ENTER_ANY
    StreamPtr stream;
    if (CUresult e = plain_stream(handle, stream)) return e;
    *flags = stream->flags;
    return CUDA_SUCCESS;
}

CUresult cuStreamGetId(CUstream handle, unsigned long long* id) {
    SW_ENTER_ANY
    StreamPtr stream;
    if (CUresult e = plain_stream(handle, stream)) return e;
    *id = stream->id;
    return CUDA_SUCCESS;
}

CUresult cuStreamGetCtx(CUstream handle, CUcontext* where) {
    SW_ENTER_ANY
    StreamPtr stream;
    if (CUresult e = plain_stream(handle, stream)) return e;
    *where = stream->context->handle;
    return CUDA_SUCCESS;
}

CUresult cuStreamGetCtx_v2(CUstream handle, CUcontext* where, CUgreenCtx* green) {
    if (green) *green = nullptr;
    return cuStreamGetCtx(handle, where);
}

CUresult cuStreamGetDevice(CUstream handle, CUdevice* device) {
    SW_ENTER_ANY
    StreamPtr stream;
    if (CUresult e = plain_stream(handle, stream)) return e;
    *device = stream->context->device;
    return CUDA_SUCCESS;
}

// Ask or wait for a stream as a whole; one that captures has nothing to wait for, and its capture is spoilt.
static CUresult begin_waiting(CUstream handle, Context& context, StreamPtr& stream) {
    if (CUresult e = find_stream(handle, &context, stream)) return e;
    if (stream->capture) {
        invalidate(*stream->capture);
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    if (stream->legacy) {
        if (CUresult e = forbid_legacy(context)) return e;
    }
    return forbid_unsafe();
}

CUresult cuStreamQuery(CUstream handle) {
    SW_ENTER
    StreamPtr stream;
    if (CUresult e = begin_waiting(handle, *context, stream)) return e;
    if (stream->context->sticky) return stream->context->sticky;
    if (!stream->last) return CUDA_SUCCESS;
    demand(stream->last);
    return stream->last->done ? stream->last->error : CUDA_ERROR_NOT_READY;
}

CUresult cuStreamSynchronize(CUstream handle) {
    SW_ENTER
    StreamPtr stream;
    if (CUresult e = begin_waiting(handle, *context, stream)) return e;
    if (!stream->last) return stream->context->sticky;
    PointPtr point = stream->last;
    CUresult error = wait_for(lock, point);
    return error ? error : stream->context->sticky;
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned) {
    SW_ENTER
    StreamPtr stream;
    if (CUresult e = find_stream(handle, context, stream)) return e;
    EventPtr event = find_event(event_handle);
    SW_REQUIRE(event, CUDA_ERROR_INVALID_HANDLE)
    if (event->capture || stream->capture) return capture_wait(stream, *event);
    if (!event->point) return CUDA_SUCCESS;
    if (stream->legacy) {
        if (CUresult e = forbid_legacy(*context)) return e;
    }
    Work work;
    work.type = CU_GRAPH_NODE_TYPE_WAIT_EVENT;
    work.context = stream->context;
    return issue(stream, std::move(work), nullptr, {event->point});
}

CUresult cuLaunchHostFunc(CUstream handle, CUhostFn function, void* data) {
    SW_ENTER
    SW_REQUIRE(function, CUDA_ERROR_INVALID_VALUE)
    StreamPtr stream;
    if (CUresult e = find_stream(handle, context, stream)) return e;
    if (stream->legacy) {
        if (CUresult e = forbid_legacy(*context)) return e;
    }
    Work work;
    work.type = CU_GRAPH_NODE_TYPE_HOST;
    work.context = stream->context;
    work.run = [function, data] {
        state().counters.host_functions++;
        in_host_function = true;
        function(data);
        in_host_function = false;
        return CUDA_SUCCESS;
    };
    return issue(stream, std::move(work));
}


CUresult cuStreamAddCallback(CUstream handle, CUstreamCallback function, void* data, unsigned) {
    SW_ENTER
    StreamPtr stream;
    if (CUresult e = find_stream(handle, context, stream)) return e;
    if (stream->capture) {
        invalidate(*stream->capture);
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    Work work;
    work.type = CU_GRAPH_NODE_TYPE_HOST;
    work.context = stream->context;
    work.run = [function, data, handle] {
        in_host_function = true;
        function(handle, CUDA_SUCCESS, data);
        in_host_function = false;
        return CUDA_SUCCESS;
    };
    return issue(stream, std::move(work));
}

CUresult cuEventCreate(CUevent* handle, unsigned flags) {
    SW_ENTER
    SW_REQUIRE(handle && !(flags & ~7u), CUDA_ERROR_INVALID_VALUE)
    auto event = std::make_shared<Event>();
    event->context = context;
    event->flags = flags;
    *handle = static_cast<CUevent>(state().fresh_handle());
    state().events.emplace(*handle, event);
    state().counters.events_created++;
    return CUDA_SUCCESS;
}

CUresult cuEventDestroy(CUevent handle) {
    SW_ENTER_RELEASE
    return state().events.erase(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuEventRecord(CUevent handle, CUstream stream) {
    SW_ENTER
    return record(handle, stream, *context);
}

CUresult cuEventRecordWithFlags(CUevent handle, CUstream stream, unsigned flags) {
    SW_ENTER
    SW_REQUIRE(flags == CU_EVENT_RECORD_DEFAULT, CUDA_ERROR_NOT_SUPPORTED)
    return record(handle, stream, *context);
}

// The point of an event to ask or wait for; one that was recorded in a capture has none, and asking spoils the capture.
static CUresult point_of(CUevent handle, EventPtr& event) {
    event = find_event(handle);
    SW_REQUIRE(event, CUDA_ERROR_INVALID_HANDLE)
    if (event->capture) {
        if (!event->capture->ended) invalidate(*event->capture);
        return CUDA_ERROR_CAPTURED_EVENT;
    }
    if (CUresult e = forbid_unsafe()) return e;
    return event->context->sticky;
}

CUresult cuEventQuery(CUevent handle) {
    SW_ENTER_ANY
    EventPtr event;
    if (CUresult e = point_of(handle, event)) return e;
    if (!event->point) return CUDA_SUCCESS;
    demand(event->point);
    return event->point->done ? event->point->error : CUDA_ERROR_NOT_READY;
}

CUresult cuEventSynchronize(CUevent handle) {
    SW_ENTER_ANY
    EventPtr event;
    if (CUresult e = point_of(handle, event)) return e;
    PointPtr point = event->point;
    return point ? wait_for(lock, point) : CUDA_SUCCESS;
}

CUresult cuEventElapsedTime(float* milliseconds, CUevent first, CUevent second) {
    SW_ENTER_ANY
    EventPtr start = find_event(first), end = find_event(second);
    SW_REQUIRE(milliseconds && start && end, CUDA_ERROR_INVALID_HANDLE)
    SW_REQUIRE(!start->capture && !end->capture, CUDA_ERROR_CAPTURED_EVENT)
    SW_REQUIRE(start->point && end->point && start->context == end->context, CUDA_ERROR_INVALID_HANDLE)
    SW_REQUIRE(!((start->flags | end->flags) & CU_EVENT_DISABLE_TIMING), CUDA_ERROR_INVALID_HANDLE)
    SW_REQUIRE(start->point->done && end->point->done, CUDA_ERROR_NOT_READY)
    *milliseconds = std::chrono::duration<float, std::milli>(end->point->when - start->point->when).count();
    return CUDA_SUCCESS;
}

}  // extern "C"
