#!/usr/bin/env bash
# Install Python, the pinned packages of requirements.txt and the pushed PaperJAX on all hosts. Doing it twice does no harm.
#
#   setup_host.sh [--worker N|all] [--config FILE] [--dry-run]
#
# Needs push_code.sh first, which brings host.sh and requirements.txt; the work is `host.sh setup`.
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"
workers=all
if ((${#ARGUMENTS[@]} == 2)) && [[ ${ARGUMENTS[0]} == --worker ]]; then
  workers=${ARGUMENTS[1]}
else
  no_arguments
fi
need_tpu
on_host "$workers" setup
