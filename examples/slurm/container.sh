# shellcheck shell=bash
# shellcheck disable=SC2034 # what it sets, they read
# Runs the steps of the other scripts in a container by pyxis, which adds these flags to srun; sourced by common.sh
# where CONTAINER_IMAGE is given:
#     CONTAINER_IMAGE=/images/sedd.sqsh CONTAINER_MOUNTS=/data:/data \
#         sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 examples/slurm/train.sbatch --config ... --save /data/mine
# The image has torch 2.11 or newer, and in it was run, from the repository: pip install -e '.[gpu]' --no-build-isolation
# PYTHON names its interpreter. What --data-path, --save and the
# like name has to lie in the repository or below CONTAINER_MOUNTS.
CONTAINER=(
    --container-image="$CONTAINER_IMAGE"
    --container-mounts="$REPOSITORY:$REPOSITORY,$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    --container-workdir="$PWD"
    --no-container-mount-home
)
PYTHON=${PYTHON:-python}
