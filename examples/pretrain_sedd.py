"""Train a score entropy discrete diffusion model: torchrun --nproc-per-node N examples/pretrain_sedd.py [--config
YAML] [flags]. On a cluster: examples/slurm/train.sbatch.
"""

from sedd_megatron.pretrain import main

if __name__ == "__main__":
    main()
