// Stream capture and graphs: what may not happen while a stream captures, and how a graph is run.

#include <algorithm>
#include <set>

#include "state.h"

// cuda.h declares the older form only for the driver's own build.
extern "C" CUresult cuStreamGetCaptureInfo_v2(CUstream, CUstreamCaptureStatus*, cuuint64_t*, CUgraph*,
                                              const CUgraphNode**, size_t*);

namespace swcuda {

namespace {

GraphPtr find_graph(CUgraph handle) {
    auto found = state().graphs.find(handle);
    return found == state().graphs.end() ? nullptr : found->second;
}

std::vector<Capture*> captures_under_way() {
    std::vector<Capture*> captures;
    for (auto& [handle, stream] : state().streams)
        if (stream->capture && std::find(captures.begin(), captures.end(), stream->capture.get()) == captures.end())
            captures.push_back(stream->capture.get());
    return captures;
}

CUresult refuse(Capture& capture, CUresult error) {
    invalidate(capture);
    return error;
}

// Everything that `from` depends on, itself included.
std::set<size_t> ancestors(const Graph& graph, const std::vector<size_t>& from) {
    std::set<size_t> seen(from.begin(), from.end());
    std::vector<size_t> open(from);
    while (!open.empty()) {
        size_t node = open.back();
        open.pop_back();
        for (size_t dependency : graph.nodes[node].dependencies)
            if (seen.insert(dependency).second) open.push_back(dependency);
    }
    return seen;
}

// An order of running that respects the dependencies and nothing else: of the nodes that may run next, the one that was
// captured last. So work whose order was only luck in the capture comes out in another one here.
std::vector<size_t> topological_order(const Graph& graph) {
    std::vector<size_t> missing(graph.nodes.size());
    std::vector<std::vector<size_t>> next(graph.nodes.size());
    std::set<size_t> ready;
    for (size_t i = 0; i < graph.nodes.size(); ++i) {
        missing[i] = graph.nodes[i].dependencies.size();
        for (size_t dependency : graph.nodes[i].dependencies) next[dependency].push_back(i);
        if (!missing[i]) ready.insert(i);
    }
    std::vector<size_t> order;
    while (!ready.empty()) {
        size_t node = *ready.rbegin();
        ready.erase(node);
        order.push_back(node);
        for (size_t follower : next[node])
            if (--missing[follower] == 0) ready.insert(follower);
    }
    return order;
}

CUresult instantiate(CUgraphExec* handle, CUgraph graph_handle, unsigned long long flags) {
    GraphPtr graph = find_graph(graph_handle);
    SW_REQUIRE(handle && graph, CUDA_ERROR_INVALID_VALUE)
    auto exec = std::make_shared<GraphExec>();
    exec->flags = flags;
    for (size_t node : topological_order(*graph)) exec->works.push_back(graph->nodes[node].work);
    *handle = static_cast<CUgraphExec>(state().fresh_handle());
    state().graph_execs.emplace(*handle, exec);
    state().counters.graphs_instantiated++;
    return CUDA_SUCCESS;
}

Node* find_node(CUgraphNode handle) {
    for (auto& [key, graph] : state().graphs)
        for (Node& node : graph->nodes)
            if (node.handle == handle) return &node;
    return nullptr;
}

CUresult list(const std::vector<CUgraphNode>& nodes, CUgraphNode* out, size_t* count) {
    SW_REQUIRE(count, CUDA_ERROR_INVALID_VALUE)
    if (out) {
        for (size_t i = 0; i < *count; ++i) out[i] = i < nodes.size() ? nodes[i] : nullptr;
        *count = std::min(*count, nodes.size());
    } else {
        *count = nodes.size();
    }
    return CUDA_SUCCESS;
}

void leave(Capture& capture) {
    for (auto& [handle, stream] : state().streams)
        if (stream->capture.get() == &capture) {
            auto keep = stream->capture;
            stream->capture.reset();
            stream->capture_dependencies.clear();
            keep->ended = true;
        }
}

CUresult capture_info(CUstream handle, CUstreamCaptureStatus* status, cuuint64_t* id, CUgraph* graph,
                      const CUgraphNode** dependencies, const CUgraphEdgeData** edges, size_t* count) {
    StreamPtr stream;
    if (CUresult e = find_stream(handle, current_context(), stream)) return e;
    SW_REQUIRE(status, CUDA_ERROR_INVALID_VALUE)
    if (edges) *edges = nullptr;
    if (!stream->capture) {
        *status = CU_STREAM_CAPTURE_STATUS_NONE;
        return CUDA_SUCCESS;
    }
    *status = stream->capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    if (stream->capture->invalid) return CUDA_SUCCESS;
    if (id) *id = stream->capture->id;
    if (graph) *graph = stream->capture->graph->handle;
    stream->capture_handles.clear();
    for (size_t node : stream->capture_dependencies)
        stream->capture_handles.push_back(stream->capture->graph->nodes[node].handle);
    if (dependencies) *dependencies = stream->capture_handles.data();
    if (count) *count = stream->capture_handles.size();
    return CUDA_SUCCESS;
}

}  // namespace

void invalidate(Capture& capture) { capture.invalid = true; }

CUresult forbid_unsafe() {
    if (capture_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_SUCCESS;
    bool forbidden = false;
    for (Capture* capture : captures_under_way()) {
        bool own = capture->thread == std::this_thread::get_id() && capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED;
        bool others = capture_mode == CU_STREAM_CAPTURE_MODE_GLOBAL && capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
        if (!own && !others) continue;
        invalidate(*capture);
        forbidden = true;
    }
    return forbidden ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

CUresult forbid_legacy(Context& context) {
    for (auto& [handle, stream] : state().streams)
        if (stream->context == &context && stream->capture && stream->blocking())
            return refuse(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    return CUDA_SUCCESS;
}

CUresult add_node(Stream& stream, Work work) {
    Capture& capture = *stream.capture;
    if (capture.invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    Node node;
    node.work = std::move(work);
    node.dependencies = stream.capture_dependencies;
    node.handle = static_cast<CUgraphNode>(state().fresh_handle());
    capture.graph->nodes.push_back(std::move(node));
    stream.capture_dependencies = {capture.graph->nodes.size() - 1};
    return CUDA_SUCCESS;
}

CUresult capture_wait(const StreamPtr& stream, Event& event) {
    auto captured = event.capture;
    if (!captured) {
        // A capturing stream cannot wait for work that is not part of the graph.
        return event.point ? refuse(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_ISOLATION) : CUDA_SUCCESS;
    }
    if (captured->ended) {
        if (stream->capture) invalidate(*stream->capture);
        return CUDA_ERROR_CAPTURED_EVENT;
    }
    if (captured->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (stream->legacy) return refuse(*captured, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    if (stream->capture && stream->capture != captured) {
        invalidate(*stream->capture);
        return refuse(*captured, CUDA_ERROR_STREAM_CAPTURE_MERGE);
    }
    if (!stream->capture) {
        stream->capture = captured;
        captured->streams.push_back(stream.get());
    }
    for (size_t node : event.capture_dependencies)
        if (std::find(stream->capture_dependencies.begin(), stream->capture_dependencies.end(), node) ==
            stream->capture_dependencies.end())
            stream->capture_dependencies.push_back(node);
    return CUDA_SUCCESS;
}

void forget_capturing_stream(Stream& stream) {
    auto capture = stream.capture;
    invalidate(*capture);
    stream.capture.reset();
    auto& streams = capture->streams;
    streams.erase(std::remove(streams.begin(), streams.end(), &stream), streams.end());
    if (capture->origin == &stream) leave(*capture);
}

}  // namespace swcuda

using namespace swcuda;

extern "C" {

CUresult cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode mode) {
    SW_ENTER
    StreamPtr stream;
    if (CUresult e = find_stream(handle, context, stream)) return e;
    if (stream->legacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    SW_REQUIRE(!stream->capture, CUDA_ERROR_ILLEGAL_STATE)
    SW_REQUIRE(mode >= CU_STREAM_CAPTURE_MODE_GLOBAL && mode <= CU_STREAM_CAPTURE_MODE_RELAXED, CUDA_ERROR_INVALID_VALUE)
    auto capture = std::make_shared<Capture>();
    capture->mode = mode;
    capture->thread = std::this_thread::get_id();
    capture->origin = stream.get();
    capture->streams = {stream.get()};
    capture->graph = std::make_shared<Graph>();
    capture->graph->handle = static_cast<CUgraph>(state().fresh_handle());
    capture->id = state().next_number++;
    stream->capture = capture;
    stream->capture_dependencies.clear();
    return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    SW_ENTER
    StreamPtr stream;
    if (CUresult e = find_stream(handle, context, stream)) return e;
    SW_REQUIRE(graph, CUDA_ERROR_INVALID_VALUE)
    *graph = nullptr;
    SW_REQUIRE(stream->capture, CUDA_ERROR_ILLEGAL_STATE)
    auto capture = stream->capture;
    if (capture->origin != stream.get()) return refuse(*capture, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
    if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED && capture->thread != std::this_thread::get_id())
        return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    CUresult result = capture->invalid ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
    if (!result) {
        auto joined = ancestors(*capture->graph, stream->capture_dependencies);
        for (Stream* other : capture->streams)
            for (size_t node : other->capture_dependencies)
                if (!joined.count(node)) result = CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
    }
    leave(*capture);
    if (result) {
        capture->invalid = true;
        return result;
    }
    *graph = capture->graph->handle;
    state().graphs.emplace(*graph, capture->graph);
    return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
    SW_ENTER_ANY
    return capture_info(handle, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}

CUresult cuStreamGetCaptureInfo_v2(CUstream handle, CUstreamCaptureStatus* status, cuuint64_t* id, CUgraph* graph,
                                   const CUgraphNode** dependencies, size_t* count) {
    SW_ENTER_ANY
    return capture_info(handle, status, id, graph, dependencies, nullptr, count);
}

CUresult cuStreamGetCaptureInfo(CUstream handle, CUstreamCaptureStatus* status, cuuint64_t* id, CUgraph* graph,
                                const CUgraphNode** dependencies, const CUgraphEdgeData** edges, size_t* count) {
    SW_ENTER_ANY
    return capture_info(handle, status, id, graph, dependencies, edges, count);
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
    SW_ENTER_ANY
    SW_REQUIRE(mode, CUDA_ERROR_INVALID_VALUE)
    std::swap(*mode, capture_mode);
    return CUDA_SUCCESS;
}

CUresult cuGraphCreate(CUgraph* handle, unsigned) {
    SW_ENTER_ANY
    SW_REQUIRE(handle, CUDA_ERROR_INVALID_VALUE)
    auto graph = std::make_shared<Graph>();
    graph->handle = *handle = static_cast<CUgraph>(state().fresh_handle());
    state().graphs.emplace(*handle, graph);
    return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(CUgraph handle) {
    SW_ENTER_RELEASE
    return state().graphs.erase(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGraphGetNodes(CUgraph handle, CUgraphNode* nodes, size_t* count) {
    SW_ENTER_ANY
    GraphPtr graph = find_graph(handle);
    SW_REQUIRE(graph, CUDA_ERROR_INVALID_VALUE)
    std::vector<CUgraphNode> all;
    for (Node& node : graph->nodes) all.push_back(node.handle);
    return list(all, nodes, count);
}

CUresult cuGraphGetRootNodes(CUgraph handle, CUgraphNode* nodes, size_t* count) {
    SW_ENTER_ANY
    GraphPtr graph = find_graph(handle);
    SW_REQUIRE(graph, CUDA_ERROR_INVALID_VALUE)
    std::vector<CUgraphNode> roots;
    for (Node& node : graph->nodes)
        if (node.dependencies.empty()) roots.push_back(node.handle);
    return list(roots, nodes, count);
}

CUresult cuGraphGetEdges(CUgraph handle, CUgraphNode* from, CUgraphNode* to, CUgraphEdgeData* data, size_t* count) {
    SW_ENTER_ANY
    GraphPtr graph = find_graph(handle);
    SW_REQUIRE(graph && count, CUDA_ERROR_INVALID_VALUE)
    size_t found = 0;
    for (Node& node : graph->nodes)
        for (size_t dependency : node.dependencies) {
            if (from && to && found < *count) {
                from[found] = graph->nodes[dependency].handle;
                to[found] = node.handle;
                if (data) data[found] = CUgraphEdgeData{};
            }
            ++found;
        }
    *count = found;
    return CUDA_SUCCESS;
}

CUresult cuGraphNodeGetType(CUgraphNode handle, CUgraphNodeType* type) {
    SW_ENTER_ANY
    Node* node = find_node(handle);
    SW_REQUIRE(node && type, CUDA_ERROR_INVALID_VALUE)
    *type = node->work.type;
    return CUDA_SUCCESS;
}

CUresult cuGraphKernelNodeGetParams(CUgraphNode handle, CUDA_KERNEL_NODE_PARAMS* params) {
    SW_ENTER_ANY
    Node* node = find_node(handle);
    SW_REQUIRE(node && params && node->work.type == CU_GRAPH_NODE_TYPE_KERNEL, CUDA_ERROR_INVALID_VALUE)
    *params = node->work.kernel;
    return CUDA_SUCCESS;
}

CUresult cuGraphMemcpyNodeGetParams(CUgraphNode handle, CUDA_MEMCPY3D* params) {
    SW_ENTER_ANY
    Node* node = find_node(handle);
    SW_REQUIRE(node && params && node->work.type == CU_GRAPH_NODE_TYPE_MEMCPY, CUDA_ERROR_INVALID_VALUE)
    *params = CUDA_MEMCPY3D{};
    params->srcMemoryType = params->dstMemoryType = CU_MEMORYTYPE_UNIFIED;
    params->srcDevice = node->work.source;
    params->dstDevice = node->work.destination;
    params->WidthInBytes = node->work.bytes;
    params->Height = params->Depth = 1;
    return CUDA_SUCCESS;
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long flags) {
    SW_ENTER
    return instantiate(exec, graph, flags);
}

CUresult cuGraphInstantiateWithParams(CUgraphExec* exec, CUgraph graph, CUDA_GRAPH_INSTANTIATE_PARAMS* params) {
    SW_ENTER
    SW_REQUIRE(params, CUDA_ERROR_INVALID_VALUE)
    params->hErrNode_out = nullptr;
    CUresult result = instantiate(exec, graph, params->flags);
    params->result_out = result ? CUDA_GRAPH_INSTANTIATE_ERROR : CUDA_GRAPH_INSTANTIATE_SUCCESS;
    return result;
}

CUresult cuGraphExecDestroy(CUgraphExec handle) {
    SW_ENTER_RELEASE
    return state().graph_execs.erase(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGraphUpload(CUgraphExec handle, CUstream stream_handle) {
    SW_ENTER
    StreamPtr stream;
    if (CUresult e = find_stream(stream_handle, context, stream)) return e;
    SW_REQUIRE(state().graph_execs.count(handle), CUDA_ERROR_INVALID_VALUE)
    return CUDA_SUCCESS;
}

CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream_handle) {
    SW_ENTER
    StreamPtr stream;
    if (CUresult e = find_stream(stream_handle, context, stream)) return e;
    auto found = state().graph_execs.find(handle);
    SW_REQUIRE(found != state().graph_execs.end(), CUDA_ERROR_INVALID_VALUE)
    if (stream->legacy) {
        if (CUresult e = forbid_legacy(*context)) return e;
    }
    GraphExecPtr exec = found->second;
    Work work;
    work.type = CU_GRAPH_NODE_TYPE_GRAPH;
    work.context = stream->context;
    work.run = [exec] {
        for (auto& node : exec->works)
            if (node.run)
                if (CUresult e = node.run()) return e;
        return CUDA_SUCCESS;
    };
    state().counters.graph_launches++;
    // A graph does not overlap with itself, whichever streams it is launched on.
    std::vector<PointPtr> waits;
    if (exec->last && !stream->capture) waits.push_back(exec->last);
    return issue(stream, std::move(work), stream->capture ? nullptr : &exec->last, std::move(waits));
}

}  // extern "C"
