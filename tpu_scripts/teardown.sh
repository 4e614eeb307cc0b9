#!/usr/bin/env bash
# Delete the TPU and its queued resource: what costs money, and what is on its disks.
#
#   teardown.sh [--config FILE] [--dry-run]
#
# fetch.sh first. Deleting what is not there is no error. A request that is SUSPENDED or FAILED keeps its part of the quota until
# it is deleted.
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"
no_arguments
need_tpu
if [[ $DRY_RUN == yes ]]; then
  queued_resources delete --force
  exit
fi
state=$(tpu_state) || die 1 "gcloud does not say how $TPU_NAME is; its own words are above. It may still cost money."
if [[ $state == MISSING ]]; then
  echo "there is no queued resource $TPU_NAME in $ZONE: nothing to delete."
  exit
fi
queued_resources delete --force
