#!/bin/bash
# First_Run, trained by controlbooth; written by `controlbooth launch local`.
cd '/data/my project' || exit 1
export DS_ACCELERATOR=cpu
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=17179869184:glibc.malloc.mmap_threshold=33554432
export GOMP_SPINCOUNT=2000
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1
set -u

# Asked to stop: the ranks save a checkpoint after their step.
STOPPING=
CHILD=
trap 'STOPPING=1; [ -z "$CHILD" ] || stop_ranks' TERM INT HUP

stop_ranks() {
  # Not torchrun, which would end with a traceback though its ranks end well; but it where it has not started any yet.
  local ranks
  ranks=$(cat "/proc/$CHILD/task/"*/children 2>/dev/null)
  kill -TERM ${ranks:-$CHILD} 2>/dev/null
}

until_it_ends() {
  "$@" &
  CHILD=$!
  [ -z "$STOPPING" ] || stop_ranks
  while kill -0 "$CHILD" 2>/dev/null; do wait "$CHILD"; done  # a signal ends `wait`, and not what it waits for
  CHILD=
}

one_task() {
  exec >>/data/runs/First_Run/job/log-$TASK.txt 2>&1
  FIRST=$((TASK * 8))
  END=$((FIRST + 8 < 20 ? FIRST + 8 : 20))
  export ROWS="$FIRST:$END"
  for RESTART in $(seq 0 3); do
    export CONTROLBOOTH_ATTEMPT=$((2000 + RESTART))
    STARTED=$(date +%s)
    echo "== attempt $CONTROLBOOTH_ATTEMPT, $(date +%FT%T%z)"
    until_it_ends /venv/bin/python -m controlbooth.launch.ranks.child_process "$$" /venv/bin/python -m torch.distributed.run \
      --nnodes=1 \
      --nproc-per-node=2 \
      --rdzv-backend=c10d \
      --rdzv-id=First_Run \
      --rdzv-endpoint=127.0.0.1:0 \
      --rdzv-conf=is_host=1 \
      --max-restarts=0 \
      --shutdown-timeout=240 \
      -m controlbooth.trainer.dreambooth.train /data/runs/First_Run/job/subjects.jsonl /data/runs/First_Run/job/run.yaml \
      --rows "$ROWS"
    OUTCOME=$(/venv/bin/python -m controlbooth.launch.job.outcome /data/runs/First_Run \
      "--since=$STARTED" \
      --subjects=/data/runs/First_Run/job/subjects.jsonl \
      "--rows=$ROWS")
    if [ "$OUTCOME" = again ] && [ -n "$STOPPING" ]; then
      if [ -e /data/runs/First_Run/job/cancelled ]; then OUTCOME=cancelled; else OUTCOME=stopped; fi
      echo "== $OUTCOME, and not started again, $(date +%FT%T%z)"
      return 0
    fi
    echo "== $OUTCOME, $(date +%FT%T%z)"
    case "$OUTCOME" in
      finished) return 0 ;;
      failed) return 1 ;;
    esac
  done
  echo "== 3 restarts are used up. Look above for what ends the attempts; then:"
  echo 'controlbooth launch resume /data/runs/First_Run'
  return 1
}

STATUS=0
for TASK in $(seq 0 2); do
  if [ -z "$STOPPING" ]; then one_task || STATUS=1; fi
done
exit $STATUS
