#!/usr/bin/env bash
# Proof and measurements on a bare CUDA machine: Python, torch with triton, nvcc and a compiler; no network.
#
#   bench/on_gpu.sh [OUT] [STAGE...]      OUT: folder of the results, default $OUT, else runs/on_gpu
#
# Stages, each well inside ten minutes, by default all in this order:
#   build     the extension, in place              tests     the extension and the step: float64, 4 and 8 warps, replay
#   launches  every launch of the plans, likewise  kernels-f32  the interpreter's tests, on the device
#   sanitize  compute-sanitizer over small cases
#   roof      copy and matrix product              step      WRN-28-4 against the peers that need no compilation
#   compiled  WRN-28-4 against torch.compile       resnet    ResNet-32, likewise   kernels   every launch of WRN-28-4
#   tuned     the step by the table that kernels wrote   methods   KD, LatentBE, teacher training
#   loader, scaling, startup                       accuracy  the paper's comparison on DATA, an .npz, for EPOCHS (30)
#   report    tables and plots
# NETWORK, BATCHES, MEMBERS change the sizes of step, compiled, methods and kernels. PACKAGES names a folder of Python
# packages that the machine lacks (pytest, say). PACK=1 leaves one archive and the summary. A stage that fails does not
# stop the next; the exit status counts them.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-${OUT:-runs/on_gpu}}
[ $# -gt 0 ] && shift
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
STAGES=${*:-build tests launches kernels-f32 sanitize roof step compiled resnet methods kernels tuned loader scaling startup accuracy report}
export PYTHONPATH="$PWD${PACKAGES:+:$PACKAGES}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PY=${PYTHON:-python3}
NETWORK=${NETWORK:-wrn28_4} BATCHES=${BATCHES:-128 512} MEMBERS=${MEMBERS:-4} LIMIT=${LIMIT:-570}
FAST="fused reference eager captured as-written vmap grouped jax torch-uncertainty"
COMPILED="fused captured compiled"
LOG="$OUT/log.txt" SUMMARY="$OUT/summary.txt" FAILED=0

bench() { # NAME COMMAND...: the results in OUT/NAME.json
    local name=$1
    shift
    "$PY" -m "bench.$1" --json "$OUT/$name.json" "${@:2}"
}

together() { # PYTEST-ARGUMENTS...: one pytest each, at once, since compiling the kernels takes most of the time
    local failed=0 i=0 part children=()
    for part in "$@"; do
        # shellcheck disable=SC2086
        "$PY" -m pytest -m gpu --durations=3 $part >"$OUT/part$i.log" 2>&1 &
        children+=($!)
        i=$((i + 1))
    done
    for i in "${!children[@]}"; do
        wait "${children[$i]}" || failed=1
        sed "s|^|$i: |" "$OUT/part$i.log"
        rm "$OUT/part$i.log"
    done
    return $failed
}

stage() {
    # shellcheck disable=SC2086  # lists of words are meant
    case $1 in
        build) "$PY" setup.py -q build_ext --inplace && "$PY" -c '
from fastensdistill.kernels import extension
print(extension.describe())
raise SystemExit(not extension.describe()["cuda"])' ;;
        tests) together tests/kernels/test_csrc_gpu.py tests/kernels/test_halo_conv.py \
            "tests/gpu/test_step.py -k own-warps" "tests/gpu/test_step.py -k 4-warps" \
            "tests/gpu/test_step.py -k 8-warps" "tests/gpu/test_step.py -k replayed" \
            "tests/gpu/test_step.py -k float32" "tests/gpu/test_step.py -k peers" tests/gpu/test_captured.py ;;
        launches) together "tests/gpu/test_launches.py -k odd" "tests/gpu/test_launches.py -k post" \
            "tests/gpu/test_launches.py -k resnet32" "tests/gpu/test_launches.py -k single" \
            "tests/gpu/test_launches.py -k own-warps-wrn28_4" "tests/gpu/test_launches.py -k 4-warps-wrn28_4" \
            "tests/gpu/test_launches.py -k 8-warps-wrn28_4" ;;
        kernels-f32) "$PY" -m pytest -m "not gpu" --durations=10 tests/kernels tests/network tests/engine ;;
        sanitize)
            if command -v compute-sanitizer >/dev/null; then
                compute-sanitizer --error-exitcode 9 "$PY" -m pytest -m gpu tests/kernels/test_csrc_gpu.py \
                    tests/kernels/test_halo_conv.py tests/gpu/test_launches.py -k "csrc or halo or (single and own)"
            else
                echo "compute-sanitizer is not installed: left out"
            fi ;;
        roof) bench roof roof ;;
        step) bench step throughput --networks "$NETWORK" --batches $BATCHES --members $MEMBERS \
            --contenders $FAST --minutes 7 ;;
        compiled) bench compiled throughput --networks "$NETWORK" --batches ${BATCHES##* } --members $MEMBERS \
            --contenders $COMPILED --minutes 5 ;;
        resnet) bench resnet throughput --networks resnet32 --batches ${BATCHES##* } --members $MEMBERS \
            --contenders $COMPILED eager reference as-written grouped --minutes 5 ;;
        methods) bench methods throughput --networks "$NETWORK" --methods kd latentbe teach \
            --batches ${BATCHES##* } --members $MEMBERS --contenders fused reference eager captured --minutes 7 ;;
        kernels) bench kernels kernels --network "$NETWORK" --batch ${BATCHES##* } --members $MEMBERS --minutes 8 \
            --dispatch "$OUT/dispatch.rows" ;;
        tuned) bench tuned throughput --networks "$NETWORK" --batches $BATCHES --members $MEMBERS \
            --contenders fused tuned captured --dispatch "$OUT/dispatch.rows" --minutes 7 ;;
        loader) bench loader loader ;;
        scaling) bench scaling scaling --rounds 5 ;;
        startup) bench startup startup --network "$NETWORK" --rounds 3 ;;
        accuracy)
            if [ -n "${DATA:-}" ]; then
                TEACH="--model $NETWORK --members $MEMBERS" bench/accuracy.sh "$DATA" "$OUT/accuracy"
            else
                echo "DATA names no images: left out"
            fi ;;
        report) "$PY" -m bench.report "$OUT" --plots "$OUT/plots" ;;
        *)
            echo "unknown stage $1"
            return 2 ;;
    esac
}

export -f stage bench together
export PY NETWORK BATCHES MEMBERS FAST COMPILED OUT
{
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit --format=csv,noheader || true
    nvcc --version 2>/dev/null | tail -1 || true
} >>"$SUMMARY" 2>&1
for one in $STAGES; do
    began=$SECONDS
    printf '\n===== %s =====\n' "$one" | tee -a "$LOG"
    timeout -k 5 "$LIMIT" bash -c "stage $one" 2>&1 | tee -a "$LOG" | tail -n "${LINES_SHOWN:-60}"
    status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || FAILED=$((FAILED + 1))
    printf '%-12s %-10s %4d s\n' "$one" \
        "$([ "$status" -eq 0 ] && echo ok || { [ "$status" -eq 124 ] && echo "too long" || echo "failed $status"; })" \
        $((SECONDS - began)) >>"$SUMMARY"
done
printf '\n'
"$PY" -m bench.summary "$OUT" >>"$SUMMARY" 2>&1
cat "$SUMMARY"
if [ -n "${PACK:-}" ]; then # all but the summary as one file
    tar -C "$OUT" --exclude=results.tar.gz -czf "$OUT/results.tar.gz" . &&
        find "$OUT" -mindepth 1 ! -name results.tar.gz ! -name summary.txt -delete
fi
exit "$FAILED"
