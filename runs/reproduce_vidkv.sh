#!/usr/bin/env bash
# The tables of VidKV (arXiv 2503.16257): two models, six video tasks, every setting, beside bf16, KIVI and our presets.
#
#   pip install 'bitsandheads[video,lmms]'
#   bash runs/reproduce_vidkv.sh results/vidkv            # everything: days on one GPU
#   TASKS=vatex_test PLANS="bf16 vidkv-1.5/1.58" bash runs/reproduce_vidkv.sh results/vidkv
#
# Needs the hub (models and data sets are downloaded) and one GPU of 40 GB or more. VideoDC, VideoChat-GPT, MovieChat and WorldQA are
# judged by a GPT model in lmms-eval: set OPENAI_API_KEY; the judge of the paper's time is gone, so compare with bf16 of the same run.
# A run whose results are there is not repeated. The paper: LLaVA-OneVision with 32 frames, Qwen2.5-VL with 16.
set -euo pipefail

out=${1:?give a folder for the results}
tasks=${TASKS:-video_dc499 tempcompass_captioning videochatgpt moviechat_global worldqa_gen vatex_test}
plans=${PLANS:-bf16 kivi-2 vidkv-2/2 vidkv-1.5/2 vidkv-1.5/1.58 vidkv-1.5/1.66-stp vidkv-1.5/1.66 vidkv-1.25/1.58 balanced extreme}
models=${MODELS:-llava-hf/llava-onevision-qwen2-7b-ov-hf:32 Qwen/Qwen2.5-VL-7B-Instruct:16}

for entry in $models; do
  model=${entry%:*} frames=${entry##*:}
  for plan in $plans; do
    for task in $tasks; do
      folder=$out/${model//\//_}/${plan//\//_}/$task
      if find "$folder" -name "*results.json" 2> /dev/null | grep -q .; then
        echo "there: $folder"
        continue
      fi
      lmms-eval --model bitsandheads --batch_size 1 --tasks "$task" --log_samples --output_path "$folder" \
        --model_args "pretrained=$model,plan=$plan,frames=$frames"
    done
  done
done
