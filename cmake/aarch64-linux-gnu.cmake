# Builds for 64-bit ARM Linux with Debian's cross compiler, and runs what was built under qemu-user.
#
#   cmake -S . -B build/cross --toolchain cmake/aarch64-linux-gnu.cmake -DFASTATTN_PYTHON_MODULE=OFF
#   cmake -S . -B build/cross ... -DFASTATTN_QEMU_CPU=cortex-a72     # one without bfloat16 dot products
#
# The processor is chosen when tests run: FASTATTN_QEMU_CPU only says which one ctest gets, and QEMU_CPU in the
# environment, which qemu reads itself, has no say against it.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)

set(FASTATTN_QEMU_CPU max CACHE STRING "The processor that qemu-aarch64 plays in tests; `qemu-aarch64 -cpu help` lists them")
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu ${FASTATTN_QEMU_CPU})

# Programs are this machine's; headers and libraries are the other one's.
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
