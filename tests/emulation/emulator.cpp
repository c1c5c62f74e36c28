#include "emulator.h"

#include <ucontext.h>

#include <cmath>
#include <csetjmp>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

namespace opsd::cuda {
namespace {

constexpr int LARGEST_PART = 4 * MOST_WORDS;
constexpr size_t STACK_BYTES = 128 << 10;

// Threads that wait for each other.
struct Barrier {
  int expected = 0, arrived = 0;
  int64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  char parts[WARP][LARGEST_PART];
};

struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> memory;
  char* shared = nullptr;
};

struct Fiber {
  ucontext_t context;  // of the first step; later ones are jumps, without a system call
  jmp_buf place;
  bool started = false;
  char* stack;
  int index, rank;
  const Barrier* waits_for = nullptr;
  int64_t until = 0;
  bool done = false;
};

// The cluster that is running.
struct Cluster {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Barrier barrier;
  int64_t first_block = 0;
  int threads = 0;
  const std::function<void()>* kernel = nullptr;
  ucontext_t begin;
  jmp_buf scheduler;
  Fiber* running = nullptr;
};

thread_local Cluster* cluster = nullptr;

Fiber& self() { return *cluster->running; }
Block& own_block() { return cluster->blocks[self().rank]; }
Warp& own_warp() { return own_block().warps[self().index / WARP]; }

void wait_at(Barrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  self().waits_for = &barrier;
  self().until = barrier.generation + 1;
  if (_setjmp(self().place) == 0) _longjmp(cluster->scheduler, 1);
}

void enter() {
  (*cluster->kernel)();
  self().done = true;
  _longjmp(cluster->scheduler, 1);
}

// Runs the fiber until it waits or returns.
void resume(Fiber& fiber) {
  cluster->running = &fiber;
  if (_setjmp(cluster->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  swapcontext(&cluster->begin, &fiber.context);
}

void prepare(Cluster& c, const Shape& shape, int blocks) {
  c.threads = shape.threads;
  c.barrier.expected = blocks * shape.threads;
  c.blocks.resize(blocks);
  for (Block& block : c.blocks) {
    block.barrier.expected = shape.threads;
    block.warps.resize(shape.threads / WARP);
    for (Warp& warp : block.warps) warp.barrier.expected = WARP;
    block.memory = std::make_unique_for_overwrite<char[]>(shape.shared_bytes + 128);
    block.shared = block.memory.get() + (128 - reinterpret_cast<uintptr_t>(block.memory.get()) % 128);
  }
  c.fibers.resize(blocks * shape.threads);
  // Kept from launch to launch, and not zeroed: pages that were touched before cost nothing.
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() < c.fibers.size()) stacks.push_back(std::make_unique_for_overwrite<char[]>(STACK_BYTES));
  for (size_t i = 0; i < c.fibers.size(); ++i) c.fibers[i].stack = stacks[i].get();
}

void run_cluster(Cluster& c, std::mt19937& order) {
  for (Block& block : c.blocks) std::memset(block.shared, 0xff, EXCHANGE_BYTES);  // NaN, where the parts pass
  for (size_t i = 0; i < c.fibers.size(); ++i) {
    Fiber& fiber = c.fibers[i];
    fiber.index = static_cast<int>(i) % c.threads, fiber.rank = static_cast<int>(i) / c.threads;
    fiber.done = fiber.started = false, fiber.waits_for = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack, fiber.context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<Fiber*> alive;
  for (Fiber& fiber : c.fibers) alive.push_back(&fiber);
  while (!alive.empty()) {
    std::shuffle(alive.begin(), alive.end(), order);
    bool moved = false;
    for (Fiber* fiber : alive) {
      if (fiber->waits_for && fiber->waits_for->generation < fiber->until) continue;
      fiber->waits_for = nullptr, moved = true;
      resume(*fiber);
    }
    if (!moved) throw std::runtime_error("emulator: threads wait for others that have left");
    std::erase_if(alive, [](const Fiber* fiber) { return fiber->done; });
  }
}

}  // namespace

int thread() { return self().index; }
int threads() { return cluster->threads; }
int64_t block() { return cluster->first_block + self().rank; }
int cluster_rank() { return self().rank; }
int cluster_size() { return static_cast<int>(cluster->blocks.size()); }
char* shared_memory() { return own_block().shared; }
char* shared_of(int rank) { return cluster->blocks[rank].shared; }
void block_sync() { wait_at(own_block().barrier); }
void cluster_sync() { wait_at(cluster->barrier); }

void exchange_lanes(const void* mine, void* theirs, int bytes, int mask) {
  if (bytes > LARGEST_PART) throw std::runtime_error("emulator: a part of too many bytes");
  Warp& warp = own_warp();
  const int lane = self().index % WARP;
  std::memcpy(warp.parts[lane], mine, bytes);
  wait_at(warp.barrier);
  std::memcpy(theirs, warp.parts[lane ^ mask], bytes);
  wait_at(warp.barrier);
}

// -2 ... 2, the same for the same number.
int drawn(float of) {
  uint32_t bits;
  std::memcpy(&bits, &of, 4);
  bits = (bits ^ bits >> 16) * 0x85ebca6bu, bits = (bits ^ bits >> 13) * 0xc2b2ae35u;
  return static_cast<int>((bits ^ bits >> 16) % 5) - 2;
}

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// `exact` rounded, and off by `units` in the last place.
float off_by(double exact, int units) {
  float y = static_cast<float>(exact);
  if (!std::isfinite(y) || y == 0) return y;
  for (; units > 0; --units) y = std::nextafter(y, INFINITY);
  for (; units < 0; ++units) y = std::nextafter(y, -INFINITY);
  return flushed(y);
}

float exp2_approx(float x) { return off_by(std::exp2(double{flushed(x)}), drawn(x)); }
float reciprocal_approx(float x) { return off_by(1 / double{flushed(x)}, drawn(x) / 2); }  // within 1 unit
float log2_approx(float x) {
  const double exact = std::log2(double{flushed(x)});
  if (x < 0.5f || x > 2) return off_by(exact, drawn(x));
  return static_cast<float>(exact + drawn(x) / 2.0 * 0x1p-22);
}

Device emulated_device() {
  const char* text = std::getenv("OPSD_EMULATED_DEVICE");
  const char* bytes = text ? std::strchr(text, ':') : nullptr;
  return bytes ? Device{std::atoi(text), std::atoll(bytes + 1)} : Device{80, 163 << 10};
}

void run_grid(const std::function<void()>& kernel, int64_t n, const Shape& shape) {
  const int blocks = shape.blocks > 0 ? shape.blocks : 1;
  Cluster c;
  prepare(c, shape, blocks);
  c.kernel = &kernel;
  cluster = &c;
  std::mt19937 order(0);
  for (int64_t i = 0; i < n; ++i) {
    c.first_block = i * blocks;
    run_cluster(c, order);
  }
  cluster = nullptr;
}

}  // namespace opsd::cuda
