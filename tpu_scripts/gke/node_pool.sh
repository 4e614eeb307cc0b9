#!/usr/bin/env bash
# Add a TPU slice to a GKE cluster: a node pool with all hosts of ACCELERATOR_TYPE, called TPU_NAME.
#
#   gke/node_pool.sh [--delete] [--config FILE] [--dry-run]
#
# A TPU7x slice of many hosts is placed by a workload policy, the others by --tpu-topology
# (https://cloud.google.com/kubernetes-engine/docs/concepts/tpu-ironwood). It costs money until it is deleted.
# shellcheck source=../lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib.sh"
begin "$@"
delete=no
if ((${#ARGUMENTS[@]} == 1)) && [[ ${ARGUMENTS[0]} == --delete ]]; then delete=yes; else no_arguments; fi
need_tpu
need CLUSTER REGION
load_topology
where=("--cluster=$CLUSTER" "--region=$REGION" "--project=$PROJECT" --quiet)
if [[ $delete == yes ]]; then
  run gcloud container node-pools delete "$TPU_NAME" "${where[@]}"
  exit
fi
options=("--node-locations=$ZONE" "--machine-type=$TOPOLOGY_MACHINE_TYPE" "--num-nodes=$TOPOLOGY_HOSTS")
if ((TOPOLOGY_HOSTS > 1)); then
  if [[ $TOPOLOGY_GKE_ONLY == yes ]]; then
    run gcloud compute resource-policies create workload-policy "$TPU_NAME" --type=HIGH_THROUGHPUT "--accelerator-topology=$TOPOLOGY_SHAPE" \
      "--project=$PROJECT" "--region=$REGION" --quiet
    options+=("--placement-policy=$TPU_NAME")
  else
    options+=("--tpu-topology=$TOPOLOGY_SHAPE")
  fi
fi
case $PROVISIONING in
  spot) options+=(--spot) ;;
  on-demand) ;;
  reserved)
    need RESERVATION
    options+=(--reservation-affinity=specific "--reservation=$RESERVATION")
    ;;
  *) die 2 "PROVISIONING=$PROVISIONING is none of spot, on-demand, reserved." ;;
esac
run gcloud container node-pools create "$TPU_NAME" "${options[@]}" "${where[@]}"
