#!/usr/bin/env bash
# Training and prediction on a cluster under SLURM. Adapt the #SBATCH lines and the activation of the environment.
#
#   sbatch launch/slurm.sh folds CONFIG.toml --out RUNS [--grid ...]
#
# runs many folds or variants. Each GPU has a task, which takes the next free job. Nodes may differ.
#
#   sbatch launch/slurm.sh train CONFIG.toml --out RUN
#
# runs one fold on all GPUs of all nodes: DDP (NCCL). Use it for a single run that is too slow on
# one GPU, and folds for everything else.
#
#   sbatch --array=0-7 --nodes=1 launch/slurm.sh predict MODEL SLIDES --out OUT
#
# predicts many slides, with or without an array. All tasks of the array share the slides.
# For two tasks a GPU, double --ntasks-per-node and add --per-device 2. To predict images again,
# remove their results: with --force, each element of the array that starts late would do so.
#
# The job is requeued after a preemption, and two minutes before the end of its time. Then all
# commands resume, as they do when you submit the same line again. RUNS and OUT must lie on a file
# system that all nodes see. It needs file locks: NFS, or Lustre mounted with -o flock.
#SBATCH --job-name=nucsam
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=nucsam-%j.log
set -euo pipefail

# source .venv/bin/activate
export ACCELERATE_MIXED_PRECISION=${ACCELERATE_MIXED_PRECISION:-bf16} # fp16 for GPUs without bf16

command=${1:?folds, train or predict, and its arguments}
shift
case $command in
folds)
  # --kill-on-bad-exit=0: when a task dies, another takes its job
  step=(--ntasks-per-node="$SLURM_NTASKS_PER_NODE" --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=0)
  # exec: Python itself is the task and gets the signals
  task='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
    exec python -m nucsam.folds "$@"'
  ;;
predict)
  tasks=$((SLURM_NNODES * SLURM_NTASKS_PER_NODE)) # of an element of the array
  export WORLD_SIZE=$((${SLURM_ARRAY_TASK_COUNT:-1} * tasks))
  export FIRST=$(((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}) * tasks))
  step=(--ntasks-per-node="$SLURM_NTASKS_PER_NODE" --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=0)
  task='export RANK=$((FIRST + SLURM_PROCID)) LOCAL_RANK=$SLURM_LOCALID
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
    exec python -m nucsam.predict "$@"'
  ;;
train)
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
  export PROCESSES=$((SLURM_NNODES * SLURM_NTASKS_PER_NODE)) # one per GPU; torchrun starts them
  cpus=$((SLURM_NTASKS_PER_NODE * SLURM_CPUS_PER_TASK))
  step=(--ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=1)
  task='launch=(--num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$PROCESSES")
    launch+=(--main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
    [ "$PROCESSES" -eq 1 ] || launch+=(--multi_gpu)
    launch+=(--mixed_precision "$ACCELERATE_MIXED_PRECISION" --dynamo_backend no)
    exec accelerate launch "${launch[@]}" -m nucsam.train "$@" --resume'
  ;;
*)
  echo "$command: expected folds, train or predict" >&2
  exit 2
  ;;
esac

srun "${step[@]}" bash -c "$task" "$command" "$@" &
srun=$! stopped=
# Of an array this element alone: the job ID of one element is that of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
# Each task saves and ends. A signal to srun would kill them at once instead.
trap 'stopped=1; scancel --signal=TERM "$job"' TERM INT
status=0
wait "$srun" || status=$?
while kill -0 "$srun" 2>/dev/null; do # the signal ended the wait, but not srun
  status=0
  wait "$srun" || status=$?
done
if [ "$stopped" ] && [ "$status" -ne 0 ]; then
  scontrol requeue "$job" || echo "not requeued; submit the same line again to resume" >&2
fi
exit "$status"
