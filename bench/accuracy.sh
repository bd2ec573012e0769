#!/usr/bin/env bash
# The paper's comparison from the command line: teachers, plain distillation, LatentBE, LatentBE + TDiv − SDiv, report.
#
#   bench/accuracy.sh DATA OUT [SETTING...]      DATA as for --data; OUT: folder of the runs and the report
#
# EPOCHS (30) shortens the recipe, whose schedule keeps its shape; SEEDS ("0") are the students'; TEACH holds settings
# of `teach` alone (TEACH="--model wrn28_4"); every SETTING goes to all commands that train. RECIPES ("paper") may also
# name "strong", alone or beside it: the settings are below; it has teachers of its own. A part that stops with an error
# ends the rest; what was trained stays, and the same call continues with it.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
DATA=$1 OUT=$2
shift 2
PY=${PYTHON:-python3} EPOCHS=${EPOCHS:-30} SEEDS=${SEEDS:-0} TEACH=${TEACH:---model wrn28_4} RECIPES=${RECIPES:-paper}
FOLDERS=()

train() { # FOLDER COMMAND...: trains into the folder, or goes on with what is there
    local folder=$1 began=$SECONDS more=()
    shift
    [ -e "$folder/config.yaml" ] && more=(--resume)
    "$PY" -m fastensdistill "$@" --data "$DATA" --epochs "$EPOCHS" --out "$folder" "${more[@]}"
    echo "$folder: $((SECONDS - began)) s"
    FOLDERS+=("$folder")
}

for recipe in $RECIPES; do # before anything is trained
    case $recipe in paper | strong) ;; *) echo "RECIPES=$RECIPES: expected paper, strong, or both" >&2 && exit 2 ;; esac
done
# shellcheck disable=SC2086  # lists of words are meant
for recipe in $RECIPES; do
    at=$OUT all='' teachers='' students='' single=''
    if [ "$recipe" = strong ]; then
        at=$OUT/strong
        all='--augment strong --ema-decay 0.999' teachers='--mixup 0.2'
        students='--teacher-ema' single='--standardize-logits'
    fi
    train "$at/teachers" teach $TEACH $all $teachers "$@"
    for way in 'kd single none' 'latentbe latent-be none' 'tdiv-sdiv latent-be tdiv-sdiv'; do
        read -r name student perturbation <<<"$way"
        own="$all $students"
        [ "$student" = single ] && own="$own $single"
        train "$at/$name" distill --teachers "$at/teachers" --student "$student" --perturbation "$perturbation" \
            --seeds $SEEDS $own "$@"
    done
done
"$PY" -m fastensdistill evaluate "${FOLDERS[@]}" --data "$DATA" --out "$OUT/report"
