#!/usr/bin/env bash
# Build, test and time pywm's CUDA kernels on this machine's GPU. Needs nvcc, torch with CUDA, cmake, ninja, pybind11 and
# pytest; no network, and nothing is installed: the module is built in a copy of the package under $OUT/work.
#
#   benchmarks/gpu.sh                       all phases
#   benchmarks/gpu.sh build test            some, in this order
#   OUT=dir benchmarks/gpu.sh               where JSON and logs go (default: build/gpu)
#   LIMIT_test=300 benchmarks/gpu.sh test   another time limit for a phase, in seconds
#
# Phases: facts build conformance barrier test rssm sanitize bench. Each has a time limit and writes $OUT/<phase>.log;
# $OUT/gpu.json says how each ended. A failed phase does not stop those after it, except that nothing runs without a build.
set -u

root=$(cd "$(dirname "$0")/.." && pwd)
OUT=${OUT:-$root/build/gpu}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
# Not under $OUT, which may be copied off the machine.
work=${WORK:-$root/build/gpu-work}
phases=("$@")
[ ${#phases[@]} -gt 0 ] || phases=(facts build conformance barrier test rssm sanitize bench)

: "${LIMIT_facts:=30}" "${LIMIT_build:=240}" "${LIMIT_conformance:=60}" "${LIMIT_test:=240}" "${LIMIT_sanitize:=300}"
: "${LIMIT_bench:=240}" "${LIMIT_barrier:=60}" "${LIMIT_rssm:=300}"

export PYTHONPATH=$work
export PYTHONDONTWRITEBYTECODE=1
# The tests' own options name plugins that a bare machine may lack.
pytest=("$PYTHON" -m pytest -q -o addopts= -o filterwarnings=default -p no:cacheprovider -W ignore)

arch() {
  nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. '
}

phase_facts() {
  nvidia-smi
  nvcc --version | tail -n 2
  "$PYTHON" -c "import torch, sys; print(sys.version, torch.__version__, torch.version.cuda, torch.cuda.get_device_name())"
}

phase_build() {
  rm -rf "$work/pywm" && mkdir -p "$work" &&
    cp -r "$root/pywm" "$work/pywm" && rm -f "$work"/pywm/_C.*.so || return 1
  # Tests run from there: the directory of the command comes before PYTHONPATH, and the checkout has no such module.
  rm -rf "$work/tests" && cp -r "$root/tests" "$root/pyproject.toml" "$work" || return 1
  local version
  version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$root/pywm/_version.py")
  cmake -S "$root" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPYWM_CUDA=ON \
    "-DPYWM_CUDA_ARCHS=$(arch)-real" -DSKBUILD_PROJECT_VERSION="$version" -DSKBUILD_PROJECT_VERSION_FULL="$version" \
    "-Dpybind11_DIR=$("$PYTHON" -m pybind11 --cmakedir)" "-DPython_EXECUTABLE=$(command -v "$PYTHON")" &&
    cmake --build "$work/build" && cp "$work"/build/_C.*.so "$work/pywm/" &&
    "$PYTHON" -c "import pywm; print(*pywm.backend().values(), sep='\n'); assert pywm.backend()['cuda'].name == 'cuda'"
}

# The tensor-core and asynchronous-copy wrappers against plain arithmetic: what the emulator believes, on the chip.
phase_conformance() {
  nvcc -std=c++20 -O2 "-arch=sm_$(arch)" -I "$root/csrc" -x cu "$root/tests/cuda_on_cpu/conformance.cu" \
    -o "$work/conformance" && "$work/conformance"
}

# What a barrier between all blocks costs: whether persistent scans are worth building.
phase_barrier() {
  nvcc -std=c++20 -O2 "-arch=sm_$(arch)" -I "$root/csrc" "$root/benchmarks/barrier.cu" -o "$work/barrier" &&
    "$work/barrier" | tee "$OUT/barrier.json"
}

phase_test() {
  cd "$work" && "${pytest[@]}" --junitxml="$OUT/test.xml" tests/ops -k "cuda"
}

phase_sanitize() {
  local sanitizer ok=0
  sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
  [ -x "$sanitizer" ] || { echo "compute-sanitizer not found"; return 1; }
  cd "$work" || return 1
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 99 --target-processes all \
      --kernel-regex kns=pywm "${pytest[@]}" tests/ops/test_ops.py -k "cuda and matches and f32" || ok=1
  done
  return $ok
}

phase_rssm() {
  local size ok=0
  cd "$root" || return 1
  for size in size12m size1m classic; do
    "$PYTHON" benchmarks/rssm.py --device cuda --size $size --seconds 6 --json "$OUT/rssm_$size.json" || ok=1
  done
  return $ok
}

phase_bench() {
  cd "$root" && "$PYTHON" benchmarks/gpu.py --json "$OUT/bench.json"
}

pid=
watchdog=
end_phase() {
  [ -z "$pid" ] || kill -KILL -- -"$pid" -"$watchdog" 2>/dev/null
  [ -z "$pid" ] || wait "$watchdog" 2>/dev/null
  pid=
}
# A group of its own does not hear Ctrl-C.
trap 'end_phase; exit 130' INT TERM

results=()
status=0
for phase in "${phases[@]}"; do
  if ! declare -F "phase_$phase" >/dev/null; then
    echo "gpu.sh: unknown phase '$phase'; phases are: facts build conformance barrier test rssm sanitize bench" >&2
    exit 2
  fi
  if [[ ! " facts build conformance barrier " == *" $phase "* ]] && ! ls "$work"/pywm/_C.*.so >/dev/null 2>&1; then
    echo "$phase: skipped, nothing is built"
    results+=("\"$phase\": {\"status\": \"skipped\"}")
    status=1
    continue
  fi
  limit=LIMIT_$phase
  start=$SECONDS
  export -f "phase_$phase" arch
  export root work OUT PYTHON
  # A process group each, so that the limit ends everything the phase started, children of children too.
  set -m
  ( phase_$phase ) >"$OUT/$phase.log" 2>&1 </dev/null &
  pid=$!
  ( sleep "${!limit}" && kill -TERM -- -$pid ) >/dev/null 2>&1 &
  watchdog=$!
  set +m
  wait $pid 2>/dev/null
  code=$?
  end_phase
  seconds=$((SECONDS - start))
  if [ $code -eq 0 ]; then
    outcome=passed
  elif [ $seconds -ge "${!limit}" ]; then
    outcome="timed out"
  else
    outcome=failed
  fi
  [ $code -eq 0 ] || status=1
  echo "$phase: $outcome in ${seconds} s (limit ${!limit} s), $OUT/$phase.log"
  [ $code -eq 0 ] || tail -n 15 "$OUT/$phase.log" | sed 's/^/    /'
  results+=("\"$phase\": {\"status\": \"$outcome\", \"seconds\": $seconds, \"exit\": $code}")
done
[ -f "$OUT/bench.log" ] && [[ " ${phases[*]} " == *" bench "* ]] && cat "$OUT/bench.log"
(
  IFS=,
  echo "{${results[*]}}"
) >"$OUT/gpu.json"
exit $status
