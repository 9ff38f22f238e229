#!/usr/bin/env bash
# Every preset on the tiny reasoner and on SmolLM2-135M, and the report of it:  bash runs/evaluation_matrix.sh OUTPUT [PROCESSES]
# Stopped at any time, the same command continues. PROCESSES (default 4) runs share a machine, each with its own plans and folder.
set -euo pipefail
out=${1:?give a folder for the results}
processes=${2:-4}
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"

# balanced and extreme pack from 512 tokens on; the tiny reasoner's texts have 50 to 1,100, so plans with short tiles join in.
python3 - "$out" <<'PYTHON'
import sys
from dataclasses import replace
from pathlib import Path
from bitsandheads import CachePlan, HeadGroup, get_plan

for name, basis in (("balanced", 96), ("extreme", 96), ("kivi-2", 32)):
    preset = get_plan(name)
    quant = replace(preset.groups[0].quant, group_size=32, tile=32, residual=16, basis_tokens=basis)
    CachePlan(f"{name}-short", (HeadGroup(quant=quant),), note=f"{preset.note}, tiles of 32 tokens").save(Path(sys.argv[1]) / f"{name}-short.json")
PYTHON

plans=$(python3 -c "import bitsandheads; print(*(p for p in bitsandheads.preset_names() if not p.endswith('-stp')))")  # -stp is for video
for short in "$out"/*-short.json; do plans="$plans $short"; done
for ((i = 0; i < processes; i++)); do
    mine=$(echo "$plans" | tr ' ' '\n' | awk "NR % $processes == $i" | paste -sd,)
    (
        python3 -m bitsandheads eval --model "$here/models/tiny-reasoner" --tasks reasoning --samples 1000 --batch-size 500 \
            --max-new-tokens 600 --plans "bf16,$mine" --output "$out/tiny-reasoner-$i"
        python3 -m bitsandheads eval --model smollm2 --tasks needle --samples 10 --contexts 1024,2048,4096 --batch-size 10 \
            --plans "bf16,$mine" --output "$out/smollm2-$i"
    ) > "$out/log-$i.txt" 2>&1 &
done
wait
python3 -m bitsandheads report "$out"/tiny-reasoner-* "$out"/smollm2-* "$here"/benchmarks/results/presets-smollm2.json \
    -o "$out/report.html" --plots "$out/plots"
