#!/bin/sh
# Quantise a torchvision network to int8 and lower it to artifacts, each verified and timed beside
# the unoptimised float network on the same backend.
#
#     examples/torchvision_int8.sh [NETWORK [OUT [TARGET...]]]
#     examples/torchvision_int8.sh resnet18 resnet18-int8 onnx openvino
#
# Without WEIGHTS the network has random weights and is calibrated on random inputs: enough to see
# what it takes and how fast it runs, meaningless for accuracy. For a real one give
#
#     WEIGHTS=resnet18.safetensors DATA=calibration.npz EVAL_DATA=validation.npz
#
# where the .npz files hold images as torchvision normalises them, [n, 3, 224, 224] float32, under
# the name of the input (or any, as there is one input), and EVAL_DATA also "labels", [n] int64.
set -eu

network=${1:-resnet18}
out=${2:-$network-int8}
[ $# -lt 2 ] && shift $# || shift 2
[ $# -gt 0 ] || set -- onnx openvino tvm tensorrt

for target do
    shift
    set -- "$@" --target "$target"
done
exec pruna-opt run "torchvision:$network" --preset int8 "$@" -o "$out" \
    ${WEIGHTS:+--weights "$WEIGHTS"} ${DATA:+--data "$DATA"} ${EVAL_DATA:+--eval-data "$EVAL_DATA"}
