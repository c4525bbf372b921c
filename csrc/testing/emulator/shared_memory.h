// The shared memory of one block, and what it takes to tell a race from an access that is ordered.
//
// Time is a clock that advances at every sync_block and sync_warp. An earlier access of another thread is ordered before
// one now if it is older than the last sync_block, or, within a warp, than that warp's last sync_warp. Other collectives
// order no memory: CUDA promises that of these two alone. For every 16 bytes (or for each of their four words, once
// something touches one of them) a shadow keeps the last write and enough of the reads since to find any that a write
// may race with: one reader, and a second one if it is of another warp, or of the same warp since its last sync_warp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastattn::emulator {

// A thread and the call site it is at: thread in the low ten bits, site above.
using Actor = uint32_t;
constexpr Actor kNobody = ~Actor{0};
constexpr uint32_t kThreadBits = 10;
constexpr uint32_t actor_thread(Actor actor) { return actor & ((1u << kThreadBits) - 1); }
constexpr uint32_t actor_warp(Actor actor) { return actor_thread(actor) / 32; }
constexpr uint32_t actor_site(Actor actor) { return actor >> kThreadBits; }

// An access now: who, and the clock when the thread's warp was last in step.
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
    if (clock_ >= kLastClock) {
      clock_ = 0;
      for (ChunkShadow& shadow : shadows_) shadow = ChunkShadow{};
      for (Shadow& word : words_) word = Shadow{};
    }
    block_start_ = tick_barrier();
  }

  size_t bytes() const { return bytes_; }
  unsigned char* data() { return reinterpret_cast<unsigned char*>(storage_.data()); }
  uint32_t clock() const { return clock_; }
  uint32_t tick() { return ++clock_; }
  uint32_t tick_barrier() { return barrier_clock_ = tick(); }

  // `at` counts bytes; an access is of one word or of one chunk of 16 bytes.
  Finding read_word(uint32_t at, Accessor who) {
    ChunkShadow& chunk = split(at / 16);
    if (chunk.in_flight != kNobody) return {Conflict::kInFlight, chunk.in_flight};
    return read(words_[at / 4], who);
  }
  Finding write_word(uint32_t at, Accessor who) {
    ChunkShadow& chunk = split(at / 16);
    if (chunk.in_flight != kNobody) return {Conflict::kInFlight, chunk.in_flight};
    return write(words_[at / 4], who);
  }
  Finding read_chunk(uint32_t at, Accessor who) { return on_chunk(at / 16, who, &SharedMemory::read); }
  Finding write_chunk(uint32_t at, Accessor who) { return on_chunk(at / 16, who, &SharedMemory::write); }
  // By all lanes of the accessor's warp.
  Finding read_chunk_as_warp(uint32_t at, Accessor who) { return on_chunk(at / 16, who, &SharedMemory::read_as_warp); }

  // From its issue until its thread's wait a copy is a write that nothing is ordered with.
  Finding begin_copy(uint32_t at, Accessor who) {
    const Finding finding = write_chunk(at, who);
    if (finding.conflict == Conflict::kNone) shadows_[at / 16].in_flight = who.actor;
    return finding;
  }
  void end_copy(uint32_t at) {
    ChunkShadow& chunk = shadows_[at / 16];
    const Actor actor = chunk.in_flight;
    chunk.in_flight = kNobody;
    if (chunk.split_in == block_start_) {
      for (uint32_t n = 0; n < 4; ++n) set_written(words_[at / 16 * 4 + n], actor);
    } else {
      set_written(chunk.whole, actor);
    }
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
  struct ChunkShadow {
    Shadow whole;
    Actor in_flight = kNobody;
    uint32_t split_in = 0;  // the start of the block in which the words went their own ways
  };

  ChunkShadow& split(uint32_t index) {
    ChunkShadow& chunk = shadows_[index];
    if (chunk.split_in != block_start_) [[unlikely]] {
      chunk.split_in = block_start_;
      for (uint32_t n = 0; n < 4; ++n) words_[4 * index + n] = chunk.whole;
    }
    return chunk;
  }

  template <class Check>
  Finding on_chunk(uint32_t index, Accessor who, Check check) {
    ChunkShadow& chunk = shadows_[index];
    if (chunk.in_flight != kNobody) [[unlikely]]
      return {Conflict::kInFlight, chunk.in_flight};
    if (chunk.split_in != block_start_) return (this->*check)(chunk.whole, who);
    for (uint32_t n = 0; n < 4; ++n) {
      const Finding finding = (this->*check)(words_[4 * index + n], who);
      if (finding.conflict != Conflict::kNone) return finding;
    }
    return {};
  }

  // Is an access at `time` by `actor`, since the last sync_block, ordered before what `who` does now?
  static bool is_ordered(uint32_t time, Actor actor, Accessor who) {
    return actor_thread(actor) == actor_thread(who.actor) ||
           (actor_warp(actor) == actor_warp(who.actor) && time < who.warp_clock);
  }

  void set_written(Shadow& shadow, Actor actor) {
    shadow.written_at = clock_;
    shadow.writer = actor;
  }

  void note_read(Shadow& shadow, Accessor who) {
    const uint32_t warp = actor_warp(who.actor);
    if (shadow.read_at < barrier_clock_) {
      shadow.reader = who.actor;
      shadow.other_reader = kNobody;
    } else if (shadow.other_reader != kNobody && actor_warp(shadow.other_reader) != actor_warp(shadow.reader)) {
      return;  // read by two warps: whoever writes races with one of them
    } else if (actor_warp(shadow.reader) != warp) {
      shadow.other_reader = who.actor;
    } else if (shadow.read_at < who.warp_clock) {
      shadow.reader = who.actor;
      shadow.other_reader = kNobody;
    } else if (actor_thread(shadow.reader) != actor_thread(who.actor)) {
      shadow.other_reader = who.actor;
    }
    shadow.read_at = clock_;
  }

  Finding read(Shadow& shadow, Accessor who) {
    if (shadow.written_at >= barrier_clock_ && !is_ordered(shadow.written_at, shadow.writer, who)) [[unlikely]] {
      return {Conflict::kWrite, shadow.writer};
    }
    note_read(shadow, who);
    return {};
  }

  Finding read_as_warp(Shadow& shadow, Accessor who) {
    if (shadow.written_at >= barrier_clock_ &&
        (actor_warp(shadow.writer) != actor_warp(who.actor) || shadow.written_at >= who.warp_clock)) [[unlikely]] {
      return {Conflict::kWrite, shadow.writer};
    }
    note_read(shadow, who);
    note_read(shadow, {who.actor ^ 1u, who.warp_clock});  // another lane
    return {};
  }

  Finding write(Shadow& shadow, Accessor who) {
    if (shadow.written_at >= barrier_clock_ && !is_ordered(shadow.written_at, shadow.writer, who)) [[unlikely]] {
      return {Conflict::kWrite, shadow.writer};
    }
    if (shadow.read_at >= barrier_clock_) {
      // read_at is the time of other_reader, if there is one.
      if (shadow.other_reader != kNobody && !is_ordered(shadow.read_at, shadow.other_reader, who)) [[unlikely]] {
        return {Conflict::kRead, shadow.other_reader};
      }
      if (!is_ordered(shadow.read_at, shadow.reader, who)) [[unlikely]]
        return {Conflict::kRead, shadow.reader};
    }
    set_written(shadow, who.actor);
    return {};
  }

  size_t bytes_ = 0;
  std::vector<Chunk> storage_;
  std::vector<ChunkShadow> shadows_;
  std::vector<Shadow> words_;
  uint32_t clock_ = 0;
  uint32_t block_start_ = 0;    // the clock when the block began
  uint32_t barrier_clock_ = 0;  // and at its last sync_block
};

}  // namespace fastattn::emulator
