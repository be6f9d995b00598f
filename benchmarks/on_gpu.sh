#!/usr/bin/env bash
# Everything that needs a GPU, on one machine in one call: what is here, the tests marked `gpu`, and every figure that is
# promised of a GPU. Ends with one table; all JSON lies in the folder.
#
#     bash benchmarks/on_gpu.sh [OUT_DIR]          default: out/gpu
#
# A step that fails is recorded, and the others run all the same; the exit code is 0 only if all ended well. It runs
# from a checkout, installed or not. Environment:
#
#     PYTHON       the interpreter (python3)
#     DEVICE       the GPU (cuda:0)
#     REFERENCE    a bundle of `python -m benchmarks.reference_bundle`; else it is compiled here, which takes minutes
#     DEMO_FP16    the demo's bundle in fp16; else it is converted here
#     WORK         where bundles and engines are made, and found again by a later call; else a folder that is removed
#     LIMIT_S      seconds for all steps together (600)
#     STEP_S       seconds for any one of them (each has a limit of its own, too)
#     STEPS        only these steps (the names below, separated by spaces)
#     SCALE        `tiny` runs every step on few and small things: it shows that the script works, and no speed
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-out/gpu}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
PYTHON=${PYTHON:-python3}
# Paths are the caller's, before the folder changes; an interpreter's link into a virtual environment stays a link.
case $PYTHON in */*) PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") ;; esac
for name in REFERENCE DEMO_FP16 WORK; do
    if [ -n "${!name:-}" ]; then printf -v "$name" %s "$(realpath -m "${!name}")"; fi
done
cd "$root" || exit 2
DEVICE=${DEVICE:-cuda:0}
LIMIT_S=${LIMIT_S:-600}
STEP_S=${STEP_S:-$LIMIT_S}
SCALE=${SCALE:-full}
all_steps="doctor demo_fp16 reference clip build_time pytest gpu_kernels gpu_engine latency_demo latency_reference"
STEPS=${STEPS-$all_steps}
for name in $STEPS; do
    case " $all_steps " in
    *" $name "*) ;;
    *) echo "STEPS names '$name'; there are: $all_steps" >&2 && exit 2 ;;
    esac
done
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# Long tables and whole lines, where there is no terminal.
export COLUMNS=150 PYTHONUNBUFFERED=1
if [ -z "${WORK:-}" ]; then
    WORK=$(mktemp -d)
    trap 'rm -rf "$WORK"' EXIT
fi
mkdir -p "$WORK" || exit 2
export WARPCACHE_CACHE="$WORK/cache"
log="$out/on_gpu.log"
steps="$out/steps.tsv"
: >"$log"
: >"$steps"
rm -f "$out"/{doctor,build_time,gpu_kernels,gpu_engine,latency_demo,latency_reference}.json

case "$SCALE" in
full)
    size=512
    kernels=()
    engine=()
    latency=(--frames 60 --blocks 3)
    latency_512=(--frames 16 --blocks 4)
    clip_frames=24
    runs=3
    ;;
tiny)
    size=64
    kernels=(--mib 1 --launches 2 --repeats 1 --frames 5 --picture 64)
    engine=(--frames 20 --host-frames 50 --warmup 5 --drawn 4 --empty-frames 200 --demo-frames 20 --parity-frames 6)
    latency=(--frames 8 --blocks 1)
    latency_512=(--frames 8 --blocks 1)
    clip_frames=16
    runs=1
    ;;
*)
    echo "SCALE is '$SCALE'; choose full or tiny" >&2
    exit 2
    ;;
esac

asked() { case " $STEPS " in *" $1 "*) true ;; *) false ;; esac; }
record() { printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >>"$steps"; }
has() { "$PYTHON" -c "import $1" >/dev/null 2>&1; }

# step NAME LIMIT COMMAND...: run it for LIMIT seconds at most, and for what is left of all.
step() {
    local name=$1 limit=$2 begin=$SECONDS left=$((LIMIT_S - SECONDS)) status note
    shift 2
    asked "$name" || return 0
    if [ "$left" -lt 5 ]; then
        record "$name" failed 0 "no time was left of $LIMIT_S s"
        return 1
    fi
    [ "$limit" -le "$left" ] || limit=$left
    [ "$limit" -le "$STEP_S" ] || limit=$STEP_S
    printf '\n== %s (at most %s s)\n' "$name" "$limit" | tee -a "$log"
    timeout -k 10 "$limit" "$@" >"$WORK/step.log" 2>&1 </dev/null
    status=$?
    cat "$WORK/step.log" >>"$log"
    # Enough to see what it did; the whole of it is in the log.
    tail -n 12 "$WORK/step.log" | cut -c1-600
    # The last line that says something, in plain letters: what a failure is called in the table.
    note=$(LC_ALL=C sed 's/[^ -~]//g' "$WORK/step.log" | grep -v '^ *$' | tail -n 1 | cut -c1-160)
    if [ "$name" = pytest ]; then
        # Where every test is skipped, pytest is content; a machine without a GPU has shown nothing.
        case "$status $note" in "0 "*" passed"*) ;; 0*) status=1 ;; esac
    elif [ $status = 0 ]; then
        note=''
    fi
    case $status in
    0) record "$name" ok $((SECONDS - begin)) "$note" ;;
    124 | 137) record "$name" failed $((SECONDS - begin)) "it took longer than $limit s" ;;
    *) record "$name" failed $((SECONDS - begin)) "exit code $status: $note" ;;
    esac
    return $status
}

# left_out NAME REASON: for what is not installed here, and so neither ran nor failed.
left_out() { record "$1" "left out" 0 "$2"; }

# What is here.
command -v nvidia-smi >/dev/null && nvidia-smi 2>&1 | tee -a "$log" | head -n 20
# shellcheck disable=SC2016  # the inner shell's own
step doctor 90 bash -c '"$0" -m warpcache doctor --json >"$1" && "$0" -m warpcache doctor' "$PYTHON" "$out/doctor.json"

# What is measured.
if [ -z "${DEMO_FP16:-}" ]; then
    DEMO_FP16="$WORK/demo.fp16.warp"
    if [ ! -d "$DEMO_FP16" ]; then
        step demo_fp16 90 "$PYTHON" -c '
import sys
from pathlib import Path
from warpcache.tasks.demo import demo_bundle
from warpcache.export.precision.convert import PrecisionOptions, convert_bundle
convert_bundle(demo_bundle(), Path(sys.argv[1]), options=PrecisionOptions("fp16"), frames=None)
' "$DEMO_FP16"
    fi
fi
if [ -z "${REFERENCE:-}" ]; then
    REFERENCE="$WORK/reference-$size.warp"
    [ -d "$REFERENCE" ] || step reference 240 "$PYTHON" -m benchmarks.reference_bundle --size "$size" --out "$REFERENCE"
fi
clip="$WORK/clip-$size-$clip_frames.npz"
[ -f "$clip" ] ||
    step clip 60 "$PYTHON" -m benchmarks.reference_bundle --size "$size" --clip "$clip" --clip-frames "$clip_frames"
if ! asked build_time; then
    :
elif has tensorrt_rtx; then
    step build_time 90 "$PYTHON" -m benchmarks.build_time --runs "$runs" --json "$out/build_time.json"
else
    left_out build_time "TensorRT-RTX is not installed"
fi

# Whether it is right, and then how fast.
step pytest 200 "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider --continue-on-collection-errors
step gpu_kernels 120 "$PYTHON" -m benchmarks.gpu_kernels --device "$DEVICE" --json "$out/gpu_kernels.json" \
    ${kernels[@]+"${kernels[@]}"}
bundles=()
[ -d "$DEMO_FP16" ] && bundles+=(--fp16 "$DEMO_FP16")
[ -d "$REFERENCE" ] && bundles+=(--reference "$REFERENCE")
step gpu_engine 300 "$PYTHON" -m benchmarks.gpu_engine --device "$DEVICE" --engine-cache "$WORK/engines" \
    --json "$out/gpu_engine.json" ${bundles[@]+"${bundles[@]}"} ${engine[@]+"${engine[@]}"}

# Beside other executors. The first of a list is what the others are compared with.
if backend=$("$PYTHON" -m benchmarks.gpu_summary "$out" --backend); then
    rivals=$backend
    if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1; then
        rivals="torch,torch-compile,$backend"
    fi
    step latency_demo 60 "$PYTHON" -m benchmarks.latency demo --device "$DEVICE" --backend "$backend" \
        --against "$backend" --json "$out/latency_demo.json" "${latency[@]}"
    against_reference() {
        step latency_reference 150 "$PYTHON" -m benchmarks.latency "$REFERENCE" --inputs "$clip" --device "$DEVICE" \
            --backend "$backend" --against "$1" --generator benchmarks.reference_bundle:generator --half \
            --json "$out/latency_reference.json" "${latency_512[@]}"
    }
    # torch.compile needs a compiler, which not every machine has: the others are measured without it then.
    against_reference "$rivals" || [ "$rivals" = "$backend" ] || against_reference "torch,$backend"
else
    for name in latency_demo latency_reference; do
        if asked "$name"; then record "$name" failed 0 "no executor ran the demo on $DEVICE"; fi
    done
fi

echo | tee -a "$log"
set -o pipefail
"$PYTHON" -m benchmarks.gpu_summary "$out" 2>&1 | tee -a "$log"
