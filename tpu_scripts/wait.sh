#!/usr/bin/env bash
# Wait until the TPU is there.
#
#   wait.sh [--config FILE] [--dry-run]
#
# Exits with 0 when it is ACTIVE; with 1 when it never will be (FAILED, SUSPENDED, being deleted, or not asked for); with 124 after
# QUEUE_TIMEOUT seconds. Looks every POLL_SECONDS.
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"
no_arguments
need_tpu
need_number POLL_SECONDS QUEUE_TIMEOUT

if [[ $DRY_RUN == yes ]]; then
  echo "# every $POLL_SECONDS s until it prints ACTIVE, for at most $QUEUE_TIMEOUT s:"
  tpu_state
  exit 0
fi
before=
while true; do
  IFS=$'\t' read -r state message < <(tpu_state) || die 1 "gcloud does not say how $TPU_NAME is; its own words are above."
  if [[ $state != "$before" ]]; then printf '%s s: %s is %s\n' "$SECONDS" "$TPU_NAME" "$state"; fi
  before=$state
  case $state in
    ACTIVE) exit 0 ;;
    CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | STATE_UNSPECIFIED) ;;
    FAILED) die 1 "$TPU_NAME FAILED: ${message:-Google gives no reason; its VALID_UNTIL may have passed}. teardown.sh, then create.sh again." ;;
    SUSPENDING | SUSPENDED) die 1 "$TPU_NAME is $state: it was preempted. teardown.sh, then create.sh again (babysit.py does both)." ;;
    DELETING) die 1 "$TPU_NAME is being deleted. create.sh again when it is gone." ;;
    MISSING) die 1 "there is no queued resource $TPU_NAME in $ZONE. create.sh first, or see TPU_NAME, ZONE and PROJECT." ;;
    *) die 1 "$TPU_NAME is in a state that is not known here: $state. See status.sh." ;;
  esac
  ((SECONDS < ${QUEUE_TIMEOUT%.*})) || die 124 "$TPU_NAME is still $state after QUEUE_TIMEOUT=$QUEUE_TIMEOUT s. Another ZONE, a smaller ACCELERATOR_TYPE or another PROVISIONING may be served sooner; teardown.sh withdraws the request."
  sleep "$POLL_SECONDS"
done
