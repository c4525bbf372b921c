// Fibers: stacks, and the switch from one to another.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

#include "core/macros.h"

#if FASTATTN_ADDRESS_SANITIZER
#include <sanitizer/common_interface_defs.h>
#endif

// x18, which compilers use as any other on Linux, and leave alone where the system has reserved it.
#if defined(__APPLE__) || defined(_WIN32)
#define FASTATTN_PLATFORM_REGISTER
#else
#define FASTATTN_PLATFORM_REGISTER "x18",
#endif

namespace fastattn::emulator {

// One computation, while it does not run.
struct Context {
#if defined(__x86_64__) || defined(__aarch64__)
  void* resume = nullptr;
  void* frame_pointer = nullptr;
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
#if FASTATTN_ADDRESS_SANITIZER
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
#endif
};

// AddressSanitizer keeps the bounds of the current stack, and the frames that it moved off it.
#if FASTATTN_ADDRESS_SANITIZER
inline thread_local Context* left_context = nullptr;
[[gnu::noinline]] inline void announce_switch(Context& from, Context& to) {
  left_context = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_bytes);
}
[[gnu::noinline]] inline void arrive_from_switch(Context& here) {
  __sanitizer_finish_switch_fiber(here.fake_stack, &left_context->stack_bottom, &left_context->stack_bytes);
}
#else
inline void announce_switch(Context&, Context&) {}
inline void arrive_from_switch(Context&) {}
#endif

// Leaves `from` and goes on with `to`; returns when something switches back to `from`. The compiler saves what
// registers it needs. Written inline, and with a jump: where all lanes of a warp switch at the same place, the
// processor predicts where the jump goes, and the return after it, which a call and a return of another fiber's would
// spoil.
[[gnu::always_inline]] inline void switch_context(Context& from, Context& to) {
  announce_switch(from, to);
#if defined(__x86_64__)
  Context *save = &from, *load = &to;
  asm volatile(
      "leaq 1f(%%rip), %%rax\n\t"
      "movq %%rax, (%%rdi)\n\t"
      "movq %%rbp, 8(%%rdi)\n\t"
      "movq %%rsp, 16(%%rdi)\n\t"
      "movq 16(%%rsi), %%rsp\n\t"
      "movq 8(%%rsi), %%rbp\n\t"
      "jmp *(%%rsi)\n"
      "1:\n\t"
      : "+D"(save), "+S"(load)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm1", "xmm2",
        "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15",
        "memory", "cc");
#elif defined(__aarch64__)
  register Context* save asm("x0") = &from;
  register Context* load asm("x1") = &to;
  asm volatile(
      "adr x9, 1f\n\t"
      "mov x10, sp\n\t"
      "stp x9, x29, [x0]\n\t"
      "str x10, [x0, #16]\n\t"
      "ldr x10, [x1, #16]\n\t"
      "ldp x9, x29, [x1]\n\t"
      "mov sp, x10\n\t"
      "br x9\n"
      "1:\n\t"
      : "+r"(save), "+r"(load)
      :
      : "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15", "x16", "x17", "x19",
        "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28", "x30", "v0", "v1", "v2", "v3", "v4", "v5", "v6",
        "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22",
        "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31", FASTATTN_PLATFORM_REGISTER "memory", "cc");
#else
  swapcontext(&from.registers, &to.registers);
#endif
  arrive_from_switch(from);
}

// Makes `context` one that starts with main(), which never returns, on the given stack. main() begins with
// arrive_from_switch().
inline void prepare_context(Context& context, unsigned char* stack, size_t stack_bytes, void (*main)()) {
  unsigned char* const top = stack + stack_bytes / 16 * 16;
#if defined(__x86_64__)
  // As after a call: the stack pointer is eight below a multiple of 16, and a return address of null ends every trace.
  void** const return_address = reinterpret_cast<void**>(top) - 1;
  *return_address = nullptr;
  context.stack_pointer = return_address;
  context.resume = reinterpret_cast<void*>(main);
#elif defined(__aarch64__)
  context.stack_pointer = top;
  context.resume = reinterpret_cast<void*>(main);
#else
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = static_cast<size_t>(top - stack);
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, main, 0);
#endif
#if FASTATTN_ADDRESS_SANITIZER
  context.stack_bottom = stack;
  context.stack_bytes = stack_bytes;
#endif
}

}  // namespace fastattn::emulator
