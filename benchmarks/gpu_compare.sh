#!/usr/bin/env bash
# Everything that docs/performance.md says of GPUs at full size, measured anew on this machine: some 25 minutes.
#
#     benchmarks/gpu_compare.sh OUT [TENSORRT_PYTHON]
#
# The wide network is trained (docs/model.md) unless OUT/wide is there, and ctflow's own engine is measured on one GPU
# and on all. Then TensorRT's plan is built with TENSORRT_PYTHON (an interpreter with tensorrt and ctflow; without one
# its configurations say why not), on the last GPU. Where there are several, most of PyTorch's configurations are measured meanwhile: those
# that blend in host memory on the first, and from three GPUs on the others beside them on the second. TensorRT's configurations
# and the last of PyTorch's have nothing beside them, and so have, at the end, whole cases from a DICOM folder to the SEG and
# whole processes. In between, masks of three more phantoms are compared, whose seconds do not count.
# `python` needs ctflow, matplotlib, triton and, for the training, nibabel, pytorch-ignite and fire. OUT gets compare/, compare-1.json
# to compare-4.json with their charts (by GPUs), phantom-N/, host_steps.json, eight_bits.json, whole_case.json, processes.txt, steps.txt and
# logs; what is there stays.
set -euo pipefail
mkdir -p "${1:?usage: gpu_compare.sh OUT [TENSORRT_PYTHON]}"
out=$(realpath "$1")
tensorrt=${2:-python}
cd "$(dirname "$0")/.."
gpus=$(nvidia-smi --list-gpus | wc -l)
last=$((gpus - 1))
cache=$out/engines
all=cuda:$(seq -s, 0 "$last")
in_host_memory=1,0b,2
last_configurations=1b,0d
on_gpu=0a,0c,eager-fp16,compile-fp16
own=fused-fp16,fused-fp8,fused-fp16x2,fused-fp16x4
tensorrt_configurations=4,5x2,5x4,tensorrt-fp16,tensorrt-fp16x2,tensorrt-fp16x4,3
phantoms=(1001 1002 1003)  # the comparison's own is 1000

say() { echo "$(date +%H:%M:%S) $*" | tee -a "$out/steps.txt" >&2; }
set -m  # a process group each, so that what a background job started ends with it
end_jobs() {  # a builder or a configuration that lived on would disturb the next measurement
  local job
  for job in $(jobs -p); do kill -- "-$job" 2> /dev/null || true; done
  wait
}
trap end_jobs EXIT

train() {
  local steps=750
  say "draw phantoms"
  OMP_NUM_THREADS=1 python training/make_set.py "$out/set" --phantoms 16 --shape 300,512,512 --processes 16
  python training/widen_network.py "$out/widened.pt" --feature-size 48
  say train
  (cd bundle && CUDA_VISIBLE_DEVICES=0 python -m monai.bundle run --config_file configs/train.json \
    --dataset_dir "$out/set" --ckpt_dir "$out/trained" --start_from "$out/widened.pt" \
    --network_def#feature_size 48 --deterministic_transforms#3#_disabled_ True \
    --max_epochs 1 --steps $steps --dataloader#shuffle False --dataloader#sampler \
    "{'_target_': 'torch.utils.data.RandomSampler', 'data_source': '@dataset', 'num_samples': $((2 * steps))}" \
    --cases_per_step 2 --windows_per_case 4 --learning_rate 4e-4 --schedule#pct_start 0.1 \
    --random_transforms#0#ratios "[1, 1, 1, 1, 1, 1, 1, 1, 1]" \
    --dataset#copy_cache False --dataset#num_workers 12 \
    --handlers#1#iteration_log "\$lambda engine, step: step % 20 == 0")
  python training/make_wide_bundle.py "$out/wide" --feature-size 48 --weights "$out/trained/model.pt"
  rm -r "$out/set"
}

compare() {  # compare DEVICES IDS [FOLDER [OPTION...]]
  local devices=$1 configurations=$2 folder=$out/${3:-compare} pythons=() configuration
  for configuration in ${tensorrt_configurations//,/ }; do pythons+=(--python "$configuration=$tensorrt"); done
  ctflow bench compare -m "$out/wide" -o "$folder" --cache "$cache" --device "$devices" --configurations "$configurations" "${pythons[@]}" \
    "${@:4}" >> "$folder.log" 2>&1 || {
    local code=$?  # 6: a configuration crashed, and the others are there; one that cannot run on this machine is no failure
    say "ended with $code: see $folder.log"
    [ "$code" = 6 ]
  }
}

pytorch_configurations() {
  local beside=
  if [ "$gpus" -gt 2 ]; then  # its device is also called cuda:0, so that the documents find the configurations
    CUDA_VISIBLE_DEVICES=1 compare cuda:0 "$on_gpu" &
    beside=$!
    compare cuda:0 "$in_host_memory"
    wait "$beside"
  else
    compare cuda:0 "1,$on_gpu,$in_host_memory"
  fi
}

compare_phantoms() {  # beside one another
  local configurations=1,0a,0c,4,eager-fp16,tensorrt-fp16,fused-fp16,fused-fp8 number jobs=()
  for number in "${!phantoms[@]}"; do
    CUDA_VISIBLE_DEVICES=$((number % gpus)) OMP_NUM_THREADS=8 compare cuda:0 "$configurations" \
      "phantom-${phantoms[number]}" --seed "${phantoms[number]}" --repeats 1 &
    jobs+=($!)
  done
  local failed=0
  for number in "${jobs[@]}"; do wait "$number" || failed=1; done
  return "$failed"
}

document() {  # document GPUS IDS: nothing is measured again
  compare "cuda:$(seq -s, 0 $(($1 - 1)))" "$2" compare --only-kept
  cp "$out/compare/compare.json" "$out/compare-$1.json"
  cp "$out/compare/compare.png" "$out/compare-$1.png"
}

[ -e "$out/wide/models/model.pt" ] || train > "$out/train.log" 2>&1
say "our engine"
ctflow export -m "$out/wide" --engine fused --precision fp8 -o "$cache" > "$out/calibration.log" 2>&1 ||
  say "no calibration for fp8, which compare does not make: see calibration.log"
compare "$all" "$own"
say "build TensorRT's plan beside PyTorch's configurations"
CUDA_VISIBLE_DEVICES=$last "$tensorrt" benchmarks/gpu_volume.py --engine tensorrt --model "$out/wide" --batch 8 \
  --cache "$cache" --only-prepare > "$out/plan.log" 2>&1 || say "no plan: see plan.log" &
[ "$gpus" -gt 1 ] || wait  # on the only GPU the builder would disturb the configurations, which are not measured again
pytorch_configurations
say "wait for the plan"
wait
say TensorRT
compare "$all" "$tensorrt_configurations"
say "last of PyTorch's configurations"
compare cuda:0 "$last_configurations"
say documents
first=0a,0b,0c,0d,1,1b,2,3,4
document 1 "$first,eager-fp16,compile-fp16,tensorrt-fp16,fused-fp16,fused-fp8"
for count in 2 4; do
  [ "$gpus" -ge "$count" ] || continue
  document "$count" \
    "$first,5x$count,eager-fp16,compile-fp16,tensorrt-fp16,tensorrt-fp16x$count,fused-fp16,fused-fp8,fused-fp16x$count"
done
say "more phantoms"
compare_phantoms || say "not all phantoms were compared"
say "whole cases"
[ -e "$out/chest" ] || ctflow phantom "$out/chest" --seed 21 --tumours 4 --shape 300,512,512
python benchmarks/whole_case.py "$out/chest/ct" --engine fused --device cuda:0 -m "$out/wide" > "$out/whole_case.txt"
tail -n 1 "$out/whole_case.txt" > "$out/whole_case.json"
python benchmarks/host_steps.py > "$out/host_steps.json"
say "eight bits"
python benchmarks/eight_bits.py --cache "$cache" --out "$out/eight_bits.json" > "$out/eight_bits.log" 2>&1 ||
  say "no figures of eight bits: see eight_bits.log"
for turn in 1 2 3; do
  start=$(date +%s%N)
  ctflow run -i "$out/chest/ct" -o "$out/run-$turn" -m "$out/wide" --engine fused --device cuda:0 --cache "$cache" \
    > "$out/run-$turn.log" 2>&1
  end=$(date +%s%N)
  seg=$(date -r "$(find "$out/run-$turn" -name segmentation.dcm)" +%s%N)
  echo "process $turn: SEG after $(((seg - start) / 1000000)) ms, ended after $(((end - start) / 1000000)) ms" \
    >> "$out/processes.txt"
done
say finished
