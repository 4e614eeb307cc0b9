#!/usr/bin/env bash
# How the TPU is, and the run on each host.
#
#   status.sh [--state|--run] [--config FILE] [--dry-run]
#
# --state: only the queued resource, as STATE and Google's message. --run: only the run, a line a host:
# paperjax-run w-0 running | exit STATUS | lost (its session is gone, as after a reboot) | never.
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"
which=${ARGUMENTS[0]:-both}
[[ $which == --state || $which == --run ]] || no_arguments
need_tpu
need_run
state=
if [[ $which != --run ]]; then
  state=$(tpu_state) || die 1 "gcloud does not say how $TPU_NAME is; its own words are above."
  printf '%s\n' "$state"
fi
if [[ $which == --run || ($which == both && ($DRY_RUN == yes || $state == ACTIVE*)) ]]; then
  on_host all state "$RUN_ID"
fi
