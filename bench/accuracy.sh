#!/usr/bin/env bash
# The paper's comparison from the command line: teachers, plain distillation, LatentBE, LatentBE + TDiv − SDiv, report.
#
#   bench/accuracy.sh DATA OUT [SETTING...]      DATA as for --data; OUT: folder of the runs and the report
#
# EPOCHS (30) shortens the recipe, whose schedule keeps its shape; SEEDS ("0") are the students'; TEACH holds settings of
# `teach` alone (TEACH="--model wrn28_4"); every SETTING goes to all commands that train. A part that stops with an error
# ends the rest; what was trained stays, and the same call continues with it.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
DATA=$1 OUT=$2
shift 2
PY=${PYTHON:-python3} EPOCHS=${EPOCHS:-30} SEEDS=${SEEDS:-0} TEACH=${TEACH:---model wrn28_4}

train() { # FOLDER COMMAND...: trains into the folder, or goes on with what is there
    local folder=$1 began=$SECONDS more=()
    shift
    [ -e "$folder/checkpoint.safetensors" ] && more=(--resume)
    "$PY" -m fastensdistill "$@" --data "$DATA" --epochs "$EPOCHS" --out "$folder" "${more[@]}"
    echo "$folder: $((SECONDS - began)) s"
}

# shellcheck disable=SC2086  # a list of words is meant
train "$OUT/teachers" teach $TEACH "$@"
FOLDERS=("$OUT/teachers")
for seed in $SEEDS; do
    for way in "kd single none" "latentbe latent-be none" "tdiv-sdiv latent-be tdiv-sdiv"; do
        read -r name student perturbation <<<"$way"
        train "$OUT/$name-$seed" distill --teachers "$OUT/teachers" --seed "$seed" \
            --student "$student" --perturbation "$perturbation" "$@"
        FOLDERS+=("$OUT/$name-$seed")
    done
done
"$PY" -m fastensdistill evaluate "${FOLDERS[@]}" --data "$DATA" --out "$OUT/report"
