#!/bin/bash
# Every recipe for a few minutes on real data: config, train, evaluate, package, a translated series.
#   bash training/short_runs.sh [OUT] [RECIPE ...]
# Networks and patches are small: this shows that everything works together, not how good it gets.
# The pairs of PET and contrast are calculated from real images (docs/TRAINING.md); make them first.
# Packages, results and curves.svg go to OUT (runs/short).
set -euo pipefail
out=${1:-runs/short}; shift || true
wanted=" ${*:-supervised pix2pix cyclegan sccyclegan aps gan_circle classifier} "
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=. OMP_NUM_THREADS=1
mkdir -p "$out"
sed "s#^models_dir:.*#models_dir: $(realpath "$out")/packages#; s#^  data_dir:.*#  data_dir: $(realpath "$out")/node#" \
  config.yaml >"$out/config.yaml"

run() { # RECIPE PRESET DICOM [override ...]
  local recipe=$1 preset=$2 dicom=$3 package="$out/packages/$2"
  shift 3
  [[ $wanted == *" $recipe "* ]] || return 0
  echo "== $recipe: training/configs/papers/$preset.yaml $*"
  "$python" training/train.py "training/configs/papers/$preset.yaml" "runs=$out" "package=$package" \
    stopping=null threads=1 log_every=5 device=cpu "$@"
  local words=()
  [[ $recipe != sccyclegan ]] || words=(data.paired=true) # trained without pairs, of which there are
  "$python" training/evaluate.py "training/configs/papers/$preset.yaml" "runs=$out" "package=$package" \
    "$@" "${words[@]}"
  "$python" -m dicomnode run --config "$out/config.yaml" --model "$preset" --out "$out/derived/$preset" "$dicom"
}

data=../shared/data
slices="data.folders=[{path: training/ct_slices_contrast_labelled, collection: TCGA}]"
noise="low_dose.realisations=1 low_dose.views=90"
# shellcheck disable=SC2086
run supervised ldct-red-cnn "$data/dicom/ct/contrast_abdomen_GE_CRLM-CT-1004" \
  "$slices" $noise generator.options.width=16 \
  optimisation.steps=160 save_every=40 optimisation.patch=48 optimisation.batch_size=4
run pix2pix delayed-pet-pix2pix "$data/dicom/paired_mr_ct_pet/STS_002/PET" \
  residual=false "generator.options={blocks: 4, width: 48, shuffle: 2, slices: 3, head: tanh}" \
  optimisation.steps=160 save_every=40 adversarial.discriminator.width=16
run cyclegan brain-ct-mr-cyclegan "$data/dicom/ct/brain_gantry_tilt_18.5deg_GE" data.spacing_mm=4 \
  publish.bounds.pixel_spacing_mm.min=0.3 \
  optimisation.patch=64 "generator.options={width: 12, blocks: 3, norm: none, antialias: true}" \
  generator.architecture=resnet optimisation.steps=200 save_every=50 adversarial.discriminator.width=16 \
  adversarial.discriminator.layers=2 "backward.package=$out/packages/brain-mr-ct-cyclegan"
run sccyclegan mr-ct-sccyclegan "$data/dicom/paired_mr_ct_pet/STS_002/MR_T1" \
  generator.architecture=unshuffle_resnet "generator.options={blocks: 3, width: 32}" \
  optimisation.patch=96 optimisation.steps=160 save_every=40 adversarial.discriminator.width=16 \
  "backward.package=$out/packages/ct-mr-sccyclegan"
run aps mr-ct-aps "$data/dicom/paired_mr_ct_pet/STS_002/MR_T1" \
  optimisation.steps=160 save_every=40 optimisation.batch_size=2 adversarial.discriminator.width=16
mkdir -p "$out/ldct-red-cnn/cache" "$out/ldct-gan-circle" # the same noise for both
ln -sfn ../ldct-red-cnn/cache "$out/ldct-gan-circle/cache"
# shellcheck disable=SC2086
run gan_circle ldct-gan-circle "$data/dicom/ct/contrast_abdomen_GE_CRLM-CT-1004" \
  "$slices" $noise generator.options.width=16 \
  optimisation.steps=80 save_every=20 optimisation.batch_size=1 adversarial.discriminator.width=16
if [[ $wanted == *" classifier "* ]]; then # the node serves it beside a translation
  package="$out/packages/chest-classes"
  echo "== classifier: training/configs/chest-classes.yaml"
  "$python" training/train.py training/configs/chest-classes.yaml "runs=$out" "package=$package" \
    log_every=5 save_every=10 optimisation.steps=40 device=cpu
  "$python" training/evaluate.py training/configs/chest-classes.yaml "runs=$out" "package=$package"
  ln -sfn "$(realpath models)"/* "$out/packages/"
  "$python" -m dicomnode run --config "$out/config.yaml" --model ldct-denoise --classifier chest-classes \
    --out "$out/derived/chest-classes" "$data/dicom/ct/noncontrast_chest_RICORD-1A-001012_jpeglossless"
fi
"$python" training/curves.py "$out/curves.svg" "$out"/*/losses.csv
