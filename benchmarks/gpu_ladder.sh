#!/usr/bin/env bash
# Everything that docs/performance.md says of GPUs at full size, measured anew on this machine: some 25 minutes.
#
#     benchmarks/gpu_ladder.sh OUT [TENSORRT_PYTHON]
#
# The wide network is trained (docs/model.md), TensorRT's plan of it is built with TENSORRT_PYTHON (an interpreter with
# tensorrt and ctflow; without one its rows say why not); where there are several GPUs, PyTorch's rows are measured on the
# last meanwhile. Then come, with nothing beside them, TensorRT's rows, all GPUs together, trips from a DICOM folder to
# the SEG, and whole processes. `python` needs ctflow, triton and nibabel, pytorch-ignite and fire for the training. OUT gets ladder/ (one
# GPU), ladder-all/ (all of them), trip.json, processes.txt, steps.txt and logs; an OUT with wide/ in it trains no other.
set -euo pipefail
mkdir -p "${1:?usage: gpu_ladder.sh OUT [TENSORRT_PYTHON]}"
out=$(realpath "$1")
tensorrt=${2:-python}
cd "$(dirname "$0")/.."
gpus=$(nvidia-smi --list-gpus | wc -l)
last=$((gpus - 1))
cache=$out/engines
rows=0a,0c,1,2,fused-fp16,eager-fp16,0b,compile-fp16,1b,0d
ours=fused-fp16,fused-fp16x2,fused-fp16x4,4,5x2,5x4,tensorrt-fp16,tensorrt-fp16x2,tensorrt-fp16x4

say() { echo "$(date +%H:%M:%S) $*" | tee -a "$out/steps.txt" >&2; }

train() {
  local epochs=8 steps_an_epoch=100
  say "draw phantoms"
  OMP_NUM_THREADS=1 python training/make_set.py "$out/set" --phantoms 24 --shape 300,512,512 --processes 24
  python training/widen_network.py "$out/widened.pt" --feature-size 48
  say train
  (cd bundle && CUDA_VISIBLE_DEVICES=0 python -m monai.bundle run --config_file configs/train.json \
    --dataset_dir "$out/set" --ckpt_dir "$out/trained" --start_from "$out/widened.pt" \
    --network_def#feature_size 48 --deterministic_transforms#3#_disabled_ True \
    --max_epochs $epochs --steps $((epochs * steps_an_epoch)) --dataloader#shuffle False --dataloader#sampler \
    "{'_target_': 'torch.utils.data.RandomSampler', 'data_source': '@dataset', 'num_samples': $((2 * steps_an_epoch))}" \
    --cases_per_step 2 --windows_per_case 2 --learning_rate 3e-4 --schedule#pct_start 0.1 \
    --deterministic_transforms#7#max_samples_per_class 20000 --deterministic_transforms#7#image_threshold -1 \
    --dataset#copy_cache False --dataset#num_workers 12 \
    --handlers#1#iteration_log "\$lambda engine, step: step % 20 == 0")
  python training/make_wide_bundle.py "$out/wide" --feature-size 48 --weights "$out/trained/model.pt"
  rm -r "$out/set"
}

ladder() {  # ladder FOLDER DEVICES ROWS [OPTIONS]
  local folder=$1 devices=$2 chosen=$3 pythons=()
  shift 3
  for row in 3 4 5x2 5x4 tensorrt-fp16 tensorrt-fp16x2 tensorrt-fp16x4; do pythons+=(--python "$row=$tensorrt"); done
  # 6: some rows cannot run on this machine, and say why
  ctflow bench ladder -m "$out/wide" -o "$folder" --cache "$cache" --device "$devices" --rows "$chosen" \
    "${pythons[@]}" "$@" > "$folder.log" 2>&1 || [ $? = 6 ]
}

[ -e "$out/wide/models/model.pt" ] || train > "$out/train.log" 2>&1
say "build TensorRT's plan beside PyTorch's rows"
CUDA_VISIBLE_DEVICES=0 "$tensorrt" benchmarks/gpu_volume.py --engine tensorrt --model "$out/wide" --batch 8 \
  --cache "$cache" --only-prepare > "$out/plan.log" 2>&1 || say "no plan: see plan.log" &
[ "$gpus" -gt 1 ] || wait  # on the only GPU the builder would disturb the rows, which are not measured again
CUDA_VISIBLE_DEVICES=$last ladder "$out/ladder" cuda:0 "$rows"
wait
say "one GPU"
CUDA_VISIBLE_DEVICES=$last ladder "$out/ladder" cuda:0 "$rows,3,4,tensorrt-fp16"
say "$gpus GPUs"
ladder "$out/ladder-all" "cuda:$(seq -s, 0 "$last")" "$ours" --repeats 5
say trips
[ -e "$out/chest" ] || ctflow phantom "$out/chest" --seed 21 --tumours 4 --shape 300,512,512
python benchmarks/trip.py "$out/chest/ct" --engine fused -m "$out/wide" | tee "$out/trip.txt" | tail -n 1 > "$out/trip.json"
for turn in 1 2 3; do
  start=$(date +%s%N)
  ctflow run -i "$out/chest/ct" -o "$out/run-$turn" -m "$out/wide" --engine fused --cache "$cache" > "$out/run-$turn.log" 2>&1
  echo "process $turn: $((($(date +%s%N) - start) / 1000000)) ms from its start to its end" >> "$out/processes.txt"
done
say finished
