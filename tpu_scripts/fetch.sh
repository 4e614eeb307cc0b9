#!/usr/bin/env bash
# Copy a run here: result, claims, figure and report from worker 0, and the log of every host.
#
#   fetch.sh [--to FOLDER] [--from-bucket] [--config FILE] [--dry-run]
#
# FOLDER is paperjax-runs/RUN_ID unless it is given. --from-bucket takes what worker 0 left in BUCKET, also when the TPU is gone.
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"
folder=
from_bucket=no
set -- "${ARGUMENTS[@]}"
while (($#)); do
  case $1 in
    --to)
      (($# > 1)) || die 2 "--to needs a folder."
      folder=$2
      shift
      ;;
    --from-bucket) from_bucket=yes ;;
    *) die 2 "unknown option $1; --help shows the options." ;;
  esac
  shift
done
need_run
folder=${folder:-paperjax-runs/$RUN_ID}
run mkdir -p "$folder/logs"
if [[ $from_bucket == yes ]]; then
  need BUCKET
  run gcloud storage rsync "$BUCKET/$RUN_ID" "$folder" --recursive --quiet
  exit
fi
need_tpu
internal=()
[[ $INTERNAL_IPS == no ]] || internal=(--internal-ip)
# gcloud writes the output of host N to N.log.
run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "--project=$PROJECT" "--zone=$ZONE" --worker=all "${internal[@]}" \
  "--command=cat paperjax/runs/$RUN_ID/log" "--output-directory=$folder/logs" --quiet
copy 0 "$TPU_NAME:paperjax/runs/$RUN_ID/out" "$folder" --recurse
