#!/usr/bin/env bash
# Ask for a TPU: a queued resource with one node, both called TPU_NAME.
#
#   create.sh [--config FILE] [--dry-run]
#
# PROVISIONING is spot, on-demand or reserved. It returns when Google has taken the request; wait.sh waits for the TPU.
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"
no_arguments
need_tpu
need_cloud_tpu_api

options=("--node-id=$TPU_NAME" "--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=${RUNTIME_VERSION:-$TOPOLOGY_RUNTIME_VERSION}")
case $PROVISIONING in
  spot) options+=(--spot) ;;
  reserved) options+=(--reserved) ;;
  on-demand) ;;
  *) die 2 "PROVISIONING=$PROVISIONING is none of spot, on-demand, reserved." ;;
esac
if [[ -n $VALID_UNTIL ]]; then
  [[ $VALID_UNTIL =~ ^([0-9]+[dhms])+$ ]] || die 2 "VALID_UNTIL=$VALID_UNTIL is no duration such as 90m, 6h or 1d12h."
  options+=("--valid-until-duration=$VALID_UNTIL")
fi
[[ -z $NETWORK ]] || options+=("--network=$NETWORK")
[[ -z $SUBNETWORK ]] || options+=("--subnetwork=$SUBNETWORK")
[[ -z $SERVICE_ACCOUNT ]] || options+=("--service-account=$SERVICE_ACCOUNT")
[[ $INTERNAL_IPS == no ]] || options+=(--internal-ips)
queued_resources create "${options[@]}" --async
