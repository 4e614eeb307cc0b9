#!/usr/bin/env bash
# The same as gke/submit.sh for a cluster that was made with xpk (https://github.com/AI-Hypercomputer/xpk).
#
#   gke/xpk.sh [SLUG [OPTION...]] [--config FILE] [--dry-run]
#
# A pod's disk is lost with it: XPK_STORAGE, with mount point /runs, keeps checkpoints and results.
# shellcheck source=../lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib.sh"
begin "$@"
need_tpu
need_run
need CLUSTER IMAGE XPK_STORAGE
need_number MAX_RESTARTS RESUME_EXIT_CODE
[[ $RUN_ID =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || die 2 "RUN_ID=$RUN_ID: Kubernetes takes at most 40 of a-z, 0-9 and -, beginning with a letter."
load_topology
run_words "/runs/$RUN_ID/out" "${CHECKPOINT:-/runs/$RUN_ID/checkpoint}" "${MESH:-$TOPOLOGY_MESH}"
options=()
case $PROVISIONING in
  spot) options+=(--spot) ;;
  on-demand) options+=(--on-demand) ;;
  reserved)
    need RESERVATION
    options+=("--reservation=$RESERVATION")
    ;;
  *) die 2 "PROVISIONING=$PROVISIONING is none of spot, on-demand, reserved." ;;
esac
# xpk starts again by itself after 42 and 127 to 255; 70 is a crash of worker_main.py, 69 hosts that did not find each other.
run xpk workload create "--project=$PROJECT" "--zone=$ZONE" "--cluster=$CLUSTER" "--workload=$RUN_ID" "--tpu-type=$ACCELERATOR_TYPE" \
  --num-slices=1 "--docker-image=$IMAGE" "--storage=$XPK_STORAGE" "--max-restarts=$MAX_RESTARTS" \
  "--restart-on-exit-codes=$RESUME_EXIT_CODE,69,70" "${options[@]}" \
  "--command=$(quoted python3 -u tpu_scripts/worker_main.py "${WORKER_OPTIONS[@]}" -- "${RUN_WORDS[@]}")"
