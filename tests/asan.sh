#!/usr/bin/env bash
# The tests on a core built with AddressSanitizer and UndefinedBehaviorSanitizer.
# Programs that tests start (exec, C clients) run the normal build: the sanitizer would have to be
# preloaded before our own library there.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYKVM_BUILD=asan
python -m pykvm.abi._build
LD_PRELOAD="$(cc -print-file-name=libasan.so)" \
    ASAN_OPTIONS=detect_leaks=0:handle_segv=0:allow_user_segv_handler=1 \
    PYTHONMALLOC=malloc \
    python -m pytest -q -p no:cacheprovider tests/unit tests/guest tests/abi "$@"
