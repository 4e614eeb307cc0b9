#!/usr/bin/env bash
# Put one commit of this repository on all hosts, as paperjax/source.
#
#   push_code.sh [--sha COMMIT] [--print] [--config FILE] [--dry-run]
#
# Without --sha it is COMMIT of config.env, or else HEAD. Refuses a working tree with changes, so that what runs has a name; a commit
# that is named by --sha is taken from the repository whatever the tree is like. --print: only print the commit, and push nothing.
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"
commit=${COMMIT:-HEAD}
named=no
only_print=no
set -- "${ARGUMENTS[@]}"
while (($#)); do
  case $1 in
    --sha)
      (($# > 1)) || die 2 "--sha needs a commit."
      commit=$2
      named=yes
      shift
      ;;
    --print) only_print=yes ;;
    *) die 2 "unknown option $1; --help shows the options." ;;
  esac
  shift
done
need_tpu

repository=$(git -C "$SCRIPTS" rev-parse --show-toplevel) || die 2 "$SCRIPTS is in no git repository; clone PaperJAX instead of copying it."
sha=$(git -C "$repository" rev-parse --verify --quiet "$commit^{commit}") || die 2 "$commit: the repository has no such commit (--sha, COMMIT). git fetch it first."
changes=$(git -C "$repository" status --porcelain)
[[ -z $changes || $named == yes ]] || die 2 "the working tree has changes, which would not run. Commit or stash them, or name a commit by --sha:
$changes"
if [[ $only_print == yes ]]; then
  echo "$sha"
  exit
fi

archive=${TMPDIR:-/tmp}/paperjax-$sha.tar.gz
run git -C "$repository" archive --format=tar.gz "--output=$archive" "$sha"
copy all "$archive" "$TPU_NAME:paperjax-$sha.tar.gz"
# Unpacked beside and renamed: a host never has half a tree.
target=paperjax/source-$sha
on_workers all bash -c "mkdir -p $target.part && tar -xzf paperjax-$sha.tar.gz -C $target.part && rm -rf $target && mv $target.part $target && \
echo $sha > $target/COMMIT && ln -sfn source-$sha paperjax/source && rm paperjax-$sha.tar.gz"
run rm -f "$archive"
