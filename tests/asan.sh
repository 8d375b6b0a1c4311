#!/usr/bin/env bash
# The tests on a core built with AddressSanitizer and UndefinedBehaviorSanitizer.
# Left out: programs that tests start (the sanitizer would have to be loaded before our own library
# there, and a browser is not to be sanitized), and a test that counts this process's pages.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYKVM_BUILD=asan
python -m pykvm.abi._build
LD_PRELOAD="$(cc -print-file-name=libasan.so)" \
    ASAN_OPTIONS=detect_leaks=0:handle_segv=0:allow_user_segv_handler=1 \
    PYTHONMALLOC=malloc \
    python -m pytest -q tests/unit tests/guest tests/mmu tests/abi \
    --ignore tests/mmu/test_page.py \
    --ignore tests/mmu/test_notifier_exec.py \
    --deselect tests/abi/test_profiles.py::test_exec \
    --deselect tests/abi/test_dirty.py::test_the_ring_is_mapped_shared_and_without_code \
    --deselect tests/abi/test_fds.py::test_memory_of_a_vm_is_given_back \
    "$@"
