#!/usr/bin/env bash
# Runs the template tests with real tokenizers. They are taken once from the source distribution of llama-cpp-python
# (77 MB), which carries the vocabularies of ten model families. Each keeps its publisher's terms; none is kept here.
set -euo pipefail
project="$(cd "$(dirname "$0")/.." && pwd)"
folder="${XDG_CACHE_HOME:-$HOME/.cache}/rayloom/test-tokenizers"
if [ ! -e "$folder/complete" ]; then
  scratch="$(mktemp -d)"
  trap 'rm -rf "$scratch"' EXIT
  # pip builds a source distribution's metadata even to download it; its build tool goes into a throw-away environment.
  "$project/.venv/bin/python" -m venv "$scratch/venv"
  "$scratch/venv/bin/pip" install -q scikit-build-core
  "$scratch/venv/bin/pip" download -q --no-deps --no-binary :all: --no-build-isolation \
    -d "$scratch" llama-cpp-python==0.3.36
  mkdir -p "$folder"
  "$project/.venv/bin/python" "$project/tests/real_tokenizers.py" "$scratch"/llama_cpp_python-*.tar.gz "$folder"
  touch "$folder/complete"
fi
RAYLOOM_TOKENIZERS="$folder" "$project/.venv/bin/python" -m pytest "$project/tests/unit/test_template_library.py" "$@"
