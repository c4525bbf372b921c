// The shared memory of one block, and what it takes to tell a race from an access that is ordered.
//
// Time is a clock that advances at every sync_block and sync_warp. An earlier access of another thread is ordered
// before one now if it is older than the last sync_block, or, within a warp, than that warp's last sync_warp. Other
// collectives order no memory: CUDA promises that of these two alone. For every 16 bytes (or for each of their four
// words, once something touches one of them) a shadow keeps the last write and enough of the reads since to find one
// that a write may race with: one reader, and a second one if it is of another warp, or of the same warp since its last
// sync_warp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastattn::emulator {

// Where the window begins: a multiple of what ptx.cuh promises, 128, and of no more.
constexpr uint32_t kSharedBase = 1024 + 128;

// A thread and the call site it is at: thread in the low ten bits, site above.
using Actor = uint32_t;
constexpr Actor kNobody = ~Actor{0};
constexpr uint32_t kThreadBits = 10;
constexpr uint32_t actor_thread(Actor actor) { return actor & ((1u << kThreadBits) - 1); }
constexpr uint32_t actor_warp(Actor actor) { return actor_thread(actor) / 32; }
constexpr uint32_t actor_site(Actor actor) { return actor >> kThreadBits; }

// An access now: who, and the clock at the last sync_warp of the thread's warp.
struct Accessor {
  Actor actor;
  uint32_t warp_clock;
};

class SharedMemory {
 public:
  // What an access met: with kNone there is nothing to say.
  enum class Conflict : uint8_t { kNone, kWrite, kRead, kInFlight };
  struct Finding {
    Conflict conflict = Conflict::kNone;
    Actor other = kNobody;
  };

  void resize(size_t bytes) {
    bytes_ = bytes;
    const size_t chunks = (bytes + 15) / 16;
    if (chunks > shadows_.size()) {
      shadows_.resize(chunks);
      words_.resize(4 * chunks);
    }
    storage_.resize(chunks);
  }

  void start_block() {
    // Not a number as float, tf32, bfloat16 and float16.
    for (Chunk& chunk : storage_) chunk = {{0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u}};
    if (times_.now >= kLastClock) {
      times_ = {};
      for (ChunkShadow& shadow : shadows_) shadow = ChunkShadow{};
      for (Shadow& word : words_) word = Shadow{};
    }
    times_.block = tick_barrier();
  }

  size_t bytes() const { return bytes_; }
  unsigned char* data() { return reinterpret_cast<unsigned char*>(storage_.data()); }
  uint32_t tick() { return ++times_.now; }
  uint32_t tick_barrier() { return times_.barrier = tick(); }

  // `at` counts bytes; an access is of one word or of one chunk of 16 bytes.
  Finding read_word(uint32_t at, Accessor who) { return on_word(at, read, who); }
  Finding write_word(uint32_t at, Accessor who) { return on_word(at, write, who); }
  Finding read_chunk(uint32_t at, Accessor who) { return on_chunk(at, read, who); }
  Finding write_chunk(uint32_t at, Accessor who) {
    const Finding finding = on_chunk(at, write, who);
    ChunkShadow& chunk = shadows_[at / 16];
    if (finding.conflict == Conflict::kNone && chunk.split_in == times_.block) [[unlikely]] {
      chunk.split_in = 0;  // the four words have one history again
      set_written(chunk.whole, times_, who.actor);
    }
    return finding;
  }
  // By all lanes of the accessor's warp.
  Finding read_chunk_as_warp(uint32_t at, Accessor who) { return on_chunk(at, read_as_warp, who); }

  // From its issue until its thread's wait a copy is a write that nothing is ordered with.
  Finding begin_copy(uint32_t at, Accessor who) {
    const Finding finding = write_chunk(at, who);
    if (finding.conflict == Conflict::kNone) {
      shadows_[at / 16].in_flight = who.actor;
      shadows_[at / 16].in_flight_in = times_.block;
    }
    return finding;
  }
  void end_copy(uint32_t at) {
    ChunkShadow& chunk = shadows_[at / 16];
    set_written(chunk.whole, times_, chunk.in_flight);
    chunk.in_flight = kNobody;
  }

 private:
  static constexpr uint32_t kLastClock = 1u << 31;  // one block advances it by less than what is left

  struct Chunk {
    alignas(16) uint32_t words[4];
  };
  // Everything in it that is older than the block is void.
  struct Shadow {
    uint32_t written_at = 0, read_at = 0;
    Actor writer = kNobody, reader = kNobody, other_reader = kNobody;
  };
  struct alignas(32) ChunkShadow {
    Shadow whole;
    uint32_t split_in = 0;  // the block in which the words went their own ways
    Actor in_flight = kNobody;
    uint32_t in_flight_in = 0;  // and the block in which it is
  };
  struct Times {
    uint32_t now = 0;
    uint32_t barrier = 0;  // the last sync_block
    uint32_t block = 0;    // the start of the block
  };

  template <class Check>
  [[gnu::always_inline]] inline Finding on_chunk(uint32_t at, Check check, Accessor who) {
    ChunkShadow& chunk = shadows_[at / 16];
    if (is_in_flight(chunk)) [[unlikely]]
      return {Conflict::kInFlight, chunk.in_flight};
    if (chunk.split_in != times_.block) [[likely]]
      return check(chunk.whole, times_, who);
    for (uint32_t n = 0; n < 4; ++n) {
      const Finding finding = check(words_[at / 16 * 4 + n], times_, who);
      if (finding.conflict != Conflict::kNone) return finding;
    }
    return {};
  }

  template <class Check>
  [[gnu::always_inline]] inline Finding on_word(uint32_t at, Check check, Accessor who) {
    ChunkShadow& chunk = shadows_[at / 16];
    if (is_in_flight(chunk)) [[unlikely]]
      return {Conflict::kInFlight, chunk.in_flight};
    if (chunk.split_in != times_.block) [[unlikely]] {
      chunk.split_in = times_.block;
      for (uint32_t n = 0; n < 4; ++n) words_[at / 16 * 4 + n] = chunk.whole;
    }
    return check(words_[at / 4], times_, who);
  }

  bool is_in_flight(const ChunkShadow& chunk) const {
    return chunk.in_flight != kNobody && chunk.in_flight_in == times_.block;
  }

  // Is an access at `time` by `actor`, since the last sync_block, ordered before what `who` does now?
  static bool is_ordered(uint32_t time, Actor actor, Accessor who) {
    return actor_thread(actor) == actor_thread(who.actor) || is_ordered_for_warp(time, actor, who);
  }
  static bool is_ordered_for_warp(uint32_t time, Actor actor, Accessor who) {
    return actor_warp(actor) == actor_warp(who.actor) && time < who.warp_clock;
  }

  // The reads before this write are ordered before it, and what is ordered after it comes after them too.
  static void set_written(Shadow& shadow, const Times& times, Actor actor) {
    shadow.written_at = times.now;
    shadow.writer = actor;
    shadow.read_at = 0;
  }

  static Finding read(Shadow& shadow, const Times& times, Accessor who) {
    if (shadow.written_at >= times.barrier && !is_ordered(shadow.written_at, shadow.writer, who)) [[unlikely]] {
      return {Conflict::kWrite, shadow.writer};
    }
    if (shadow.read_at < times.barrier) {
      shadow.reader = who.actor;
      shadow.other_reader = kNobody;
    } else if (shadow.other_reader != kNobody && actor_warp(shadow.other_reader) != actor_warp(shadow.reader)) {
      return {};  // read by two warps: whoever writes races with one of them
    } else if (actor_warp(shadow.reader) != actor_warp(who.actor)) {
      shadow.other_reader = who.actor;
    } else if (shadow.read_at < who.warp_clock) {
      shadow.reader = who.actor;
      shadow.other_reader = kNobody;
    } else if (actor_thread(shadow.reader) != actor_thread(who.actor)) {
      shadow.other_reader = who.actor;
    }
    shadow.read_at = times.now;
    return {};
  }

  static Finding read_as_warp(Shadow& shadow, const Times& times, Accessor who) {
    if (shadow.written_at >= times.barrier && !is_ordered_for_warp(shadow.written_at, shadow.writer, who))
        [[unlikely]] {
      return {Conflict::kWrite, shadow.writer};
    }
    if (shadow.read_at >= times.barrier) {
      if (shadow.other_reader != kNobody && actor_warp(shadow.other_reader) != actor_warp(shadow.reader)) return {};
      if (actor_warp(shadow.reader) != actor_warp(who.actor)) {
        shadow.other_reader = who.actor;
        shadow.read_at = times.now;
        return {};
      }
    }
    shadow.reader = who.actor;
    shadow.other_reader = who.actor ^ 1u;  // some other lane
    shadow.read_at = times.now;
    return {};
  }

  static Finding write(Shadow& shadow, const Times& times, Accessor who) {
    if (shadow.written_at >= times.barrier && !is_ordered(shadow.written_at, shadow.writer, who)) [[unlikely]] {
      return {Conflict::kWrite, shadow.writer};
    }
    if (shadow.read_at >= times.barrier) {
      // read_at is the time of other_reader, if there is one.
      if (shadow.other_reader != kNobody && !is_ordered(shadow.read_at, shadow.other_reader, who)) [[unlikely]] {
        return {Conflict::kRead, shadow.other_reader};
      }
      if (!is_ordered(shadow.read_at, shadow.reader, who)) [[unlikely]]
        return {Conflict::kRead, shadow.reader};
    }
    set_written(shadow, times, who.actor);
    return {};
  }

  size_t bytes_ = 0;
  std::vector<Chunk> storage_;
  std::vector<ChunkShadow> shadows_;
  std::vector<Shadow> words_;
  Times times_;
};

}  // namespace fastattn::emulator
