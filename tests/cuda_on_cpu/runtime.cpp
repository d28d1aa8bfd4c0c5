// Runs a kernel's blocks on the CPU, one after the other, and watches every load and store.
//
// Threads. Each thread of a block is a fibre: a stack, and a place to jump to. It runs until a barrier, a shuffle or a
// vote makes it wait, and the next one continues; a thread that never waits costs no stack of its own. The order of
// threads and of blocks is ascending, descending or shuffled.
//
// Accesses. The compiler puts a call of __tsan_read4(address) and the like before every access. It must lie inside an
// array that was passed to the kernel, in the shared arrays, on the thread's own stack, or (loads) in the module's
// constants; anything else stops the kernel.
//
// Races. Every element of an array, and every shared byte, has a cell that remembers which slice wrote it last and
// which read it last. A slice is one thread's run from one waiting point to the next; all slices are numbered. Two
// accesses of which one is a store must be ordered by a barrier (of the block, or __syncwarp within a warp; a shuffle
// orders no memory), or both be atomic. Different blocks are ordered by nothing but __threadfence and then an atomic,
// after which a later atomic in another block sees what was written. The same cells tell that a shared element is read
// before the block wrote it.
//
// Failing. The first fault fills in a Failure and jumps out of the fibre, back to emu_launch. A SIGSEGV and the like
// in the kernel ends the same way.

#include <link.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

namespace {

struct Index {
    unsigned x, y, z;
};

// --- what Python passes in, and what it gets back (`emulator.py` has the same structures) ---

struct Region {       // the part of an allocation that one argument covers
    uintptr_t low;    // first byte
    uint64_t size;    // bytes
    uintptr_t base;   // of the whole allocation
    uint64_t* cells;  // one for each grain of the allocation
    int grain_shift;  // log2 of the bytes a cell stands for
    uint64_t read, written;  // bytes, counted here
};

struct Range {
    uintptr_t low, high;
};

struct Launch {
    void (*invoke)(void**);
    void** arguments;
    Index grid, block;
    Region* regions;
    const Range* read_only;
    int n_regions, n_read_only;
    int order;  // 0 ascending, 1 descending, 2 shuffled
    unsigned seed;
    int races;          // whether to look for them
    uint64_t patience;  // accesses of one thread from one barrier to the next, before it counts as an endless loop
};

enum What {
    OK,
    OUT_OF_BOUNDS,
    READ_ONLY,
    RACE,
    UNINITIALISED,
    BARRIER,
    SHUFFLE,
    UNDEFINED,
    STOPPED,
    SIGNAL,
    ENDLESS,
};

struct Failure {
    int what;
    int is_write;
    uint64_t address;
    uint64_t size;
    uint64_t program_counter;
    int64_t shared_offset;  // of the address in the module's shared arrays, or -1
    int line;               // where the kernel text itself tells it, else 0
    int n_threads;          // 1: block and thread; 2: the thread `other` of that block as well; 3: `other_block`
    Index block, thread, other_block, other;
    char text[512];
};

// --- threads and warps ---

constexpr size_t STACK = 128 << 10, PAGE = 4 << 10;
constexpr unsigned WARP = 32;
constexpr unsigned MOST_THREADS = 1024;
constexpr uint32_t MOST_SLICES = 1u << 28;  // of one launch; then it is an endless loop with a barrier in it

struct Fibre {
    char* stack = nullptr;
    jmp_buf at;
    bool begun = false;
};

enum State : uint8_t { FRESH, READY, AT_BARRIER, AT_WARP, DONE };

struct Thread {
    Fibre* fibre;
    State state;
    bool acquired;            // it did a global atomic
    uint32_t warp_epoch;      // __syncwarps passed
    uint32_t unfenced_epoch;  // 1 + the block epoch of the last global store that no __threadfence followed; 0: none
    int line;                 // of the barrier or shuffle it waits at
    unsigned mask;            // of the warp operation it waits at
    int operation;
    uint64_t bits;  // what it brings to a warp operation, then what it takes away
    int source;     // the lane it wants
};

enum WarpOperation { SYNC = 100, BALLOT = 101 };  // next to the kinds of shuffle, 0 to 3

struct Slice {
    uint32_t thread, block_epoch, warp_epoch;
};

struct PastBlock {
    uint32_t first_slice, released;  // slices up to `released` are visible to whoever acquires
    uint64_t block;
};

struct Emulator {
    Launch launch;
    Failure* failure;
    pthread_t caller;
    sigjmp_buf leave;
    jmp_buf scheduler;
    bool active = false;

    uintptr_t stack_low = 0;
    uintptr_t shared_low = 0;
    size_t shared_size = 0;
    Range images[8];
    int n_images = 0;

    std::vector<Thread> threads;
    Fibre fibres[MOST_THREADS];
    std::vector<Fibre*> free_fibres;
    std::vector<unsigned> order;  // of the threads
    std::vector<uint64_t> shared_cells;

    unsigned current = 0;  // thread
    unsigned cursor = 0, warp_end = 0;
    unsigned n_threads = 0, n_done = 0, n_at_barrier = 0;
    int barrier_line = 0;
    int vote_kind = -1, votes_true = 0, vote_result = 0;
    uint64_t block = 0;
    uint32_t block_epoch = 0;
    uint64_t accesses = 0;

    uint32_t next_slice = 1, launch_slice = 1, block_slice = 1, slice = 0;
    std::vector<Slice> slices;  // of the current block, from block_slice on
    std::vector<PastBlock> past;
    uint32_t released = 0;
    int64_t acquired_epoch = -1;  // the block epoch in which a thread of this block first did a global atomic, or -1
};

Emulator e;

}  // namespace

extern "C" {
Index emu_thread_index, emu_block_index, emu_block_size, emu_grid_size;
}

namespace {

Index unravel(uint64_t i, Index size) {
    return {static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
            static_cast<unsigned>(i / size.x / size.y)};
}

// --- failing ---

[[noreturn]] void fail(What what, const char* format, ...) {
    Failure& f = *e.failure;
    f.what = what;
    f.block = unravel(e.block, e.launch.grid);
    f.thread = unravel(e.current, e.launch.block);
    f.n_threads = std::max(f.n_threads, 1);
    va_list list;
    va_start(list, format);
    vsnprintf(f.text, sizeof f.text, format, list);
    va_end(list);
    siglongjmp(e.leave, 1);
}

[[noreturn]] void fail_at(int line, What what, const char* format, ...) {
    char text[sizeof e.failure->text];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    e.failure->line = line;
    fail(what, "%s", text);
}

[[noreturn]] void fail_access(What what, uintptr_t address, size_t size, bool is_write, void* pc, const char* text) {
    Failure& f = *e.failure;
    f.address = address;
    f.size = size;
    f.is_write = is_write;
    f.program_counter = reinterpret_cast<uint64_t>(pc);
    f.shared_offset = address - e.shared_low < e.shared_size ? static_cast<int64_t>(address - e.shared_low) : -1;
    fail(what, "%s", text);
}

void on_signal(int number, siginfo_t* info, void*) {
    if (!e.active || !pthread_equal(pthread_self(), e.caller)) {  // not ours: let it happen again
        signal(number, SIG_DFL);
        return;
    }
    Failure& f = *e.failure;
    f.what = SIGNAL;
    f.block = unravel(e.block, e.launch.grid);
    f.thread = unravel(e.current, e.launch.block);
    f.n_threads = 1;
    f.address = reinterpret_cast<uint64_t>(info->si_addr);
    uintptr_t below = e.stack_low - reinterpret_cast<uintptr_t>(info->si_addr);
    snprintf(f.text, sizeof f.text, "%s%s", strsignal(number), below <= PAGE ? ", the thread's stack is full" : "");
    siglongjmp(e.leave, 1);
}

// --- races ---

// A cell: the slice that wrote last (31 bits, the top bit: by an atomic) and the slice that read last (30 bits, the
// top two: who else has read since the last write).
constexpr uint32_t ATOMIC = 1u << 31, WRITER = ATOMIC - 1;
constexpr uint32_t READER = (1u << 30) - 1, ONE = 0, ONE_WARP = 1u << 30, ONE_BLOCK = 2u << 30, BLOCKS = 3u << 30;

enum Access { LOAD, STORE, ATOMIC_ACCESS };

const PastBlock& block_of(uint32_t slice) {
    auto begins_later = [](uint32_t s, const PastBlock& p) { return s < p.first_slice; };
    return *(std::upper_bound(e.past.begin(), e.past.end(), slice, begins_later) - 1);
}

[[noreturn, gnu::cold]] void fail_race(uint32_t other, const char* theirs, uintptr_t a, size_t n, Access access,
                                       void* pc) {
    Failure& f = *e.failure;
    f.n_threads = 2;
    const char* ours = access == LOAD ? "reads" : access == STORE ? "writes" : "atomically changes";
    char text[200];
    if (other >= e.block_slice) {
        f.other = unravel(e.slices[other - e.block_slice].thread, e.launch.block);
        snprintf(text, sizeof text, "%s what another thread of the block %s, with no barrier in between", ours, theirs);
    } else {
        f.other_block = unravel(block_of(other).block, e.launch.grid);
        f.n_threads = 3;
        const char* why = "nothing orders the blocks (that would take __threadfence() and then an atomic in both)";
        snprintf(text, sizeof text, "%s what another block %s; %s", ours, theirs, why);
    }
    fail_access(RACE, a, n, access != LOAD, pc, text);
}

// Whether the current thread sees what other blocks published: it did a global atomic, or one in its block did and
// a barrier of the block followed.
inline bool acquired() {
    return e.threads[e.current].acquired || (e.acquired_epoch >= 0 && e.block_epoch > e.acquired_epoch);
}

// Whether what the slice `other` did happened before what the current thread does now.
inline bool ordered(uint32_t other) {
    if (other == e.slice || other < e.launch_slice) return true;
    const Slice& now = e.slices[e.slice - e.block_slice];
    if (other >= e.block_slice) {
        const Slice& then = e.slices[other - e.block_slice];
        return then.thread == now.thread || then.block_epoch != now.block_epoch ||
               (then.thread / WARP == now.thread / WARP && then.warp_epoch < now.warp_epoch);
    }
    if (!acquired()) return false;
    return other <= block_of(other).released;
}

// Looks at one cell and brings it up to date. `fresh`: slices below it are another story (an earlier launch or, for
// shared memory, an earlier block).
inline void visit(uint64_t& cell, uint32_t fresh, uintptr_t a, size_t n, Access access, void* pc) {
    uint32_t writer = static_cast<uint32_t>(cell), reader = static_cast<uint32_t>(cell >> 32);
    if ((writer & WRITER) < fresh) writer = 0;
    if ((reader & READER) < fresh) reader = 0;
    bool both_atomic = access == ATOMIC_ACCESS && (writer & ATOMIC);
    if (writer && !both_atomic && !ordered(writer & WRITER)) {
        fail_race(writer & WRITER, writer & ATOMIC ? "atomically changes" : "writes", a, n, access, pc);
    }
    if (access == LOAD) {
        uint32_t last = reader & READER, shared_by = reader & ~READER;
        if (reader && last != e.slice) {
            if (last < e.block_slice) {
                shared_by = BLOCKS;
            } else {
                const Slice &then = e.slices[last - e.block_slice], &now = e.slices[e.slice - e.block_slice];
                if (shared_by == BLOCKS) {
                    // stays
                } else if (then.block_epoch != now.block_epoch) {
                    shared_by = ONE;
                } else if (shared_by == ONE_BLOCK || then.thread / WARP != now.thread / WARP) {
                    shared_by = ONE_BLOCK;
                } else if (then.warp_epoch < now.warp_epoch) {
                    shared_by = ONE;
                } else if (then.thread != now.thread) {
                    shared_by = ONE_WARP;
                }
            }
        }
        reader = e.slice | shared_by;
    } else {
        if (reader) {
            uint32_t last = reader & READER, shared_by = reader & ~READER;
            bool safe = ordered(last);
            if (safe && shared_by == BLOCKS) {
                safe = acquired() && std::all_of(e.past.begin(), e.past.end() - 1, [](const PastBlock& p) {
                    return p.released != 0;
                });
            } else if (safe && shared_by != ONE && last >= e.block_slice) {
                const Slice &then = e.slices[last - e.block_slice], &now = e.slices[e.slice - e.block_slice];
                safe = then.block_epoch != now.block_epoch ||
                       (shared_by == ONE_WARP && then.warp_epoch < now.warp_epoch);
            }
            if (!safe) fail_race(last, "reads", a, n, access, pc);
        }
        reader = 0;
        writer = access == ATOMIC_ACCESS ? e.slice | ATOMIC : e.slice;
    }
    cell = static_cast<uint64_t>(reader) << 32 | writer;
}

// --- accesses ---

inline void visit_shared(uintptr_t a, size_t n, Access access, void* pc) {
    if (a + n > e.shared_low + e.shared_size) {
        fail_access(OUT_OF_BOUNDS, a, n, access != LOAD, pc, "runs over the end of the shared arrays");
    }
    uint64_t* cell = &e.shared_cells[a - e.shared_low];
    for (size_t i = 0; i < n; ++i) {
        if (access != STORE && (cell[i] & WRITER) < e.block_slice) {
            fail_access(UNINITIALISED, a, n, access != LOAD, pc, "reads shared memory that the block has not written");
        }
        if (e.launch.races) visit(cell[i], e.block_slice, a, n, access, pc);
        else if (access != LOAD) cell[i] = e.slice;
    }
}

inline void visit_region(Region& r, uintptr_t a, size_t n, Access access, void* pc) {
    if (access != STORE) r.read += n;
    if (access != LOAD) r.written += n;
    if (access != LOAD) {
        for (int i = 0; i < e.launch.n_read_only; ++i) {
            const Range& range = e.launch.read_only[i];
            if (a < range.high && a + n > range.low) {
                fail_access(READ_ONLY, a, n, true, pc, "writes to an array that the caller marked read-only");
            }
        }
        e.threads[e.current].unfenced_epoch = e.block_epoch + 1;
    }
    if (!e.launch.races) return;
    uint64_t* cell = r.cells + ((a - r.base) >> r.grain_shift);
    uint64_t* last = r.cells + ((a + n - 1 - r.base) >> r.grain_shift);
    for (; cell <= last; ++cell) visit(*cell, e.launch_slice, a, n, access, pc);
}

[[gnu::noinline, gnu::cold]] void visit_elsewhere(uintptr_t a, size_t n, Access access, void* pc) {
    for (int i = 0; i < e.n_images; ++i) {
        if (a >= e.images[i].low && a + n <= e.images[i].high) {
            if (access == LOAD) return;
            fail_access(OUT_OF_BOUNDS, a, n, true, pc, "writes to a global variable of the module");
        }
    }
    fail_access(OUT_OF_BOUNDS, a, n, access != LOAD, pc, "");
}

inline void visit(uintptr_t a, size_t n, Access access, void* pc) {
    if (!e.active) return;
    if (++e.accesses > e.launch.patience) fail_access(ENDLESS, a, n, access != LOAD, pc, "does not seem to end");
    if (a - e.stack_low < STACK) return;
    if (a - e.shared_low < e.shared_size) return visit_shared(a, n, access, pc);
    for (int i = 0; i < e.launch.n_regions; ++i) {
        Region& r = e.launch.regions[i];
        if (a - r.low < r.size && a + n - r.low <= r.size) return visit_region(r, a, n, access, pc);
    }
    visit_elsewhere(a, n, access, pc);
}

// --- fibres ---

void begin_slice() {
    if (e.next_slice - e.launch_slice > MOST_SLICES) fail(ENDLESS, "the launch does not seem to end");
    e.slice = e.next_slice++;
    e.slices.push_back({e.current, e.block_epoch, e.threads[e.current].warp_epoch});
    e.accesses = 0;
}

void enter(unsigned thread) {
    e.current = thread;
    e.threads[thread].state = READY;
    emu_thread_index = unravel(thread, e.launch.block);
    begin_slice();
}

// What every fibre does: run threads from their beginning, as long as the next one in line is fresh.
void fibre_main() {
    for (;;) {
        e.launch.invoke(e.launch.arguments);
        Thread& self = e.threads[e.current];
        self.state = DONE;
        ++e.n_done;
        ++e.cursor;
        if (e.cursor < e.warp_end && e.threads[e.order[e.cursor]].state == FRESH) {
            Fibre* fibre = self.fibre;
            enter(e.order[e.cursor]);
            e.threads[e.current].fibre = fibre;
            continue;
        }
        e.free_fibres.push_back(self.fibre);
        if (!_setjmp(self.fibre->at)) _longjmp(e.scheduler, 1);
    }
}

void make_stack(Fibre& fibre) {
    int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE, kind, -1, 0);
    if (memory == MAP_FAILED) fail(STOPPED, "no memory for the threads' stacks");
    mprotect(memory, PAGE, PROT_NONE);
    fibre.stack = static_cast<char*>(memory) + PAGE;
}

// Runs thread `thread` until it waits or ends.
void resume(unsigned thread) {
    Thread& t = e.threads[thread];
    if (t.state == FRESH) {
        t.fibre = e.free_fibres.back();
        e.free_fibres.pop_back();
        if (!t.fibre->stack) make_stack(*t.fibre);
    }
    enter(thread);
    Fibre& fibre = *t.fibre;
    e.stack_low = reinterpret_cast<uintptr_t>(fibre.stack);
    if (_setjmp(e.scheduler)) return;
    if (fibre.begun) _longjmp(fibre.at, 1);
    fibre.begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fibre.stack;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, fibre_main, 0);
    setcontext(&context);
}

// Back to the scheduler until this thread's state is READY again.
void wait_as(State state, int line) {
    Thread& self = e.threads[e.current];
    self.state = state;
    self.line = line;
    ++e.cursor;
    if (!_setjmp(self.fibre->at)) _longjmp(e.scheduler, 1);
}

// --- barriers, shuffles, votes ---

void arrive_at_barrier(int line) {
    if (e.n_at_barrier++ == 0) e.barrier_line = line;
    else if (e.barrier_line != line) {
        const char* text = "threads of the block wait at different __syncthreads(), in lines %d and %d";
        fail_at(line, BARRIER, text, e.barrier_line, line);
    }
    wait_as(AT_BARRIER, line);
}

void release_barrier() {
    ++e.block_epoch;
    e.n_at_barrier = 0;
    bool all = e.votes_true == static_cast<int>(e.n_threads - e.n_done), any = e.votes_true > 0;
    e.vote_result = e.vote_kind == 0 ? e.votes_true : e.vote_kind == 1 ? all : any;
    e.vote_kind = -1;
    e.votes_true = 0;
    for (unsigned t = 0; t < e.n_threads; ++t) {
        if (e.threads[t].state == AT_BARRIER) e.threads[t].state = READY;
    }
}

unsigned lane() { return e.current % WARP; }

// Waits for all lanes of the mask, then exchanges: for a shuffle every lane gets the bits of its source lane, for a
// ballot the mask of the lanes whose bits are not 0.
uint64_t warp_operation(unsigned mask, int operation, uint64_t bits, int source, int line) {
    Thread& self = e.threads[e.current];
    unsigned first = e.current - lane();
    self.mask = mask;
    self.operation = operation;
    self.bits = bits;
    self.source = source;
    self.line = line;
    if (!(mask >> lane() & 1)) fail_at(line, SHUFFLE, "lane %u is not in the mask 0x%08x that it gives", lane(), mask);
    bool complete = true;
    for (unsigned i = 0; i < WARP; ++i) {
        if (!(mask >> i & 1) || i == lane()) continue;
        const Thread* other = first + i < e.n_threads ? &e.threads[first + i] : nullptr;
        if (!other) {
            const char* text = "the mask 0x%08x names lane %u, which the block of %u threads does not have";
            fail_at(line, SHUFFLE, text, mask, i, e.n_threads);
        }
        if (other->state == DONE) fail_at(line, SHUFFLE, "the mask 0x%08x names lane %u, which has ended", mask, i);
        bool waits = other->state == AT_WARP;
        if (waits && other->mask == mask && other->operation == operation && other->line == line) continue;
        complete = false;
        if (waits && (other->mask >> lane() & 1)) {  // each waits for the other, in different places
            const char* text =
                "lane %u waits in line %d with mask 0x%08x, and lane %u comes to another warp operation, "
                "in line %d with mask 0x%08x";
            fail_at(line, SHUFFLE, text, i, other->line, other->mask, lane(), line, mask);
        }
    }
    if (!complete) {
        wait_as(AT_WARP, line);
        return self.bits;
    }
    uint64_t brought[WARP] = {};
    unsigned ballot = 0;
    for (unsigned i = 0; i < WARP; ++i) {
        if (!(mask >> i & 1)) continue;
        brought[i] = e.threads[first + i].bits;
        ballot |= static_cast<unsigned>(brought[i] != 0) << i;
    }
    for (unsigned i = 0; i < WARP; ++i) {
        if (!(mask >> i & 1)) continue;
        Thread& t = e.threads[first + i];
        if (operation == BALLOT) {
            t.bits = ballot;
        } else if (operation != SYNC) {
            if (!(mask >> t.source & 1)) {
                const char* text = "lane %u takes the value of lane %d, which is not in the mask 0x%08x";
                fail_at(line, SHUFFLE, text, i, t.source, mask);
            }
            t.bits = brought[t.source];
        }
        if (operation == SYNC) ++t.warp_epoch;
        t.state = READY;
    }
    if (operation == SYNC) begin_slice();
    return self.bits;
}

[[noreturn]] void fail_stuck() {
    unsigned at_barrier = 0, at_warp = 0, done = 0;
    const Thread* sample = nullptr;
    for (unsigned t = 0; t < e.n_threads; ++t) {
        at_barrier += e.threads[t].state == AT_BARRIER;
        done += e.threads[t].state == DONE;
        if (e.threads[t].state == AT_WARP) {
            ++at_warp;
            if (!sample) sample = &e.threads[t], e.current = t;
        }
    }
    char barrier[64] = "";
    if (at_barrier) snprintf(barrier, sizeof barrier, "%u at __syncthreads() in line %d, ", at_barrier, e.barrier_line);
    const char* text = "would hang: %s%u at a warp operation in line %d whose lanes do not all come, %u ended";
    fail_at(sample->line, BARRIER, text, barrier, at_warp, sample->line, done);
}

// --- blocks ---

void run_block(uint64_t block) {
    e.block = block;
    emu_block_index = unravel(block, e.launch.grid);
    e.block_epoch = e.n_done = e.n_at_barrier = e.votes_true = 0;
    e.vote_kind = -1;
    e.acquired_epoch = -1;
    e.released = 0;
    e.block_slice = e.next_slice;
    e.slices.clear();
    e.past.push_back({e.next_slice, 0, block});
    for (Thread& t : e.threads) t = Thread{};

    while (e.n_done < e.n_threads) {
        bool moved = false;
        for (unsigned first = 0; first < e.n_threads; first += WARP) {
            e.warp_end = std::min(first + WARP, e.n_threads);
            for (bool again = true; again;) {
                again = false;
                for (e.cursor = first; e.cursor < e.warp_end;) {
                    unsigned thread = e.order[e.cursor];
                    if (e.threads[thread].state > READY) {
                        ++e.cursor;
                    } else {
                        resume(thread);  // moves the cursor
                        again = moved = true;
                    }
                }
            }
        }
        if (e.n_done == e.n_threads) break;
        if (e.n_at_barrier && e.n_at_barrier + e.n_done == e.n_threads) release_barrier();
        else if (!moved) fail_stuck();
    }
    e.past.back().released = e.released;
}

// The first n numbers in the order of this launch.
template <class T>
std::vector<T> ordered_numbers(uint64_t n) {
    std::vector<T> numbers(n);
    std::iota(numbers.begin(), numbers.end(), T(0));
    if (e.launch.order == 1) std::reverse(numbers.begin(), numbers.end());
    if (e.launch.order == 2) std::shuffle(numbers.begin(), numbers.end(), std::mt19937(e.launch.seed));
    return numbers;
}

// --- where the kernel's module lies in memory ---

struct TlsIndex {
    unsigned long module, offset;
};
extern "C" void* __tls_get_addr(TlsIndex*);

struct Search {
    uintptr_t address;
    size_t shared_size;
    unsigned long tls_module;
};

int look_at_module(dl_phdr_info* info, size_t, void* data) {
    Search& search = *static_cast<Search*>(data);
    Range image = {UINTPTR_MAX, 0};
    size_t shared_size = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const ElfW(Phdr)& header = info->dlpi_phdr[i];
        uintptr_t low = info->dlpi_addr + header.p_vaddr;
        if (header.p_type == PT_LOAD) {
            image.low = std::min(image.low, low);
            image.high = std::max<uintptr_t>(image.high, low + header.p_memsz);
        }
        if (header.p_type == PT_TLS) shared_size = header.p_memsz;
    }
    if (search.address < image.low || search.address >= image.high) return 0;
    e.images[e.n_images++] = image;
    search.shared_size = shared_size;
    search.tls_module = info->dlpi_tls_modid;
    return 1;
}

void find_module(void* kernel) {
    Search search = {reinterpret_cast<uintptr_t>(kernel), 0, 0};
    e.n_images = 0;
    dl_iterate_phdr(look_at_module, &search);
    e.shared_size = search.shared_size;
    e.shared_low = 0;
    if (e.shared_size) {
        TlsIndex index = {search.tls_module, 0};
        e.shared_low = reinterpret_cast<uintptr_t>(__tls_get_addr(&index));
    }
    if (e.shared_cells.size() < e.shared_size) e.shared_cells.resize(e.shared_size);
    Search own = {reinterpret_cast<uintptr_t>(&e), 0, 0};
    dl_iterate_phdr(look_at_module, &own);
}

// --- signals ---

constexpr int CAUGHT[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};

class Signals {
    struct sigaction before_[4];
    stack_t stack_before_;
    static char stack_[64 << 10];

public:
    Signals() {
        stack_t stack = {};
        stack.ss_sp = stack_;
        stack.ss_size = sizeof stack_;
        sigaltstack(&stack, &stack_before_);
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 4; ++i) sigaction(CAUGHT[i], &action, &before_[i]);
    }
    ~Signals() {
        for (int i = 0; i < 4; ++i) sigaction(CAUGHT[i], &before_[i], nullptr);
        sigaltstack(&stack_before_, nullptr);
    }
};
char Signals::stack_[64 << 10];

}  // namespace

// --- what Python calls ---

extern "C" {

// Runs one launch; 0, or the kind of the fault, with `failure` filled in. One launch at a time: Python sees to that.
int emu_launch(const Launch* launch, Failure* failure) {
    *failure = Failure{};
    failure->shared_offset = -1;
    e.launch = *launch;
    e.failure = failure;
    e.caller = pthread_self();
    e.n_threads = launch->block.x * launch->block.y * launch->block.z;
    emu_block_size = launch->block;
    emu_grid_size = launch->grid;
    find_module(reinterpret_cast<void*>(launch->invoke));
    e.threads.resize(e.n_threads);
    e.order = ordered_numbers<unsigned>(e.n_threads);
    e.launch_slice = e.next_slice;
    e.past.clear();
    Signals signals;
    if (sigsetjmp(e.leave, 1) == 0) {
        e.free_fibres.clear();
        for (Fibre& fibre : e.fibres) e.free_fibres.push_back(&fibre);
        e.active = true;
        uint64_t n_blocks = uint64_t{launch->grid.x} * launch->grid.y * launch->grid.z;
        if (launch->order == 0) {
            for (uint64_t i = 0; i < n_blocks; ++i) run_block(i);
        } else {
            for (uint64_t i : ordered_numbers<uint64_t>(n_blocks)) run_block(i);
        }
    } else {
        for (Fibre& fibre : e.fibres) fibre.begun = false;  // what was running on them is lost
    }
    e.active = false;
    return failure->what;
}

// The number of slices so far; cells hold 30 bits, so Python starts again with clear cells in good time.
unsigned emu_slices(void) { return e.next_slice; }

void emu_restart_slices(void) {
    std::fill(e.shared_cells.begin(), e.shared_cells.end(), 0);
    e.next_slice = 1;
}

// --- what kernels call, by `runtime.h` ---

void emu_block_barrier(int line) { arrive_at_barrier(line); }

int emu_block_vote(int line, int predicate, int kind) {
    e.vote_kind = kind;
    e.votes_true += predicate != 0;
    arrive_at_barrier(line);
    return e.vote_result;
}

void emu_warp_barrier(unsigned mask, int line) { warp_operation(mask, SYNC, 0, 0, line); }

uint64_t emu_shuffle(unsigned mask, uint64_t bits, int operand, int width, int kind, int line) {
    if (width < 1 || width > 32 || (width & (width - 1))) {
        fail_at(line, SHUFFLE, "the width of a shuffle is %d, not a power of two up to 32", width);
    }
    int self = static_cast<int>(lane()), segment = self & ~(width - 1), source = self;
    if (kind == 0) source = segment | (operand & (width - 1));
    if (kind == 1) source = self - operand;
    if (kind == 2) source = self + operand;
    if (kind == 3) source = self ^ operand;
    if (kind == 1 && source < segment) source = self;  // out of the segment: a lane keeps its own value
    if ((kind == 2 || kind == 3) && source >= segment + width) source = self;
    return warp_operation(mask, kind, bits, source, line);
}

unsigned emu_ballot(unsigned mask, int predicate, int line) {
    return static_cast<unsigned>(warp_operation(mask, BALLOT, predicate != 0, 0, line));
}

// A fence by a thread covers its own stores and those that a barrier of the block ordered before it.
void emu_fence(void) {
    for (Thread& t : e.threads) {
        if (t.unfenced_epoch && t.unfenced_epoch <= e.block_epoch) t.unfenced_epoch = 0;
    }
    e.threads[e.current].unfenced_epoch = 0;
}

uint64_t emu_atomic(void* address, int size, int is_signed, int kind, uint64_t operand, uint64_t compare) {
    uintptr_t a = reinterpret_cast<uintptr_t>(address);
    void* pc = __builtin_return_address(0);
    bool is_shared = a - e.shared_low < e.shared_size, on_stack = a - e.stack_low < STACK;
    auto unfenced = [](const Thread& t) { return t.unfenced_epoch != 0; };
    bool fenced = std::none_of(e.threads.begin(), e.threads.end(), unfenced);
    uint32_t before = e.threads[e.current].unfenced_epoch;
    if (a % size) fail_access(UNDEFINED, a, size, true, pc, "atomic on an address that is not aligned");
    visit(a, size, ATOMIC_ACCESS, pc);
    if (!is_shared && !on_stack) {
        e.threads[e.current].unfenced_epoch = before;  // the atomic itself needs no fence
        if (fenced) e.released = e.slice;
        if (e.acquired_epoch < 0) e.acquired_epoch = e.block_epoch;
        e.threads[e.current].acquired = true;
    }
    uint64_t old = 0;
    memcpy(&old, address, size);
    auto less = [&](uint64_t x, uint64_t y) {
        if (!is_signed) return x < y;
        if (size == 4) return static_cast<int32_t>(x) < static_cast<int32_t>(y);
        return static_cast<int64_t>(x) < static_cast<int64_t>(y);
    };
    uint64_t value = old;
    switch (kind) {  // the order of emu::AtomicKind
        case 0: value = old + operand; break;
        case 1: value = old - operand; break;
        case 2: value = less(operand, old) ? operand : old; break;
        case 3: value = less(old, operand) ? operand : old; break;
        case 4: value = old & operand; break;
        case 5: value = old | operand; break;
        case 6: value = operand; break;
        case 7: value = old >= operand ? 0 : old + 1; break;
        case 8: value = old == 0 || old > operand ? operand : old - 1; break;
        case 9: value = old == compare ? operand : old; break;
        case 10: value = old ^ operand; break;
    }
    memcpy(address, &value, size);
    return old;
}

[[noreturn]] void emu_stop(const char* why, int line) {
    fail_at(line, STOPPED, "%s", why);
}

// --- what -fsanitize=thread calls ---

#define PC __builtin_return_address(0)
#define ACCESSES(size)                                                                                          \
    void __tsan_read##size(void* a) { visit(reinterpret_cast<uintptr_t>(a), size, LOAD, PC); }                  \
    void __tsan_write##size(void* a) { visit(reinterpret_cast<uintptr_t>(a), size, STORE, PC); }                \
    void __tsan_unaligned_read##size(void* a) { visit(reinterpret_cast<uintptr_t>(a), size, LOAD, PC); }        \
    void __tsan_unaligned_write##size(void* a) { visit(reinterpret_cast<uintptr_t>(a), size, STORE, PC); }      \
    void __tsan_volatile_read##size(void* a) { visit(reinterpret_cast<uintptr_t>(a), size, LOAD, PC); }         \
    void __tsan_volatile_write##size(void* a) { visit(reinterpret_cast<uintptr_t>(a), size, STORE, PC); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* a, size_t n) { visit(reinterpret_cast<uintptr_t>(a), n, LOAD, PC); }
void __tsan_write_range(void* a, size_t n) { visit(reinterpret_cast<uintptr_t>(a), n, STORE, PC); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_init(void) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void) {}

// memcpy and its like, which `compiler.py` sends here: the compiler makes copies of them without a word to us.
static void visit_range(const void* p, size_t n, Access access, void* pc) {
    if (n) visit(reinterpret_cast<uintptr_t>(p), n, access, pc);
}
void* emu_memcpy(void* to, const void* from, size_t n) {
    visit_range(from, n, LOAD, PC);
    visit_range(to, n, STORE, PC);
    return memcpy(to, from, n);
}
void* emu_memmove(void* to, const void* from, size_t n) {
    visit_range(from, n, LOAD, PC);
    visit_range(to, n, STORE, PC);
    return memmove(to, from, n);
}
void* emu_memset(void* to, int value, size_t n) {
    visit_range(to, n, STORE, PC);
    return memset(to, value, n);
}

// --- what -fsanitize=undefined calls; all that is common to the records it passes is where it happened ---

struct SourceLocation {
    const char* file;
    uint32_t line, column;
};
struct TypeMismatch {
    SourceLocation where;
    const void* type;
    unsigned char log_alignment, kind;
};

[[noreturn]] static void undefined(const SourceLocation* where, const char* format, ...) {
    char text[256];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    if (!e.active) __builtin_trap();
    bool in_kernel = where->file && strstr(where->file, "kernel.cu");
    fail_at(in_kernel ? static_cast<int>(where->line) : 0, UNDEFINED, "%s", text);
}

void __ubsan_handle_type_mismatch_v1_abort(TypeMismatch* data, uintptr_t pointer) {
    undefined(&data->where, "address 0x%lx is not aligned to the %u bytes that its type needs", pointer,
              1u << data->log_alignment);
}
void __ubsan_handle_out_of_bounds_abort(SourceLocation* where, uintptr_t index) {
    undefined(where, "index %ld is outside the array", static_cast<long>(index));
}
void __ubsan_handle_shift_out_of_bounds_abort(SourceLocation* where, uintptr_t, uintptr_t by) {
    undefined(where, "shift by %ld bits", static_cast<long>(by));
}
#define OVERFLOW(name, text) \
    void __ubsan_handle_##name##_abort(SourceLocation* where, uintptr_t, uintptr_t) { undefined(where, text); }
OVERFLOW(add_overflow, "signed integer overflow in an addition")
OVERFLOW(sub_overflow, "signed integer overflow in a subtraction")
OVERFLOW(mul_overflow, "signed integer overflow in a multiplication")
OVERFLOW(negate_overflow, "signed integer overflow in a negation")
OVERFLOW(divrem_overflow, "division by zero, or overflow in a division")
OVERFLOW(load_invalid_value, "a bool that is neither 0 nor 1 (not initialised?)")
OVERFLOW(missing_return, "a function ends without return")

}  // extern "C"
