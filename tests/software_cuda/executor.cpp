// Fibres: every thread of a block runs on a stack of its own until it meets a barrier. A thread that meets none never
// leaves the stack it was started on, and the next thread goes on there: kernels without barriers cost no switches.

#include "executor.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace swcuda {

namespace {

constexpr size_t stack_bytes = 256 * 1024, guard_bytes = 4096;

struct Fibre {
    void* stack = nullptr;
    jmp_buf environment;
    ucontext_t start;
    bool begun = false;
    swk::Lane* lane = nullptr;
};

// The lanes of a warp that were named by one mask, and what they brought.
struct WarpBarrier {
    unsigned mask = 0, arrived = 0, generation = 0;
    swk::Slot slots[2][32];
    std::vector<Fibre*> waiting;
};

// Shared memory of a block: it ends where its last page ends, and the next page may not be touched; what lies beside it
// in its own pages holds a pattern that is looked at when the block has ended.
class SharedMemory {
public:
    SharedMemory() = default;
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;
    ~SharedMemory() {
        if (map_) munmap(map_, map_bytes_);
    }

    // Filled as fresh memory of the device is: NaN.
    void* begin_block(size_t bytes) {
        size_t space = (bytes + 15) / 16 * 16, body = (space + page + before - 1) / page * page;
        if (!map_ || body + page > map_bytes_) {
            if (map_) munmap(map_, map_bytes_);
            map_bytes_ = body + page;
            map_ = static_cast<unsigned char*>(
                mmap(nullptr, map_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
            mprotect(map_ + map_bytes_ - page, page, PROT_NONE);
        }
        end_ = map_ + map_bytes_ - page;
        start_ = end_ - space;
        std::memset(start_ - before, canary, before);
        std::memset(start_, 0xff, bytes);
        std::memset(start_ + bytes, canary, space - bytes);
        bytes_ = bytes;
        in_use = true;
        return start_;
    }
    void* start() const { return start_; }
    bool intact() const {
        for (auto* p = start_ - before; p < start_; ++p)
            if (*p != canary) return false;
        for (auto* p = start_ + bytes_; p < end_; ++p)
            if (*p != canary) return false;
        return true;
    }

    bool in_use = false;

private:
    static constexpr size_t page = 4096, before = 64;
    static constexpr unsigned char canary = 0xc5;
    unsigned char *map_ = nullptr, *start_ = nullptr, *end_ = nullptr;
    size_t map_bytes_ = 0, bytes_ = 0;
};

// One kernel under way on this thread.
struct Run {
    const Launch* launch = nullptr;
    std::vector<swk::Lane> lanes;
    std::vector<bool> exited;
    unsigned next_lane = 0, exits = 0;
    std::deque<Fibre*> ready;
    std::vector<Fibre*> idle;
    Fibre* current = nullptr;
    jmp_buf scheduler;
    sigjmp_buf abort;
    // __syncthreads
    unsigned arrived = 0;
    int line = 0;
    std::vector<Fibre*> waiting;
    // per warp
    std::vector<std::map<unsigned, std::unique_ptr<WarpBarrier>>> warps;
    CUresult error = CUDA_SUCCESS;
    std::string message;
    volatile uintptr_t fault_address = 0;
    volatile int fault = 0;
};

thread_local Run* running = nullptr;

// Kept from one kernel to the next.
struct Stacks {
    std::vector<std::unique_ptr<Fibre>> all;
    std::map<const void*, SharedMemory> shared;
    SharedMemory dynamic_shared;
    void* signal_stack = nullptr;
    ~Stacks() {
        for (auto& fibre : all) munmap(fibre->stack, stack_bytes + guard_bytes);
        if (signal_stack) {
            stack_t off{};
            off.ss_flags = SS_DISABLE;
            sigaltstack(&off, nullptr);
            free(signal_stack);
        }
    }
};
thread_local Stacks stacks;

// What a kernel's mistakes come out as: memory that is not there; an index that leaves its array (see build.py), which
// is an illegal instruction; an integer divided by zero.
constexpr int faults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
struct sigaction previous_actions[NSIG];

void on_fault(int signal, siginfo_t* info, void* context) {
    if (running) {
        running->fault_address = reinterpret_cast<uintptr_t>(info->si_addr);
        running->fault = signal;
        siglongjmp(running->abort, 1);
    }
    struct sigaction& previous = previous_actions[signal];
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(signal);
    } else {
        // Not ours: the instruction is run again, and the default action ends the process.
        sigaction(signal, &previous, nullptr);
    }
}

void catch_faults() {
    static std::mutex& lock = *new std::mutex;
    std::lock_guard<std::mutex> guard(lock);
    for (int signal : faults) {
        struct sigaction now;
        sigaction(signal, nullptr, &now);
        // Somebody may have put a handler over ours since the last kernel (faulthandler does).
        if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_fault) continue;
        previous_actions[signal] = now;
        struct sigaction ours {};
        ours.sa_sigaction = on_fault;
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(signal, &ours, nullptr);
    }
    if (!stacks.signal_stack) {
        constexpr size_t bytes = 64 * 1024;
        stacks.signal_stack = malloc(bytes);
        stack_t on{};
        on.ss_sp = stacks.signal_stack;
        on.ss_size = bytes;
        sigaltstack(&on, nullptr);
    }
}

// A fibre's whole life: threads that have not begun, one after the other, then idle until it is needed again.
void fibre_main() {
    for (;;) {
        Run& run = *running;
        Fibre& fibre = *run.current;
        while (run.next_lane < run.lanes.size()) {
            unsigned number = run.next_lane++;
            fibre.lane = swk_lane = &run.lanes[number];
            run.launch->kernel->call(run.launch->arguments);
            run.exited[number] = true;
            run.exits++;
        }
        run.idle.push_back(&fibre);
        if (!_setjmp(fibre.environment)) _longjmp(run.scheduler, 1);
    }
}

Fibre* take_fibre(Run& run) {
    if (!run.idle.empty()) {
        Fibre* fibre = run.idle.back();
        run.idle.pop_back();
        return fibre;
    }
    auto fibre = std::make_unique<Fibre>();
    fibre->stack = mmap(nullptr, stack_bytes + guard_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fibre->stack == MAP_FAILED) return nullptr;
    mprotect(fibre->stack, guard_bytes, PROT_NONE);
    stacks.all.push_back(std::move(fibre));
    return stacks.all.back().get();
}

void resume(Run& run, Fibre* fibre) {
    run.current = fibre;
    swk_lane = fibre->lane;
    if (_setjmp(run.scheduler)) return;
    if (fibre->begun) _longjmp(fibre->environment, 1);
    fibre->begun = true;
    getcontext(&fibre->start);
    fibre->start.uc_stack.ss_sp = static_cast<char*>(fibre->stack) + guard_bytes;
    fibre->start.uc_stack.ss_size = stack_bytes;
    fibre->start.uc_link = nullptr;
    makecontext(&fibre->start, fibre_main, 0);
    setcontext(&fibre->start);
}

// Give way until somebody puts this fibre among the ready ones.
void give_way() {
    Fibre* fibre = running->current;
    if (!_setjmp(fibre->environment)) _longjmp(running->scheduler, 1);
}

void release(Run& run, std::vector<Fibre*>& waiting) {
    run.ready.insert(run.ready.end(), waiting.begin(), waiting.end());
    waiting.clear();
}

[[noreturn]] void abort_run(CUresult error, std::string message) {
    running->error = error;
    running->message = std::move(message);
    siglongjmp(running->abort, 2);
}

std::string where(const Run& run) {
    return std::string("kernel ") + run.launch->kernel->name;
}

void run_block(Run& run) {
    run.next_lane = run.exits = 0;
    run.exited.assign(run.lanes.size(), false);
    run.arrived = 0;
    run.waiting.clear();
    for (auto& warp : run.warps) warp.clear();
    for (auto& [key, variable] : stacks.shared) variable.in_use = false;
    void* dynamic = stacks.dynamic_shared.begin_block(run.launch->shared_bytes);
    for (auto& lane : run.lanes) lane.shared = dynamic;
    for (;;) {
        Fibre* fibre = nullptr;
        // Threads that have not begun come first, so that a barrier is left by all in the order of their numbers.
        if (run.next_lane < run.lanes.size()) {
            fibre = take_fibre(run);
            if (!fibre) abort_run(CUDA_ERROR_OUT_OF_MEMORY, where(run) + ": no memory for its threads' stacks");
        } else if (!run.ready.empty()) {
            fibre = run.ready.front();
            run.ready.pop_front();
        } else {
            break;
        }
        resume(run, fibre);
    }
    if (run.exits == run.lanes.size()) {
        bool intact = stacks.dynamic_shared.intact();
        for (auto& [key, variable] : stacks.shared) intact = intact && (!variable.in_use || variable.intact());
        if (!intact) abort_run(CUDA_ERROR_LAUNCH_FAILED, where(run) + " wrote outside of its shared memory");
        return;
    }
    std::string text = where(run) + ": ";
    if (run.arrived)
        text += std::to_string(run.arrived) + " of " + std::to_string(run.lanes.size()) +
                " threads wait at __syncthreads in line " + std::to_string(run.line) + ", which the others never reach";
    else
        text += "a warp's operation waits for lanes that its mask names and that never come";
    abort_run(CUDA_ERROR_LAUNCH_FAILED, text);
}

void run_grid(Run& run) {
    const Launch& launch = *run.launch;
    size_t threads = size_t(launch.block.x) * launch.block.y * launch.block.z;
    run.lanes.resize(threads);
    run.warps.resize((threads + 31) / 32);
    for (unsigned z = 0; z < launch.grid.z; ++z)
        for (unsigned y = 0; y < launch.grid.y; ++y)
            for (unsigned x = 0; x < launch.grid.x; ++x) {
                for (unsigned number = 0; number < threads; ++number) {
                    swk::Lane& lane = run.lanes[number];
                    lane.thread = {number % launch.block.x, number / launch.block.x % launch.block.y,
                                   number / launch.block.x / launch.block.y};
                    lane.block = {x, y, z};
                    lane.block_size = launch.block;
                    lane.grid_size = launch.grid;
                    lane.number = number;
                }
                run_block(run);
            }
}

}  // namespace

CUresult run_kernel(const Launch& launch, std::string& message) {
    catch_faults();
    // On the heap, and reached through a pointer that the jumps below do not change.
    auto owner = std::make_unique<Run>();
    Run* run = owner.get();
    run->launch = &launch;
    for (auto& fibre : stacks.all) run->idle.push_back(fibre.get());
    running = run;
    int stopped = sigsetjmp(run->abort, 1);
    if (stopped == 0) {
        run_grid(*run);
    } else {
        // The fibres stand somewhere in the kernel: they begin anew next time.
        for (auto& fibre : stacks.all) fibre->begun = false;
        if (stopped == 1) {
            char address[32];
            snprintf(address, sizeof address, "0x%zx", size_t(run->fault_address));
            if (run->fault == SIGILL || run->fault == SIGFPE) {
                run->error = CUDA_ERROR_LAUNCH_FAILED;
                run->message = where(*run) + (run->fault == SIGILL ? ": an index left its array" : " divided an integer by zero");
            } else {
                run->error = CUDA_ERROR_ILLEGAL_ADDRESS;
                run->message = where(*run) + " touched " + address + ", which is in no block of memory, or in one that was freed";
            }
        }
    }
    running = nullptr;
    swk_lane = nullptr;
    message = run->message;
    return run->error;
}

}  // namespace swcuda

using namespace swcuda;

extern "C" {

__thread swk::Lane* swk_lane = nullptr;

void swk_sync_threads(int line) {
    Run& run = *running;
    if (run.arrived && run.line != line)
        abort_run(CUDA_ERROR_LAUNCH_FAILED, where(run) + ": threads of one block wait at __syncthreads in line " +
                                                std::to_string(run.line) + " and in line " + std::to_string(line));
    run.line = line;
    run.waiting.push_back(run.current);
    if (++run.arrived == run.lanes.size()) {
        run.arrived = 0;
        release(run, run.waiting);
    }
    give_way();
}

const swk::Slot* swk_exchange(unsigned mask, const void* value, size_t bytes) {
    Run& run = *running;
    unsigned lane = swk_lane->number % 32, warp = swk_lane->number / 32;
    if (!(mask >> lane & 1)) abort_run(CUDA_ERROR_LAUNCH_FAILED, where(run) + ": a lane's mask does not name the lane itself");
    // The last warp of a block may be short; a full mask names those that are there.
    size_t there = run.lanes.size() - size_t(warp) * 32;
    unsigned existing = there >= 32 ? ~0u : (1u << there) - 1;
    auto& barrier = run.warps[warp][mask];
    if (!barrier) {
        barrier = std::make_unique<WarpBarrier>();
        barrier->mask = mask & existing;
        std::memset(barrier->slots, 0xff, sizeof barrier->slots);
    }
    WarpBarrier& b = *barrier;
    unsigned side = b.generation & 1;
    if (bytes) std::memcpy(b.slots[side][lane].bytes, value, bytes);
    b.arrived |= 1u << lane;
    b.waiting.push_back(run.current);
    if (b.arrived == b.mask) {
        b.arrived = 0;
        b.generation++;
        release(run, b.waiting);
    }
    give_way();
    return b.slots[side];
}

void* swk_shared(const void* key, size_t bytes) {
    SharedMemory& variable = stacks.shared[key];
    return variable.in_use ? variable.start() : variable.begin_block(bytes);
}

void swk_trap(const char* what, int line) {
    abort_run(CUDA_ERROR_LAUNCH_FAILED, where(*running) + ": " + what + (line ? " in line " + std::to_string(line) : std::string()));
}

}  // extern "C"
