// Modules, libraries, kernels and their launches. A cubin is checked as far as its header and its names go; what runs is
// the function of the same name that was compiled for the host.

#include <dlfcn.h>
#include <elf.h>

#include <algorithm>

#include "executor.h"
#include "state.h"

namespace swcuda {

namespace {

struct Image {
    // Of the cubin: to look kernels' names up in; empty for an image without sections.
    std::string names;
};

struct Module;

struct Function {
    const swk::Kernel* kernel = nullptr;
    Module* module = nullptr;
    Context* context = nullptr;  // of a CUfunction; a CUkernel belongs to no context
    CUfunction handle = nullptr;
    int dynamic_shared = 48 * 1024;
};

struct Module {
    Image image;
    Context* context = nullptr;
    void* handle = nullptr;
    std::map<std::string, std::unique_ptr<Function>> functions;
};

struct Registry {
    std::map<std::string, const swk::Kernel*> host;
    std::unordered_map<void*, std::shared_ptr<Module>> modules, libraries;
    std::unordered_map<void*, Function*> functions;
};

Registry& registry() {
    static auto& all = *new Registry;
    return all;
}

// The architecture that an image was made for, e.g. 90; 0 where it does not say.
int architecture_of(const Elf64_Ehdr& header) {
    // CUDA 13's format has it in the second byte of the flags, the older one in the first.
    unsigned flags = header.e_flags;
    return header.e_ident[EI_ABIVERSION] >= 8 ? (flags >> 8) & 0xff : flags & 0xff;
}

CUresult read_image(const void* data, Image& image) {
    SW_REQUIRE(data, CUDA_ERROR_INVALID_VALUE)
    auto* bytes = static_cast<const unsigned char*>(data);
    if (std::memcmp(bytes, "//", 2) == 0 || std::memcmp(bytes, ".v", 2) == 0) return CUDA_ERROR_JIT_COMPILER_NOT_FOUND;
    SW_REQUIRE(std::memcmp(bytes, ELFMAG, SELFMAG) == 0, CUDA_ERROR_INVALID_IMAGE)
    Elf64_Ehdr header;
    std::memcpy(&header, data, sizeof header);
    constexpr int machine_cuda = 190;
    SW_REQUIRE(header.e_ident[EI_CLASS] == ELFCLASS64 && header.e_machine == machine_cuda, CUDA_ERROR_INVALID_IMAGE)
    const Config& config = state().config;
    int architecture = architecture_of(header);
    // A cubin runs on its own major architecture, from its minor number on.
    if (architecture && (architecture / 10 != config.compute_major || architecture % 10 > config.compute_minor))
        return CUDA_ERROR_NO_BINARY_FOR_GPU;
    // The function's names are in the string table of the symbols.
    for (unsigned i = 0; i < header.e_shnum; ++i) {
        Elf64_Shdr section;
        std::memcpy(&section, bytes + header.e_shoff + i * header.e_shentsize, sizeof section);
        if (section.sh_type == SHT_STRTAB)
            image.names.append(reinterpret_cast<const char*>(bytes + section.sh_offset), section.sh_size);
    }
    return CUDA_SUCCESS;
}

bool has_name(const Image& image, const std::string& name) {
    std::string bounded = std::string(1, '\0') + name + '\0';
    return image.names.find(bounded) != std::string::npos;
}

CUresult get_function(Module& module, const char* name, Context* context, void** handle) {
    SW_REQUIRE(name && handle, CUDA_ERROR_INVALID_VALUE)
    std::string key = std::string(name) + (context ? "" : "/kernel");
    auto known = module.functions.find(key);
    if (known == module.functions.end()) {
        SW_REQUIRE(has_name(module.image, name), CUDA_ERROR_NOT_FOUND)
        auto host = registry().host.find(name);
        if (host == registry().host.end()) {
            report(std::string("kernel ") + name + " has no code for the host: give its source to add_kernels");
            return CUDA_ERROR_NOT_FOUND;
        }
        auto made = std::make_unique<Function>();
        made->kernel = host->second;
        made->module = &module;
        made->context = context;
        made->handle = static_cast<CUfunction>(state().fresh_handle());
        registry().functions.emplace(made->handle, made.get());
        known = module.functions.emplace(key, std::move(made)).first;
    }
    *handle = known->second->handle;
    return CUDA_SUCCESS;
}

Function* find_function(const void* handle) {
    auto found = registry().functions.find(const_cast<void*>(handle));
    return found == registry().functions.end() ? nullptr : found->second;
}

CUresult load(const void* data, Context* context, std::unordered_map<void*, std::shared_ptr<Module>>& where,
              void** handle) {
    SW_REQUIRE(handle, CUDA_ERROR_INVALID_VALUE)
    // Loading may need the whole context to be still, which a capture cannot wait for.
    if (CUresult e = forbid_unsafe()) return e;
    auto module = std::make_shared<Module>();
    if (CUresult e = read_image(data, module->image)) return e;
    module->context = context;
    *handle = module->handle = state().fresh_handle();
    where.emplace(*handle, module);
    return CUDA_SUCCESS;
}

CUresult unload(std::unordered_map<void*, std::shared_ptr<Module>>& where, void* handle) {
    auto found = where.find(handle);
    SW_REQUIRE(found != where.end(), CUDA_ERROR_INVALID_HANDLE)
    for (auto& [name, function] : found->second->functions) registry().functions.erase(function->handle);
    where.erase(found);
    return CUDA_SUCCESS;
}

// A kernel's arguments, copied at the launch.
struct Arguments {
    std::vector<std::unique_ptr<unsigned char[]>> values;
    std::vector<void*> addresses;
};

// Whether code on `context`'s device may use `block`.
bool reachable(const Context& context, const Block& block) {
    if (block.kind == Block::Kind::pinned || block.device == context.device) return true;
    return size_t(block.device) < context.peers.size() && context.peers[block.device];
}

CUresult launch(CUfunction handle, swk::Index grid, swk::Index block, unsigned shared, CUstream stream_handle,
                void** parameters, void** extra, Context& context) {
    Function* function = find_function(handle);
    SW_REQUIRE(function, CUDA_ERROR_INVALID_HANDLE)
    SW_REQUIRE(!extra, CUDA_ERROR_NOT_SUPPORTED)
    const swk::Kernel& kernel = *function->kernel;
    StreamPtr stream;
    if (CUresult e = find_stream(stream_handle, &context, stream)) return e;
    SW_REQUIRE(!function->context || function->context == stream->context, CUDA_ERROR_INVALID_HANDLE)
    if (stream->legacy) {
        if (CUresult e = forbid_legacy(context)) return e;
    }
    uint64_t threads = uint64_t(block.x) * block.y * block.z;
    SW_REQUIRE(threads && grid.x && grid.y && grid.z, CUDA_ERROR_INVALID_VALUE)
    SW_REQUIRE(block.x <= 1024 && block.y <= 1024 && block.z <= 64 && threads <= uint64_t(kernel.max_threads),
               CUDA_ERROR_INVALID_VALUE)
    SW_REQUIRE(grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535, CUDA_ERROR_INVALID_VALUE)
    SW_REQUIRE(shared <= unsigned(function->dynamic_shared), CUDA_ERROR_INVALID_VALUE)
    SW_REQUIRE(parameters || kernel.count == 0, CUDA_ERROR_INVALID_VALUE)
    auto arguments = std::make_shared<Arguments>();
    std::vector<Range> ranges;
    std::string stray;
    for (int i = 0; i < kernel.count; ++i) {
        SW_REQUIRE(parameters[i], CUDA_ERROR_INVALID_VALUE)
        arguments->values.push_back(std::make_unique<unsigned char[]>(kernel.sizes[i]));
        std::memcpy(arguments->values.back().get(), parameters[i], kernel.sizes[i]);
        arguments->addresses.push_back(arguments->values.back().get());
        if (!kernel.pointers[i]) continue;
        uintptr_t address;
        std::memcpy(&address, parameters[i], sizeof address);
        if (!address) continue;
        Block* memory = find_block(address);
        if (memory && reachable(*stream->context, *memory))
            ranges.push_back({address, 0, memory->id});
        else if (stray.empty())
            stray = std::string("kernel ") + kernel.name + ": argument " + std::to_string(i) + " points to no memory that cuda:" +
                    std::to_string(stream->context->device) + " can reach";
    }
    Work work;
    work.type = CU_GRAPH_NODE_TYPE_KERNEL;
    work.context = stream->context;
    work.keep = arguments;
    work.kernel.func = handle;
    work.kernel.gridDimX = grid.x, work.kernel.gridDimY = grid.y, work.kernel.gridDimZ = grid.z;
    work.kernel.blockDimX = block.x, work.kernel.blockDimY = block.y, work.kernel.blockDimZ = block.z;
    work.kernel.sharedMemBytes = shared;
    work.kernel.kernelParams = arguments->addresses.data();
    Context* where = stream->context;
    const swk::Kernel* code = &kernel;
    work.run = [arguments, ranges, stray, grid, block, shared, where, code] {
        if (!stray.empty()) {
            Lock lock(state().lock);
            lose(*where, CUDA_ERROR_ILLEGAL_ADDRESS, stray);
            return CUDA_ERROR_ILLEGAL_ADDRESS;
        }
        if (CUresult e = begin_use(ranges, *where, code->name)) return e;
        std::string message;
        CUresult error = run_kernel({code, grid, block, shared, arguments->addresses.data()}, message);
        end_use(ranges);
        if (error) {
            Lock lock(state().lock);
            lose(*where, error, message);
        }
        return error;
    };
    state().counters.launches++;
    return issue(stream, std::move(work));
}

CUresult attribute(int* value, CUfunction_attribute which, const Function& function) {
    const Config& config = state().config;
    switch (which) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = function.kernel->max_threads; break;
        case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 32; break;
        case CU_FUNC_ATTRIBUTE_PTX_VERSION:
        case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *value = config.compute_major * 10 + config.compute_minor; break;
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = function.dynamic_shared; break;
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult set_attribute(Function& function, CUfunction_attribute which, int value) {
    if (which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        SW_REQUIRE(value >= 0 && value <= 227 * 1024, CUDA_ERROR_INVALID_VALUE)
        function.dynamic_shared = value;
        return CUDA_SUCCESS;
    }
    return which == CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult parameter(const Function& function, size_t index, size_t* offset, size_t* size) {
    SW_REQUIRE(index < size_t(function.kernel->count), CUDA_ERROR_INVALID_VALUE)
    size_t at = 0;
    for (size_t i = 0;; ++i) {
        size_t bytes = function.kernel->sizes[i], unit = std::min<size_t>(bytes & -bytes, 16);
        at = (at + unit - 1) / unit * unit;
        if (i == index) {
            if (offset) *offset = at;
            if (size) *size = bytes;
            return CUDA_SUCCESS;
        }
        at += bytes;
    }
}

}  // namespace

}  // namespace swcuda

using namespace swcuda;

extern "C" {

// Take the kernels of a shared object that `build.py` made: how many there are, or -1 and a report.
int swcuda_add_kernels(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    Lock lock(state().lock);
    auto* table = library ? reinterpret_cast<swk::Table (*)()>(dlsym(library, "swk_table")) : nullptr;
    if (!table) {
        const char* error = dlerror();
        report(std::string("kernels cannot be loaded: ") + (error ? error : path));
        return -1;
    }
    int count = 0;
    for (const swk::Kernel* kernel = table(); kernel->name; ++kernel, ++count) registry().host[kernel->name] = kernel;
    return count;
}

long long swcuda_modules() {
    Lock lock(state().lock);
    return registry().modules.size() + registry().libraries.size();
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    SW_ENTER
    return load(image, context, registry().modules, reinterpret_cast<void**>(module));
}
CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
    return cuModuleLoadData(module, image);
}
CUresult cuModuleUnload(CUmodule module) {
    SW_ENTER_RELEASE
    return unload(registry().modules, module);
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    SW_ENTER
    auto found = registry().modules.find(module);
    SW_REQUIRE(found != registry().modules.end(), CUDA_ERROR_INVALID_HANDLE)
    return get_function(*found->second, name, found->second->context, reinterpret_cast<void**>(function));
}
CUresult cuModuleGetLoadingMode(CUmoduleLoadingMode* mode) {
    SW_ENTER_ANY
    *mode = CU_MODULE_EAGER_LOADING;
    return CUDA_SUCCESS;
}

CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option*, void**, unsigned, CUlibraryOption*,
                           void**, unsigned) {
    SW_ENTER_ANY
    return load(code, nullptr, registry().libraries, reinterpret_cast<void**>(library));
}
CUresult cuLibraryUnload(CUlibrary library) {
    SW_ENTER_RELEASE
    return unload(registry().libraries, library);
}
CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
    SW_ENTER_ANY
    auto found = registry().libraries.find(library);
    SW_REQUIRE(found != registry().libraries.end(), CUDA_ERROR_INVALID_HANDLE)
    return get_function(*found->second, name, nullptr, reinterpret_cast<void**>(kernel));
}
CUresult cuLibraryGetModule(CUmodule* module, CUlibrary library) {
    SW_ENTER
    auto found = registry().libraries.find(library);
    SW_REQUIRE(found != registry().libraries.end() && module, CUDA_ERROR_INVALID_HANDLE)
    auto made = std::make_shared<Module>();
    made->image = found->second->image;
    made->context = context;
    made->handle = state().fresh_handle();
    *module = static_cast<CUmodule>(made->handle);
    registry().modules.emplace(made->handle, made);
    return CUDA_SUCCESS;
}
CUresult cuKernelGetFunction(CUfunction* out, CUkernel kernel) {
    SW_ENTER
    Function* function = find_function(kernel);
    SW_REQUIRE(function && out, CUDA_ERROR_INVALID_HANDLE)
    return get_function(*function->module, function->kernel->name, context, reinterpret_cast<void**>(out));
}
CUresult cuKernelGetName(const char** name, CUkernel kernel) {
    SW_ENTER_ANY
    Function* function = find_function(kernel);
    SW_REQUIRE(function && name, CUDA_ERROR_INVALID_HANDLE)
    *name = function->kernel->name;
    return CUDA_SUCCESS;
}
CUresult cuKernelGetLibrary(CUlibrary* library, CUkernel kernel) {
    SW_ENTER_ANY
    Function* function = find_function(kernel);
    SW_REQUIRE(function && library, CUDA_ERROR_INVALID_HANDLE)
    *library = static_cast<CUlibrary>(function->module->handle);
    return CUDA_SUCCESS;
}
CUresult cuKernelGetAttribute(int* value, CUfunction_attribute which, CUkernel kernel, CUdevice) {
    SW_ENTER_ANY
    Function* function = find_function(kernel);
    SW_REQUIRE(function && value, CUDA_ERROR_INVALID_HANDLE)
    return attribute(value, which, *function);
}
CUresult cuKernelSetAttribute(CUfunction_attribute which, int value, CUkernel kernel, CUdevice) {
    SW_ENTER_ANY
    Function* function = find_function(kernel);
    SW_REQUIRE(function, CUDA_ERROR_INVALID_HANDLE)
    return set_attribute(*function, which, value);
}
CUresult cuKernelGetParamInfo(CUkernel kernel, size_t index, size_t* offset, size_t* size) {
    SW_ENTER_ANY
    Function* function = find_function(kernel);
    SW_REQUIRE(function, CUDA_ERROR_INVALID_HANDLE)
    return parameter(*function, index, offset, size);
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction handle) {
    SW_ENTER
    Function* function = find_function(handle);
    SW_REQUIRE(function && value, CUDA_ERROR_INVALID_HANDLE)
    return attribute(value, which, *function);
}
CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute which, int value) {
    SW_ENTER
    Function* function = find_function(handle);
    SW_REQUIRE(function, CUDA_ERROR_INVALID_HANDLE)
    return set_attribute(*function, which, value);
}
CUresult cuFuncSetCacheConfig(CUfunction handle, CUfunc_cache) {
    SW_ENTER
    return find_function(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
CUresult cuFuncGetModule(CUmodule* module, CUfunction handle) {
    SW_ENTER
    Function* function = find_function(handle);
    SW_REQUIRE(function && module, CUDA_ERROR_INVALID_HANDLE)
    *module = static_cast<CUmodule>(function->module->handle);
    return CUDA_SUCCESS;
}
CUresult cuFuncGetName(const char** name, CUfunction handle) {
    SW_ENTER
    Function* function = find_function(handle);
    SW_REQUIRE(function && name, CUDA_ERROR_INVALID_HANDLE)
    *name = function->kernel->name;
    return CUDA_SUCCESS;
}
CUresult cuFuncGetParamInfo(CUfunction handle, size_t index, size_t* offset, size_t* size) {
    SW_ENTER
    Function* function = find_function(handle);
    SW_REQUIRE(function, CUDA_ERROR_INVALID_HANDLE)
    return parameter(*function, index, offset, size);
}
CUresult cuFuncLoad(CUfunction handle) {
    SW_ENTER
    return find_function(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction handle, int threads, size_t shared,
                                                              unsigned) {
    SW_ENTER
    SW_REQUIRE(blocks && find_function(handle) && threads > 0, CUDA_ERROR_INVALID_VALUE)
    // What threads and shared memory allow on a multiprocessor of 2048 threads and 228 KiB; registers are not known.
    size_t by_shared = shared ? (228 * 1024) / (shared + 1024) : 32;
    *blocks = int(std::min<size_t>({size_t(2048 / threads), by_shared, 32}));
    return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction handle, int threads, size_t shared) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, handle, threads, shared, 0);
}

CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void** parameters, void** extra) {
    SW_ENTER
    return launch(f, {gx, gy, gz}, {bx, by, bz}, shared, stream, parameters, extra, *context);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** parameters, void** extra) {
    SW_ENTER
    SW_REQUIRE(c, CUDA_ERROR_INVALID_VALUE)
    return launch(f, {c->gridDimX, c->gridDimY, c->gridDimZ}, {c->blockDimX, c->blockDimY, c->blockDimZ},
                  c->sharedMemBytes, c->hStream, parameters, extra, *context);
}

}  // extern "C"
