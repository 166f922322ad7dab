#!/bin/bash
#SBATCH --job-name=First_Run
#SBATCH --array=0-2
#SBATCH --partition=gpu
#SBATCH --account=vision
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --gpus-per-node=8
#SBATCH --mem=524288M
#SBATCH --time=1440
#SBATCH --signal=B:USR1@300
#SBATCH --output=/data/runs/First_Run/job/log-%a.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#
# First_Run: 20 subjects, 8 a task, trained by controlbooth; written by `controlbooth launch slurm`.
# `controlbooth launch status /data/runs/First_Run` tells how it goes.
cd '/data/my project' || exit 1
export GOMP_SPINCOUNT=2000
export HF_HUB_OFFLINE=1
export NCCL_DEBUG=WARN
export OMP_NUM_THREADS=12
export TITLE='it'"'"'s 5 $'
module load cuda
set -u
FIRST=$((SLURM_ARRAY_TASK_ID * 8))
END=$((FIRST + 8 < 20 ? FIRST + 8 : 20))
export ROWS="$FIRST:$END"
JOB="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
export CONTROLBOOTH_ATTEMPT=$((2000 + ${SLURM_RESTART_COUNT:-0}))
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((29500 + SLURM_JOB_ID % 1000))
export HEAD PORT
WAIT=240
STARTED=$(date +%s)
echo "== attempt $CONTROLBOOTH_ATTEMPT, job $JOB on $SLURM_JOB_NODELIST, $(date +%FT%T%z)"

# Slurm's warning before the time limit, handed on to the ranks: they save a checkpoint after their step, and end.
trap 'scancel --signal=TERM "$JOB"' USR1
# Before a preemption Slurm itself sends TERM to the ranks, and to this script.
trap : TERM

on_every_node() {
  # When one node has ended the others have time to write down why, and are then ended too.
  srun --kill-on-bad-exit=0 --wait="$WAIT" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c "$1" &
  local status=0
  while true; do  # a signal ends `wait`, and not what it waits for
    wait $!
    status=$?
    kill -0 $! 2>/dev/null || return $status
  done
}

answered() {
  # The controller may be restarting.
  local tries=1
  until "$@"; do
    if [ "$tries" -ge 30 ]; then
      echo "controlbooth launch: Slurm does not answer to $*, so this job is not started again" >&2
      return 1
    fi
    tries=$((tries + 1))
    sleep 10
  done
}

on_every_node 'exec /venv/bin/python -m torch.distributed.run \
  --nnodes=1 \
  --nproc-per-node=8 \
  --rdzv-backend=c10d \
  --rdzv-id=First_Run \
  --rdzv-endpoint=127.0.0.1:0 \
  --rdzv-conf=is_host=1 \
  --max-restarts=0 \
  --shutdown-timeout=240 \
  -m controlbooth.trainer.dreambooth.train /data/runs/First_Run/job/subjects.jsonl /data/runs/First_Run/job/run.yaml \
  --rows "$ROWS"'

OUTCOME=$(/venv/bin/python -m controlbooth.launch.job.outcome /data/runs/First_Run \
  "--since=$STARTED" \
  --subjects=/data/runs/First_Run/job/subjects.jsonl \
  "--rows=$ROWS")
echo "== $OUTCOME, $(date +%FT%T%z)"
case "$OUTCOME" in
  finished) exit 0 ;;
  failed) exit 1 ;;
esac
if [ -e /data/runs/First_Run/job/cancelled ]; then echo "== cancelled, and not started again"; exit 0; fi
STATE=$(answered squeue --noheader --jobs="$JOB" --format='%T %r') || exit 1
case "$STATE" in
  RUNNING* | *TimeLimit) ;;
  *) exit 1 ;;  # somebody has cancelled the job: it is COMPLETING while this script still runs
esac
if [ "${SLURM_RESTART_COUNT:-0}" -ge 20 ]; then
  echo "== 20 restarts are used up. Look above for what ends the attempts; then:"
  echo 'controlbooth launch resume /data/runs/First_Run'
  exit 1
fi
answered scontrol requeue "$JOB"
